//! A cache with a bound in bytes; the least recently used goes first.

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

    pub(crate) fn insert(&self, key: K, value: Arc<V>, bytes: usize) {
        let mut inner = self.inner.lock();
        if bytes > self.bytes_max {
            return;
        }
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
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_value_goes_first_and_the_bound_holds() {
        let cache = Cache::new(10);
        for key in 0..3 {
            cache.insert(key, Arc::new(key), 3);
        }
        assert!(cache.get(&0).is_some());
        cache.insert(3, Arc::new(3), 4);
        assert_eq!(cache.get(&1), None);
        assert!(cache.get(&0).is_some() && cache.get(&2).is_some() && cache.get(&3).is_some());
        cache.insert(4, Arc::new(4), 11);
        assert_eq!(cache.get(&4), None);
        cache.insert(0, Arc::new(9), 10);
        assert_eq!(cache.get(&0).as_deref(), Some(&9));
        assert_eq!(cache.get(&3), None);
    }
}
