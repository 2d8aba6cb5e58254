//! Large payload buffers, shared by all connections. Nobody waits for one: who gets none works in smaller pieces.

use std::sync::Arc;

use parking_lot::Mutex;

use super::limits::{LARGE_BUFFER_BYTES, LARGE_BUFFERS_KEPT};

#[derive(Debug)]
pub(super) struct Pool {
    state: Mutex<State>,
    max: usize,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Box<[u8]>>,
    in_use: usize,
}

/// A buffer of [`LARGE_BUFFER_BYTES`] that returns to its pool when dropped.
#[derive(Debug)]
pub(super) struct LargeBuffer {
    bytes: Box<[u8]>,
    pool: Arc<Pool>,
}

impl Pool {
    pub(super) fn new(max: usize) -> Self {
        Self {
            state: Mutex::default(),
            max,
        }
    }

    /// A buffer, unless all are in use. Its content is what somebody left in it.
    pub(super) fn take(self: &Arc<Self>) -> Option<LargeBuffer> {
        let mut state = self.state.lock();
        if state.in_use >= self.max {
            return None;
        }
        state.in_use += 1;
        let free = state.free.pop();
        drop(state);
        let bytes = free.unwrap_or_else(|| vec![0; LARGE_BUFFER_BYTES].into_boxed_slice());
        Some(LargeBuffer {
            bytes,
            pool: Arc::clone(self),
        })
    }
}

impl LargeBuffer {
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for LargeBuffer {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.in_use -= 1;
        if state.free.len() < LARGE_BUFFERS_KEPT {
            state.free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_lends_no_more_than_its_limit_and_takes_back() {
        let pool = Arc::new(Pool::new(2));
        let first = pool.take().unwrap();
        let _second = pool.take().unwrap();
        assert!(pool.take().is_none());
        drop(first);
        assert!(pool.take().is_some());
    }
}
