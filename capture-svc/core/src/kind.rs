//! The kinds of engines, by name.

use std::{fmt, str::FromStr};

/// How a volume's changes are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// All writes come through our front ends.
    Intercept,
    /// The workload writes the file itself; cuts are clones of it.
    Reflink,
    /// The workload writes the file itself; a cut reads it, at a moment at which it doesn't change.
    Scan,
}

impl EngineKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Intercept, Self::Reflink, Self::Scan];

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Intercept => "intercept",
            Self::Reflink => "reflink",
            Self::Scan => "scan",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EngineKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let named = |kind: &Self| kind.as_str() == text;
        Self::ALL.into_iter().find(named).ok_or(())
    }
}
