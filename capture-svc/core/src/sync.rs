//! What the engine's threads meet at: locks, atomics, how one waits for another. Everything of the engine that two threads
//! touch comes from here, so that the tests of `tests/shuttle.rs` can decide who goes next at each of them.
//!
//! The feature `shuttle` is for those tests alone. Under it the types are shuttle's, which work nowhere but in a test
//! that shuttle runs; no other crate may turn it on.

#[cfg(not(feature = "shuttle"))]
mod primitives {
    pub(crate) use std::{hint, sync::atomic, thread::yield_now};

    pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock};
}

#[cfg(feature = "shuttle")]
mod primitives {
    use std::sync::PoisonError;

    use shuttle::sync::{RwLockReadGuard, RwLockWriteGuard};
    pub(crate) use shuttle::{
        hint,
        sync::{MutexGuard, atomic},
        thread::yield_now,
    };

    /// A mutex with the ways of `parking_lot`'s.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// An open one.
        pub(crate) const fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        /// Waits for it.
        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// None where somebody else has it.
        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    /// A lock of readers and writers with the ways of `parking_lot`'s.
    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        /// An open one.
        pub(crate) const fn new(value: T) -> Self {
            Self(shuttle::sync::RwLock::new(value))
        }

        /// Waits until no writer has it.
        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }

        /// Waits until nobody has it.
        pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

pub(crate) use primitives::{Mutex, MutexGuard, RwLock, atomic, hint, yield_now};

/// A number of like things of which the tests under shuttle have few: a step that makes no difference costs them a
/// chance to make one that does.
pub(crate) const fn many(normally: usize, under_shuttle: usize) -> usize {
    if cfg!(feature = "shuttle") {
        under_shuttle
    } else {
        normally
    }
}
