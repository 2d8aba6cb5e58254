//! Bearer tokens. A token is 32 random bytes, written in hexadecimal; what is kept of it is its SHA-256. A token is not
//! to be guessed, so that a slow hash would add nothing.

use std::fmt::Write as _;

use aws_lc_rs::{constant_time, digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The fewest bytes of a token's text: a word that somebody has thought of is refused when it is shown.
pub const TOKEN_CHARS_MIN: usize = 32;
const HASH_BYTES: usize = 32;

/// What is kept of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenHash([u8; HASH_BYTES]);

impl TokenHash {
    /// Of a token's text.
    #[must_use]
    pub fn of(token: &str) -> Self {
        let mut hash = [0; HASH_BYTES];
        hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        Self(hash)
    }

    /// Whether both are the same, in a time that doesn't tell where they differ.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }

    /// In hexadecimal.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

/// Bytes in lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a text can't fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn of_hex(text: &str) -> Option<[u8; HASH_BYTES]> {
    let bytes = text.as_bytes();
    if bytes.len() != 2 * HASH_BYTES || !bytes.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut hash = [0; HASH_BYTES];
    for (byte, digits) in hash.iter_mut().zip(bytes.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(hash)
}

impl Serialize for TokenHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        of_hex(&text).map(Self).ok_or_else(|| {
            D::Error::custom(
                "no SHA-256 of a token: 64 hexadecimal digits, as `tidemark pki token` prints them",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_the_sha_256_of_the_text() {
        let hash = TokenHash::of("abc");
        assert_eq!(
            hash.to_hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert!(hash.is(&TokenHash::of("abc")));
        assert!(!hash.is(&TokenHash::of("abd")));
    }

    #[test]
    fn hashes_read_as_they_are_written_and_nothing_else_does() {
        let hash = TokenHash::of("abc");
        assert_eq!(of_hex(&hash.to_hex()), Some(hash.0));
        assert_eq!(of_hex(&hash.to_hex().to_uppercase()), Some(hash.0));
        for text in [
            "",
            "ba78",
            &"g".repeat(64),
            &"é".repeat(32),
            &"0".repeat(66),
        ] {
            assert_eq!(of_hex(text), None, "{text}");
        }
    }
}
