//! Memory for the parts that are being gathered and put: so many buffers for all streams together, used again and again.
//!
//! A part has some 17 MiB. Pages that are new to the process cost as much as what is copied into them, so a buffer
//! isn't given back to the system while anything is being received.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The buffers of a vault.
#[derive(Debug)]
pub(crate) struct Buffers {
    free: Arc<Semaphore>,
    max: usize,
    spare: Mutex<Vec<Vec<u8>>>,
}

/// The right to hold one part in memory.
#[derive(Debug)]
pub(crate) struct BufferPermit {
    buffers: Arc<Buffers>,
    _permit: OwnedSemaphorePermit,
}

impl Buffers {
    /// Room for `max` parts.
    pub(crate) fn new(max: usize) -> Self {
        let max = max.min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(max)),
            max,
            spare: Mutex::default(),
        }
    }

    /// Waits for room, and gives an empty buffer with it: one that was used before, or one without memory yet. `None`
    /// where the vault ends.
    pub(crate) async fn take(self: &Arc<Self>) -> Option<(BufferPermit, Vec<u8>)> {
        let permit = Arc::clone(&self.free).acquire_owned().await.ok()?;
        let buffer = self.spare.lock().pop().unwrap_or_default();
        let permit = BufferPermit {
            buffers: Arc::clone(self),
            _permit: permit,
        };
        Some((permit, buffer))
    }
}

impl BufferPermit {
    /// Gives back the buffer of a part that was put, if nobody reads it any more.
    pub(crate) fn put_back(self, mut part: Bytes) {
        // The last one to be given back, with nothing else being received: let the memory go.
        let last = self.buffers.free.available_permits() + 1 >= self.buffers.max;
        let mut spare = self.buffers.spare.lock();
        if last {
            spare.clear();
        } else if part.is_unique() {
            part.clear();
            spare.push(part.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(mut buffer: Vec<u8>) -> (usize, Bytes) {
        buffer.reserve(1 << 20);
        buffer.extend_from_slice(b"part");
        (buffer.as_ptr() as usize, buffer.into())
    }

    #[tokio::test]
    async fn a_buffer_is_used_again_while_others_are_in_use_and_let_go_with_the_last() {
        let buffers = Arc::new(Buffers::new(2));
        let (first, buffer) = buffers.take().await.unwrap();
        let (second, other) = buffers.take().await.unwrap();
        let (place, part) = filled(buffer);
        first.put_back(part);
        let (first, buffer) = buffers.take().await.unwrap();
        assert_eq!((buffer.as_ptr() as usize, buffer.len()), (place, 0));
        assert!(buffer.capacity() >= 1 << 20);
        second.put_back(filled(other).1);
        assert_eq!(buffers.spare.lock().len(), 1);
        first.put_back(filled(buffer).1);
        assert!(buffers.spare.lock().is_empty());
    }

    #[tokio::test]
    async fn a_part_that_is_still_read_keeps_its_buffer() {
        let buffers = Arc::new(Buffers::new(2));
        let (first, buffer) = buffers.take().await.unwrap();
        let _second = buffers.take().await.unwrap();
        let (_, part) = filled(buffer);
        let reader = part.clone();
        first.put_back(part);
        assert!(buffers.spare.lock().is_empty());
        assert_eq!(&reader[..], b"part");
    }
}
