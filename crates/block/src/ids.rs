//! Identities: sixteen random bytes each, shown as UUID text.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// Why bytes or text are not an identity.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    /// An identity is 16 bytes long.
    #[error("an id has 16 bytes, not {0}")]
    Length(usize),
    /// Not the text of a UUID.
    #[error("not a UUID: 32 hexadecimal digits in groups of 8-4-4-4-12 are expected")]
    Text,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// Wraps sixteen bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The sixteen bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;

            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                bytes.try_into().map(Self).map_err(|_| IdError::Length(bytes.len()))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_uuid(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id!(
    /// A volume's identity, for its whole life and at every vault.
    VolumeId
);
id!(
    /// An interval's identity: drawn at random at its cut and never used for another one.
    IntervalId
);

/// A segment's identity: what wrote it, and the how manieth part of that it is.
///
/// `origin` is the interval's id where the segment was received, or random bytes where reclaim wrote it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentId {
    /// The interval, or the rewrite, that this is a part of.
    pub origin: IntervalId,
    /// Counted from 0.
    pub part: u32,
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.origin, self.part)
    }
}

const UUID_GROUPS: [usize; 5] = [4, 2, 2, 2, 6];

fn write_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut rest = &bytes[..];
    for (n, len) in UUID_GROUPS.into_iter().enumerate() {
        if n > 0 {
            f.write_str("-")?;
        }
        let (group, tail) = rest.split_at(len);
        for byte in group {
            write!(f, "{byte:02x}")?;
        }
        rest = tail;
    }
    Ok(())
}

fn parse_uuid(text: &str) -> Result<[u8; 16], IdError> {
    let mut groups = text.split('-');
    let mut bytes = [0; 16];
    let mut at = 0;
    for len in UUID_GROUPS {
        let group = groups.next().ok_or(IdError::Text)?;
        if group.len() != 2 * len || !group.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(IdError::Text);
        }
        for pair in 0..len {
            bytes[at] = u8::from_str_radix(&group[2 * pair..2 * pair + 2], 16)
                .map_err(|_| IdError::Text)?;
            at += 1;
        }
    }
    match groups.next() {
        Some(_) => Err(IdError::Text),
        None => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text() {
        let id = VolumeId::from_bytes(
            *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
        );
        assert_eq!(id.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
    }

    #[test]
    fn text_that_is_no_uuid_is_refused() {
        for text in [
            "",
            "00112233",
            "00112233-4455-6677-8899-aabbccddeef",
            "00112233-4455-6677-8899-aabbccddeeffa",
            "00112233-4455-6677-8899-aabbccddeeff-",
            "0011223g-4455-6677-8899-aabbccddeeff",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "é0112233-4455-6677-8899-aabbccddeef",
        ] {
            assert_eq!(text.parse::<VolumeId>(), Err(IdError::Text), "{text}");
        }
        assert_eq!(VolumeId::try_from(&[1u8; 15][..]), Err(IdError::Length(15)));
    }
}
