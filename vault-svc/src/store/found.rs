//! Objects as a listing shows them.

use object_store::ObjectMeta;

/// An object that may be a stray.
#[derive(Debug, Clone)]
pub struct Found<T> {
    /// Which.
    pub id: T,
    /// Its bytes.
    pub length: u64,
    /// When it was written, milliseconds since the Unix epoch.
    pub modified_ms: u64,
}

pub(super) fn modified_ms(meta: &ObjectMeta) -> u64 {
    u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0)
}

pub(super) fn found_as<T>(id: T, meta: &ObjectMeta) -> Found<T> {
    Found {
        id,
        length: meta.size,
        modified_ms: modified_ms(meta),
    }
}

/// The 16 bytes that a name of 32 hexadecimal digits stands for.
pub(super) fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}
