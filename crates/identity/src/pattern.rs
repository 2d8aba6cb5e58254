//! Which volumes an identity's roles hold for: `data`, `db-*`, `edge-7/data`, `edge-*/*`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The most bytes of a pattern.
const PATTERN_BYTES_MAX: usize = 512;

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// There is nothing before or after the slash, or nothing at all.
    #[error(
        "{0:?} is no pattern of volumes: write VOLUME or SOURCE/VOLUME, with * for any number of characters"
    )]
    Empty(String),
    /// Longer than any name.
    #[error("a pattern of volumes has at most {PATTERN_BYTES_MAX} bytes")]
    TooLong,
}

/// `VOLUME`, or `SOURCE/VOLUME` where the source is named too. In both `*` stands for any number of characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    source: Option<String>,
    volume: String,
}

impl Pattern {
    /// Whether it fits a volume of a source, for who reads or looks after it: without a source it fits those of all.
    #[must_use]
    pub fn fits(&self, source: &str, volume: &str) -> bool {
        glob(&self.volume, volume) && self.source.as_deref().is_none_or(|of| glob(of, source))
    }

    /// Whether it fits a volume of a source, for a source that writes to it and is called `own`: a pattern without a
    /// source fits its own volumes only.
    #[must_use]
    pub fn fits_own(&self, own: &str, source: &str, volume: &str) -> bool {
        glob(&self.volume, volume)
            && match &self.source {
                Some(of) => glob(of, source),
                None => own == source,
            }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.len() > PATTERN_BYTES_MAX {
            return Err(PatternError::TooLong);
        }
        // The name of a volume has no slash, that of a source may have several.
        let (source, volume) = match text.rsplit_once('/') {
            Some((source, volume)) => (Some(source.to_owned()), volume),
            None => (None, text),
        };
        if volume.is_empty() || source.as_deref() == Some("") {
            return Err(PatternError::Empty(text.to_owned()));
        }
        Ok(Self {
            source,
            volume: volume.to_owned(),
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}/")?;
        }
        f.write_str(&self.volume)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// Whether `text` is what `pattern` says. Takes at most the product of their lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where the last star stands, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, taken)) = star {
            star = Some((at, taken + 1));
            p = at + 1;
            t = taken + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_star_is_any_number_of_characters_and_all_else_is_itself() {
        for (pattern, text, fits) in [
            ("data", "data", true),
            ("data", "data2", false),
            ("data", "dat", false),
            ("*", "", true),
            ("*", "anything", true),
            ("db-*", "db-1", true),
            ("db-*", "db", false),
            ("*-db", "a-db-db", true),
            ("*-db", "a-db-x", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a**", "a", true),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_without_a_source_reads_those_of_all_and_writes_its_own_only() {
        let data = pattern("data");
        assert!(data.fits("a", "data") && data.fits("b", "data"));
        assert!(!data.fits("a", "wal"));
        assert!(data.fits_own("a", "a", "data"));
        assert!(!data.fits_own("a", "b", "data"));
    }

    #[test]
    fn a_source_in_a_pattern_is_that_source_and_no_other() {
        let theirs = pattern("b/*");
        assert!(theirs.fits("b", "data") && !theirs.fits("a", "data"));
        assert!(theirs.fits_own("a", "b", "data"));
        assert!(!theirs.fits_own("b", "a", "data"));
        let deep = pattern("spiffe://site/edge-*/wal");
        assert!(deep.fits("spiffe://site/edge-7", "wal"));
        assert!(!deep.fits("spiffe://site/db", "wal"));
    }

    #[test]
    fn patterns_read_as_they_are_written_and_half_ones_are_refused() {
        for text in ["data", "*", "a/b", "spiffe://x/y/z"] {
            assert_eq!(pattern(text).to_string(), text);
        }
        for text in ["", "/", "a/", "/a", &"x".repeat(PATTERN_BYTES_MAX + 1)] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
