//! What people write on the command line, turned into values: sizes, times, addresses, `VOLUME@N`.

use std::{str::FromStr, time::Duration};

use thiserror::Error;
use tidemark_config::Span;
use tidemark_identity::Role;

const UNITS: [(&str, u32); 10] = [
    ("K", 10),
    ("KiB", 10),
    ("M", 20),
    ("MiB", 20),
    ("G", 30),
    ("GiB", 30),
    ("T", 40),
    ("TiB", 40),
    ("P", 50),
    ("PiB", 50),
];

/// A size that is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// Neither a number nor a number with a known unit.
    #[error(
        "use a number of bytes, or one with KiB, MiB, GiB, TiB or PiB (powers of 1024), such as 8GiB"
    )]
    Syntax,
    /// More than 64 bits.
    #[error("this is more than any volume can have")]
    TooLarge,
}

/// Bytes from a plain number or one with a unit of 1024: `8GiB`, `8G` (the same), `4096`.
///
/// # Errors
/// Anything else; decimal units such as `GB` too, because half the world takes them for the others.
pub fn size(text: &str) -> Result<u64, SizeError> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Syntax);
    }
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    let unit = unit.trim_start();
    let shift = match UNITS.iter().find(|(name, _)| *name == unit) {
        Some((_, shift)) => *shift,
        None if unit.is_empty() || unit == "B" => 0,
        None => return Err(SizeError::Syntax),
    };
    number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)
}

/// A time such as `15m`, `90s` or `1h30m`.
///
/// # Errors
/// Anything else, and zero.
pub fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<Span>() {
        Ok(time) if time.is_zero() => Err("must be more than zero".to_owned()),
        Ok(time) => Ok(time.get()),
        Err(_) => Err("use a number with s, m, h or d, such as 15m".to_owned()),
    }
}

/// The address of a service: a URL, or `HOST:PORT` as short for `http://HOST:PORT`.
///
/// # Errors
/// Anything else.
pub fn url(text: &str) -> Result<String, String> {
    let url = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    let wrong = || "use a URL such as http://127.0.0.1:7401".to_owned();
    let uri: tonic::transport::Uri = url.parse().map_err(|_| wrong())?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.port_u16().is_none() {
        return Err(wrong());
    }
    Ok(url)
}

/// A role by its name.
///
/// # Errors
/// There is none of this name.
pub fn role(text: &str) -> Result<Role, String> {
    Role::named(text).ok_or_else(|| "use source, restorer, operator or viewer".to_owned())
}

/// A generation of a volume as people name it: `VOLUME@N`, or `VOLUME` for the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationRef {
    /// Name or UUID.
    pub volume: String,
    /// `None` is the newest.
    pub generation: Option<u64>,
}

impl FromStr for GenerationRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (volume, generation) = match text.split_once('@') {
            None => (text, None),
            Some((volume, number)) => match number.parse::<u64>() {
                Ok(number) if number > 0 => (volume, Some(number)),
                _ => {
                    return Err(format!(
                        "\"{number}\" is no generation: they are numbered from 1, as in data@7"
                    ));
                }
            },
        };
        if volume.is_empty() {
            return Err("the volume is missing: use VOLUME@N, as in data@7".to_owned());
        }
        Ok(Self {
            volume: volume.to_owned(),
            generation,
        })
    }
}

/// A volume, or a snapshot of it by number or label: `VOLUME`, `VOLUME@SNAPSHOT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRef {
    /// Name or UUID.
    pub volume: String,
    /// Number or label; `None` is the volume itself.
    pub snapshot: Option<String>,
}

impl FromStr for SnapshotRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (volume, snapshot) = match text.split_once('@') {
            None => (text, None),
            Some((volume, snapshot)) => (volume, Some(snapshot)),
        };
        if volume.is_empty() || snapshot == Some("") {
            return Err(
                "use VOLUME, or VOLUME@SNAPSHOT with a number or a label, as in data@3".to_owned(),
            );
        }
        Ok(Self {
            volume: volume.to_owned(),
            snapshot: snapshot.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_by_volume_and_number_or_label() {
        for (text, volume, snapshot) in [
            ("data", "data", None),
            ("data@3", "data", Some("3")),
            ("data@me@home", "data", Some("me@home")),
        ] {
            let expected = SnapshotRef {
                volume: volume.to_owned(),
                snapshot: snapshot.map(str::to_owned),
            };
            assert_eq!(text.parse(), Ok(expected));
        }
        for text in ["", "@3", "data@"] {
            assert!(text.parse::<SnapshotRef>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_bytes_or_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("4KiB", 4096),
            ("4K", 4096),
            ("8GiB", 8 << 30),
            ("8 GiB", 8 << 30),
            ("16TiB", 16 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_size_that_could_be_misread_is_refused() {
        for text in [
            "", "GiB", "8GB", "8gib", "-1", "1.5GiB", "0x1000", "8GiBs", "８GiB",
        ] {
            assert_eq!(size(text), Err(SizeError::Syntax), "{text}");
        }
        for text in ["18446744073709551616", "16384PiB"] {
            assert_eq!(size(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn times_need_a_unit_and_are_not_zero() {
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for text in ["15", "0s", "", "soon", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_are_urls_or_host_and_port() {
        assert_eq!(url("http://[::1]:7401"), Ok("http://[::1]:7401".to_owned()));
        assert_eq!(
            url("localhost:7402"),
            Ok("http://localhost:7402".to_owned())
        );
        for text in [
            "localhost",
            "ftp://a:1",
            "http://",
            "",
            "http://a b:1",
            "7401",
        ] {
            assert!(url(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_generation_is_named_by_volume_and_number() {
        assert_eq!(
            "data@7".parse(),
            Ok(GenerationRef {
                volume: "data".into(),
                generation: Some(7)
            })
        );
        assert_eq!(
            "data".parse(),
            Ok(GenerationRef {
                volume: "data".into(),
                generation: None
            })
        );
        for text in ["data@", "data@0", "data@-1", "data@x", "@7", "", "data@7@8"] {
            assert!(text.parse::<GenerationRef>().is_err(), "{text}");
        }
    }
}
