//! Block-range locks: stripes of blocks share a fixed number of locks, taken in ascending order.

use parking_lot::Mutex;

/// Locks. A power of two.
const LOCKS: u64 = 1024;

/// The locks of a volume.
pub(super) struct Stripes(Vec<Mutex<()>>);

impl std::fmt::Debug for Stripes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stripes")
    }
}

impl Default for Stripes {
    fn default() -> Self {
        Self((0..LOCKS).map(|_| Mutex::new(())).collect())
    }
}

impl Stripes {
    /// The locks of the stripes `first..=last`, ascending, each once.
    fn of(&self, first: u64, last: u64) -> impl Iterator<Item = &Mutex<()>> {
        #[allow(clippy::cast_possible_truncation, reason = "below the number of locks")]
        let place = |stripe: u64| (stripe % LOCKS) as usize;
        let all = last - first + 1 >= LOCKS;
        let (from, to) = (place(first), place(last));
        let (low, high) = match (all, from <= to) {
            (true, _) => (0..self.0.len(), 0..0),
            (false, true) => (from..to + 1, 0..0),
            (false, false) => (0..to + 1, from..self.0.len()),
        };
        low.chain(high).map(|n| &self.0[n])
    }

    pub(super) fn lock(&self, first: u64, last: u64) {
        self.of(first, last)
            .for_each(|lock| std::mem::forget(lock.lock()));
    }

    #[allow(unsafe_code)]
    pub(super) fn unlock(&self, first: u64, last: u64) {
        for lock in self.of(first, last) {
            // SAFETY: the caller took these locks by `lock` with the same range, on this thread.
            unsafe { lock.force_unlock(Default::default()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stripe_of_a_range_is_locked_once_also_around_the_end() {
        let stripes = Stripes::default();
        for (first, last) in [(0, 0), (1020, 1030), (5, 5 + LOCKS), (LOCKS - 1, LOCKS)] {
            stripes.lock(first, last);
            let held = stripes.0.iter().filter(|lock| lock.is_locked()).count() as u64;
            assert_eq!(held, (last - first + 1).min(LOCKS));
            assert!(stripes.of(first, first).all(|lock| lock.is_locked()));
            stripes.unlock(first, last);
            assert!(stripes.0.iter().all(|lock| !lock.is_locked()));
        }
    }
}
