//! The headers of replies in the transmission phase. Pure.

use super::wire::{
    BASE_ALLOCATION_ID, CHUNK_HEADER_LEN, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE, NBD_STATE_HOLE, NBD_STATE_ZERO, SIMPLE_REPLY_LEN,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use crate::device::AllocationExtent;
use crate::errno::NbdError;

/// Bytes of a data chunk before its data.
pub const DATA_CHUNK_LEN: usize = CHUNK_HEADER_LEN + 8;
/// Bytes of a hole chunk.
pub const HOLE_CHUNK_LEN: usize = CHUNK_HEADER_LEN + 12;
/// Bytes of an error chunk without a message.
pub const ERROR_CHUNK_LEN: usize = CHUNK_HEADER_LEN + 6;

/// A simple reply; `None` is success. The data of a read follow it.
#[must_use]
pub fn simple(cookie: u64, error: Option<NbdError>) -> [u8; SIMPLE_REPLY_LEN] {
    let mut out = [0; SIMPLE_REPLY_LEN];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, NbdError::code).to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

fn chunk_header(out: &mut [u8], cookie: u64, kind: u16, done: bool, length: u32) {
    let flags = if done { NBD_REPLY_FLAG_DONE } else { 0 };
    out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&length.to_be_bytes());
}

/// A final chunk without content: success.
#[must_use]
pub fn none_chunk(cookie: u64) -> [u8; CHUNK_HEADER_LEN] {
    let mut out = [0; CHUNK_HEADER_LEN];
    chunk_header(&mut out, cookie, NBD_REPLY_TYPE_NONE, true, 0);
    out
}

/// The head of a chunk of `length` (≥ 1) bytes of data at `offset` of the export; the data follow it.
#[must_use]
pub fn data_chunk(cookie: u64, done: bool, offset: u64, length: u32) -> [u8; DATA_CHUNK_LEN] {
    let mut out = [0; DATA_CHUNK_LEN];
    // A read is at most 32 MiB, so this can't overflow.
    chunk_header(
        &mut out,
        cookie,
        NBD_REPLY_TYPE_OFFSET_DATA,
        done,
        length.saturating_add(8),
    );
    out[20..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A chunk that says that `length` (≥ 1) bytes at `offset` are zeroes.
#[must_use]
pub fn hole_chunk(cookie: u64, done: bool, offset: u64, length: u32) -> [u8; HOLE_CHUNK_LEN] {
    let mut out = [0; HOLE_CHUNK_LEN];
    chunk_header(&mut out, cookie, NBD_REPLY_TYPE_OFFSET_HOLE, done, 12);
    out[20..28].copy_from_slice(&offset.to_be_bytes());
    out[28..].copy_from_slice(&length.to_be_bytes());
    out
}

/// A final chunk that fails the request.
#[must_use]
pub fn error_chunk(cookie: u64, error: NbdError) -> [u8; ERROR_CHUNK_LEN] {
    let mut out = [0; ERROR_CHUNK_LEN];
    chunk_header(&mut out, cookie, NBD_REPLY_TYPE_ERROR, true, 6);
    out[20..24].copy_from_slice(&error.code().to_be_bytes());
    out
}

/// A final chunk with the allocation of at most the first `length` (≥ 1) bytes that `extents` tell of, as at most `max`
/// descriptors. Whatever a device returns, the reply keeps the protocol: neighbours of one state are joined, and where
/// nothing is told, all is allocated data.
pub fn block_status(
    out: &mut Vec<u8>,
    cookie: u64,
    length: u32,
    extents: &[AllocationExtent],
    max: usize,
) {
    let mut descriptors: Vec<(u32, u32)> = Vec::with_capacity(extents.len().min(max));
    let mut left = length;
    for extent in extents {
        let bytes = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
        if bytes == 0 {
            continue;
        }
        let state = if extent.hole { NBD_STATE_HOLE } else { 0 }
            | if extent.zero { NBD_STATE_ZERO } else { 0 };
        let full = descriptors.len() == max;
        match descriptors.last_mut() {
            Some((run, last)) if *last == state => *run += bytes,
            _ if full => break,
            _ => descriptors.push((bytes, state)),
        }
        left -= bytes;
    }
    if descriptors.is_empty() {
        descriptors.push((length, 0));
    }
    let mut head = [0; CHUNK_HEADER_LEN];
    let payload = u32::try_from(4 + 8 * descriptors.len()).unwrap_or(u32::MAX);
    chunk_header(
        &mut head,
        cookie,
        NBD_REPLY_TYPE_BLOCK_STATUS,
        true,
        payload,
    );
    out.extend_from_slice(&head);
    out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    for (bytes, state) in descriptors {
        out.extend_from_slice(&bytes.to_be_bytes());
        out.extend_from_slice(&state.to_be_bytes());
    }
}
