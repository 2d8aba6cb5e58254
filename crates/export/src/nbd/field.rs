//! Big-endian fields out of a byte slice, without a panic where it is too short.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Takes fields off the front of a message.
#[derive(Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn u16(&mut self) -> Option<u16> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_be_bytes(*head))
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*head))
    }

    /// A string with its length, in 32 bits, before it; at most `max` bytes of UTF-8 without NUL.
    pub(crate) fn string(&mut self, max: usize) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        text(head, max)
    }

    /// Whether everything has been taken.
    pub(crate) fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// `bytes` as a string of the protocol: at most `max` bytes of UTF-8 without NUL.
pub(crate) fn text(bytes: &[u8], max: usize) -> Option<&str> {
    if bytes.len() > max || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}
