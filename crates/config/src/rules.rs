//! What holds between values beyond their types.

use std::{fmt::Display, ops::RangeInclusive};

/// Collects the rules that a configuration breaks.
#[derive(Debug, Default)]
pub struct Rules {
    broken: Vec<(&'static str, String)>,
}

impl Rules {
    /// What `key` must be, if it isn't.
    pub fn that(&mut self, key: &'static str, holds: bool, what: &str) {
        if !holds {
            self.broken.push((key, what.to_owned()));
        }
    }

    /// A value from one bound to the other.
    pub fn within<T: PartialOrd + Display>(
        &mut self,
        key: &'static str,
        value: T,
        bounds: RangeInclusive<T>,
    ) {
        let what = format!("must be from {} to {}", bounds.start(), bounds.end());
        self.that(key, bounds.contains(&value), &what);
    }

    /// A value with a lower bound only.
    pub fn at_least<T: PartialOrd + Display>(&mut self, key: &'static str, value: T, least: T) {
        let what = format!("must be at least {least}");
        self.that(key, value >= least, &what);
    }

    pub(crate) fn into_broken(self) -> impl Iterator<Item = (&'static str, String)> {
        self.broken.into_iter()
    }
}
