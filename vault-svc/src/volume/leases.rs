//! Leases of readers: which manifest versions somebody may still be reading from.
//!
//! Only readers of this process read from the store, so leases live in its memory: a crash ends both.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

/// The leases of one volume.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases {
    held: Arc<Mutex<BTreeMap<u64, u32>>>,
}

/// Keeps whatever a manifest version names from being deleted, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Leases,
    version: u64,
}

impl Leases {
    /// Leases the version that `manifest` returns. It is asked under the lock, so that no deletion comes between.
    pub(crate) fn take<T>(&self, manifest: impl FnOnce() -> (u64, T)) -> (Lease, T) {
        let mut held = self.held.lock();
        let (version, value) = manifest();
        *held.entry(version).or_insert(0) += 1;
        let lease = Lease {
            leases: self.clone(),
            version,
        };
        (lease, value)
    }

    /// Whether an object that version `condemned` no longer names can be needed by nobody.
    pub(crate) fn allow_deletion(&self, condemned: u64) -> bool {
        self.held
            .lock()
            .first_key_value()
            .is_none_or(|(oldest, _)| *oldest >= condemned)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.leases.held.lock();
        if let Some(count) = held.get_mut(&self.version) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.version);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reader_may_need_is_not_deleted() {
        let leases = Leases::default();
        assert!(leases.allow_deletion(5));
        let (old, ()) = leases.take(|| (4, ()));
        let (new, ()) = leases.take(|| (5, ()));
        assert!(leases.allow_deletion(4));
        assert!(!leases.allow_deletion(5));
        drop(old);
        assert!(leases.allow_deletion(5));
        assert!(!leases.allow_deletion(6));
        drop(new);
        assert!(leases.allow_deletion(6));
    }
}
