//! Requests of the transmission phase: decoding, and the check of each against what was agreed upon. Pure.

use super::field;
use super::limits::REQUEST_PAYLOAD_MAX;
use super::wire::{
    NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH, NBD_CMD_READ,
    NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, REQUEST_LEN, REQUEST_MAGIC,
};
use crate::device::ZeroFlags;
use crate::errno::NbdError;

/// A request's header, as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// `NBD_CMD_*`, or a number that we don't know.
    pub command: u16,
    /// The client's own mark, returned in the reply. Not necessarily unique.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl RequestHeader {
    /// `None` where the magic is wrong: the stream is out of step and must be closed.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        (field::u32_at(bytes, 0)? == REQUEST_MAGIC).then_some(())?;
        Some(Self {
            flags: field::u16_at(bytes, 4)?,
            command: field::u16_at(bytes, 6)?,
            cookie: field::u64_at(bytes, 8)?,
            offset: field::u64_at(bytes, 16)?,
            length: field::u32_at(bytes, 24)?,
        })
    }

    /// The inverse of [`RequestHeader::decode`].
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Bytes of data that follow the header, whether or not the request is any good.
    #[must_use]
    pub fn payload_len(&self) -> u32 {
        if self.command == NBD_CMD_WRITE {
            self.length
        } else {
            0
        }
    }
}

/// A request that may be performed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read; in one content chunk where `unfragmented`.
    Read {
        /// `NBD_CMD_FLAG_DF`.
        unfragmented: bool,
    },
    /// Write the payload.
    Write {
        /// `NBD_CMD_FLAG_FUA`.
        fua: bool,
    },
    /// Finish what is running, then close. There is no reply.
    Disconnect,
    /// Make everything stable.
    Flush,
    /// Discard.
    Trim {
        /// `NBD_CMD_FLAG_FUA`.
        fua: bool,
    },
    /// Read ahead.
    Cache,
    /// Zero.
    WriteZeroes(ZeroFlags),
    /// Tell the allocation; of the first extent only where `one`.
    BlockStatus {
        /// `NBD_CMD_FLAG_REQ_ONE`.
        one: bool,
    },
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes of the export.
    pub length: u64,
    /// No writes.
    pub read_only: bool,
    /// Structured replies were agreed upon.
    pub structured_replies: bool,
    /// `base:allocation` was agreed upon.
    pub base_allocation: bool,
}

/// Whether, and as what, a request may be performed.
///
/// # Errors
/// The error to reply with. The payload of a refused write must be read and dropped, except that one longer than
/// [`REQUEST_PAYLOAD_MAX`] is answered by closing.
pub fn check(header: &RequestHeader, terms: &Terms) -> Result<Command, NbdError> {
    let has = |flag: u16| header.flags & flag != 0;
    let fua = has(NBD_CMD_FLAG_FUA);
    match header.command {
        NBD_CMD_READ => {
            let flags = if terms.structured_replies {
                NBD_CMD_FLAG_DF
            } else {
                0
            };
            allowed(header, flags)?;
            if header.length > REQUEST_PAYLOAD_MAX {
                return Err(NbdError::Inval);
            }
            within(header, terms, NbdError::Inval)?;
            Ok(Command::Read {
                unfragmented: has(NBD_CMD_FLAG_DF),
            })
        }
        NBD_CMD_WRITE => {
            changes(header, terms, 0, NbdError::NoSpc)?;
            Ok(Command::Write { fua })
        }
        NBD_CMD_DISC => Ok(Command::Disconnect),
        NBD_CMD_FLUSH => {
            allowed(header, 0)?;
            Ok(Command::Flush)
        }
        NBD_CMD_TRIM => {
            changes(header, terms, 0, NbdError::Inval)?;
            Ok(Command::Trim { fua })
        }
        NBD_CMD_CACHE => {
            allowed(header, 0)?;
            within(header, terms, NbdError::Inval)?;
            Ok(Command::Cache)
        }
        NBD_CMD_WRITE_ZEROES => {
            let flags = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
            changes(header, terms, flags, NbdError::NoSpc)?;
            Ok(Command::WriteZeroes(ZeroFlags {
                may_punch: !has(NBD_CMD_FLAG_NO_HOLE),
                fast_only: has(NBD_CMD_FLAG_FAST_ZERO),
                fua,
            }))
        }
        NBD_CMD_BLOCK_STATUS => {
            allowed(header, NBD_CMD_FLAG_REQ_ONE)?;
            if !terms.base_allocation || header.length == 0 {
                return Err(NbdError::Inval);
            }
            within(header, terms, NbdError::Inval)?;
            Ok(Command::BlockStatus {
                one: has(NBD_CMD_FLAG_REQ_ONE),
            })
        }
        _ => Err(NbdError::Inval),
    }
}

/// No flags but these. FUA is valid on every command, and without meaning where nothing is written.
fn allowed(header: &RequestHeader, flags: u16) -> Result<(), NbdError> {
    if header.flags & !(flags | NBD_CMD_FLAG_FUA) == 0 {
        Ok(())
    } else {
        Err(NbdError::Inval)
    }
}

/// A range within the export, or `error`.
fn within(header: &RequestHeader, terms: &Terms, error: NbdError) -> Result<(), NbdError> {
    let end = header.offset.checked_add(u64::from(header.length));
    if end.is_some_and(|end| end <= terms.length) {
        Ok(())
    } else {
        Err(error)
    }
}

/// A request that changes the export: its flags, that it may be changed, and its range (or `outside`).
fn changes(
    header: &RequestHeader,
    terms: &Terms,
    flags: u16,
    outside: NbdError,
) -> Result<(), NbdError> {
    allowed(header, flags)?;
    if terms.read_only {
        return Err(NbdError::Perm);
    }
    within(header, terms, outside)
}
