//! The operator's file of identities, and the patterns of volumes in it.

use std::str::from_utf8;

use tidemark_identity::{Identities, Pattern};

use crate::bounded::bounded;

/// What reads as a file reads as the same one again as it is written. The first four lines are tried as a pattern, the
/// name of a caller, a source and a volume, too.
pub fn run(data: &[u8]) {
    let Ok(text) = from_utf8(data) else { return };
    // The reader of TOML has tables of its own, for its errors too.
    let most = 1024 * data.len() + (1 << 20);
    if let Ok(read) = bounded(most, || Identities::parse(text)) {
        file(&read);
    }
    let mut lines = text.lines();
    let [pattern, own, source, volume] = std::array::from_fn(|_| lines.next().unwrap_or_default());
    if let Ok(pattern) = pattern.parse::<Pattern>() {
        fitting(&pattern, own, source, volume);
    }
}

fn file(read: &Identities) {
    let written = read.to_toml();
    let again = Identities::parse(&written).unwrap_or_else(|error| panic!("{error} in {written}"));
    assert_eq!(again.len(), read.len());
    assert_eq!(again.to_toml(), written);
}

/// The rights that a pattern gives are those that its text says.
fn fitting(pattern: &Pattern, own: &str, source: &str, volume: &str) {
    let text = pattern.to_string();
    assert_eq!(text.parse().as_ref(), Ok(pattern));
    let (of, name) = match text.rsplit_once('/') {
        Some((of, name)) => (Some(of), name),
        None => (None, text.as_str()),
    };
    let has_name = is_like(name, volume);
    let reads = has_name && of.is_none_or(|of| is_like(of, source));
    assert_eq!(pattern.fits(source, volume), reads);
    let writes = has_name && of.map_or(own == source, |of| is_like(of, source));
    assert_eq!(pattern.fits_own(own, source, volume), writes);
    // Nobody writes what its pattern doesn't fit.
    assert!(reads || !writes);
}

/// Whether a text is like a pattern with stars: one byte of the pattern after the other, with each length of the text
/// that it and those before it can be.
fn is_like(pattern: &str, text: &str) -> bool {
    let text = text.as_bytes();
    let mut fits = vec![false; text.len() + 1];
    fits[0] = true;
    for byte in pattern.bytes() {
        let before = fits.clone();
        let mut any = false;
        for (length, fits) in fits.iter_mut().enumerate() {
            any |= before[length];
            *fits = match byte {
                b'*' => any,
                _ => length > 0 && before[length - 1] && text[length - 1] == byte,
            };
        }
    }
    fits[text.len()]
}
