//! Which image is looked at next, newest first or by halves.

/// A search for the newest of `count` images that passes; image 0 is the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Search {
    /// One after the other, until one passes.
    InOrder {
        /// The next one.
        next: usize,
        /// Images there are.
        count: usize,
        /// One passed.
        done: bool,
    },
    /// Where every image older than one that passes does too.
    Halving {
        /// Every newer one failed.
        from: usize,
        /// It passed, or is the number of images.
        until: usize,
    },
}

impl Search {
    pub(super) const fn new(count: usize, halving: bool) -> Self {
        if halving {
            Self::Halving {
                from: 0,
                until: count,
            }
        } else {
            Self::InOrder {
                next: 0,
                count,
                done: false,
            }
        }
    }

    /// The image to look at; none when the search has ended.
    pub(super) const fn next(&self) -> Option<usize> {
        match *self {
            Self::InOrder { next, count, done } if !done && next < count => Some(next),
            Self::Halving { from, until } if from < until => Some(from + (until - from) / 2),
            _ => None,
        }
    }

    /// What the look at [`Self::next`] gave.
    pub(super) const fn tell(&mut self, passed: bool) {
        let Some(at) = self.next() else { return };
        match self {
            Self::InOrder { done, .. } if passed => *done = true,
            Self::InOrder { next, .. } => *next = at + 1,
            Self::Halving { until, .. } if passed => *until = at,
            Self::Halving { from, .. } => *from = at + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The images looked at, and the newest that passed.
    fn search(
        count: usize,
        halving: bool,
        good: impl Fn(usize) -> bool,
    ) -> (Vec<usize>, Option<usize>) {
        let mut search = Search::new(count, halving);
        let (mut looked, mut found) = (Vec::new(), None);
        while let Some(at) = search.next() {
            looked.push(at);
            if good(at) {
                found = Some(at);
            }
            search.tell(good(at));
        }
        (looked, found)
    }

    #[test]
    fn in_order_the_first_that_passes_ends_it() {
        assert_eq!(search(5, false, |at| at >= 2), (vec![0, 1, 2], Some(2)));
        assert_eq!(search(3, false, |_| false), (vec![0, 1, 2], None));
        assert_eq!(search(0, false, |_| true), (vec![], None));
    }

    #[test]
    fn by_halves_the_newest_that_passes_is_found_in_few_looks() {
        for count in 0..40 {
            for first_good in 0..=count {
                let (looked, found) = search(count, true, |at| at >= first_good);
                assert_eq!(
                    found,
                    (first_good < count).then_some(first_good),
                    "{first_good} of {count}"
                );
                assert!(looked.len() <= count.checked_ilog2().map_or(0, |n| n as usize + 1));
            }
        }
    }
}
