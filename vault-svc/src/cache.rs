//! A cache with a bound in bytes, its own bookkeeping included; the least recently used goes first.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::Arc,
};

use parking_lot::Mutex;

/// Values by key, at most `bytes_max` of them together.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    inner: Mutex<Inner<K, V>>,
    bytes_max: usize,
}

#[derive(Debug)]
struct Inner<K, V> {
    entries: HashMap<K, Entry<V>>,
    by_use: BTreeMap<u64, K>,
    clock: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<V> {
    value: Arc<V>,
    bytes: usize,
    used: u64,
}

impl<K: Hash + Eq + Clone, V> Cache<K, V> {
    /// What an entry takes beside its value's own bytes: both keys, the value's head, and the room that maps leave free.
    const OVERHEAD: usize =
        2 * (2 * size_of::<K>() + size_of::<Entry<V>>() + size_of::<u64>()) + size_of::<V>() + 32;

    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: HashMap::new(),
                by_use: BTreeMap::new(),
                clock: 0,
                bytes: 0,
            }),
            bytes_max,
        }
    }

    pub(crate) fn get(&self, key: &K) -> Option<Arc<V>> {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let now = inner.clock;
        let entry = inner.entries.get_mut(key)?;
        let before = std::mem::replace(&mut entry.used, now);
        let value = Arc::clone(&entry.value);
        if let Some(key) = inner.by_use.remove(&before) {
            inner.by_use.insert(now, key);
        }
        Some(value)
    }

    /// `bytes`: what the value holds beyond `size_of::<V>()`.
    pub(crate) fn insert(&self, key: K, value: Arc<V>, bytes: usize) {
        let bytes = bytes.saturating_add(Self::OVERHEAD);
        if bytes > self.bytes_max {
            return;
        }
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let used = inner.clock;
        let entry = Entry { value, bytes, used };
        if let Some(old) = inner.entries.insert(key.clone(), entry) {
            inner.bytes -= old.bytes;
            inner.by_use.remove(&old.used);
        }
        inner.by_use.insert(used, key);
        inner.bytes += bytes;
        while inner.bytes > self.bytes_max {
            let Some((_, key)) = inner.by_use.pop_first() else {
                break;
            };
            if let Some(old) = inner.entries.remove(&key) {
                inner.bytes -= old.bytes;
            }
        }
    }
}

#[cfg(test)]
impl<K: Hash + Eq + Clone, V> Cache<K, V> {
    /// Values, and bytes of all of them.
    pub(crate) fn size(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        assert_eq!(inner.entries.len(), inner.by_use.len());
        (inner.entries.len(), inner.bytes)
    }

    pub(crate) const fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    pub(crate) fn clear(&self) {
        let mut inner = self.inner.lock();
        inner.entries.clear();
        inner.by_use.clear();
        inner.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVERHEAD: usize = Cache::<i32, i32>::OVERHEAD;

    #[test]
    fn the_least_recently_used_value_goes_first_and_the_bound_holds() {
        let cache = Cache::new(3 * OVERHEAD + 3000);
        for key in 0..3 {
            cache.insert(key, Arc::new(key), 1000);
        }
        assert!(cache.get(&0).is_some());
        cache.insert(3, Arc::new(3), 900);
        assert_eq!(cache.get(&1), None);
        assert!(cache.get(&0).is_some() && cache.get(&2).is_some() && cache.get(&3).is_some());
        cache.insert(4, Arc::new(4), 2 * OVERHEAD + 3001);
        assert_eq!(cache.get(&4), None);
        cache.insert(0, Arc::new(9), 2 * OVERHEAD + 3000);
        assert_eq!(cache.get(&0).as_deref(), Some(&9));
        assert_eq!(cache.get(&3), None);
        assert_eq!(cache.size(), (1, cache.bytes_max()));
    }

    #[test]
    fn values_of_no_bytes_are_bounded_too() {
        let cache = Cache::new(100 * OVERHEAD);
        for key in 0..1000 {
            cache.insert(key, Arc::new(key), 0);
        }
        assert_eq!(cache.size(), (100, cache.bytes_max()));
    }
}
