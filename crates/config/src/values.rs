//! Values as people write them: `15m`, `1GiB`.

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A length of time, written as `250ms`, `15m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(Duration);

impl Span {
    /// Whole seconds.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Whole milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// As the standard library has it.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }

    /// Whether it is no time at all.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl From<Duration> for Span {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

/// The most bytes, and the most digits in a row, of a length of time: `humantime` 2.4 panics where fractions carry a sum
/// of seconds over 64 bits, and the few parts that fit, each below ten billion years, come nowhere near.
const MAX_SPAN_TEXT: usize = 64;
const MAX_SPAN_DIGITS: usize = 10;
/// A thousand years: whatever is not longer is written in fewer bytes and digits than these.
const MAX_SPAN: Duration = Duration::from_hours(1000 * 8766);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            |e: &str| format!("{text:?} is no length of time ({e}): write 250ms, 90s, 15m or 1h");
        // It takes digits with blanks between them for one number.
        let numbers = text.split(|c: char| !c.is_ascii_digit() && !c.is_whitespace());
        let digits = numbers.map(|number| number.matches(|c: char| c.is_ascii_digit()).count());
        if text.len() > MAX_SPAN_TEXT || digits.max() > Some(MAX_SPAN_DIGITS) {
            return Err(error("too long"));
        }
        let span = humantime::parse_duration(text).map_err(|e| error(&e.to_string()))?;
        if span > MAX_SPAN {
            return Err(error("longer than a thousand years"));
        }
        Ok(Self(span))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no length of time: write \"250ms\", \"90s\", \"15m\" or \"1h\""
        )]
        enum Raw {
            Text(String),
            Number(u64),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
            Raw::Number(0) => Ok(Self(Duration::ZERO)),
            Raw::Number(n) => Err(D::Error::custom(format!(
                "{n} has no unit: write {n}s, {n}ms or {n}m"
            ))),
        }
    }
}

/// A number of bytes, written as a number or as `64KiB`, `512MiB`, `8GiB`, `1TiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl ByteSize {
    /// Plain bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Kibibytes.
    #[must_use]
    pub const fn kib(kib: u64) -> Self {
        Self(kib << 10)
    }

    /// Mebibytes.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// Tebibytes.
    #[must_use]
    pub const fn tib(tib: u64) -> Self {
        Self(tib << 40)
    }

    /// In bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("{text:?} is no number of bytes: write 4096, 64KiB, 512MiB, 8GiB or 1TiB");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let shift = match unit.trim() {
            "" | "B" => 0,
            unit => UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .map(|(_, shift)| *shift)
                .ok_or_else(error)?,
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS
            .iter()
            .rev()
            .find(|(_, shift)| self.0 > 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => self.0.fmt(f),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no number of bytes: write 4096, \"64KiB\", \"512MiB\", \"8GiB\" or \"1TiB\""
        )]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(bytes) => Ok(Self(bytes)),
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// An address to listen on, written as `127.0.0.1:9464`; empty: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OptionalAddr(pub Option<SocketAddr>);

impl FromStr for OptionalAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let addr = text.parse();
        addr.map(|addr| Self(Some(addr))).map_err(|_| {
            format!(
                "{text:?} is no address to listen on: write 127.0.0.1:9464, or nothing for none"
            )
        })
    }
}

impl fmt::Display for OptionalAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |addr| addr.fmt(f))
    }
}

impl Serialize for OptionalAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OptionalAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_to_listen_on_may_be_left_out() {
        for text in ["", "127.0.0.1:9464", "[::1]:0"] {
            let addr: OptionalAddr = text.parse().unwrap();
            assert_eq!(addr.to_string(), text);
        }
        for text in ["9464", "localhost:9464", "127.0.0.1", " "] {
            assert!(text.parse::<OptionalAddr>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_read_as_they_are_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64KiB", 65536),
            ("3 MiB", 3 << 20),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize::new(bytes)), "{text}");
        }
        for text in ["", "KiB", "1.5GiB", "-1", "1GB", "99999999999TiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for bytes in [0, 1, 1024, 4097, 3 << 20, 5 << 40] {
            let size = ByteSize::new(bytes);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
    }

    #[test]
    fn lengths_of_time_have_a_unit_and_read_as_they_are_written() {
        for text in ["0s", "250ms", "15m", "1h 30m", "1day"] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.to_string(), text);
        }
        let eleven_digits = "10000000000ns";
        let long = "1s ".repeat(22);
        for text in ["15", "soon", "", "-1s", eleven_digits, &long, "1001y"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        for longest in [MAX_SPAN, MAX_SPAN - Duration::from_nanos(1)] {
            let text = Span(longest).to_string();
            assert_eq!(text.parse(), Ok(Span(longest)), "{text}");
        }
    }

    /// Found by fuzzing.
    #[test]
    fn a_sum_over_64_bits_of_seconds_is_refused() {
        for text in [
            "18446744073709551615s0.5s0.5s",
            "307445734561825860m 15s 0.5s 0.5s",
            "1844674407 3709551615s 0.5s 0.5s",
            "1844674407\r370955161 5s 0.5s 0.5s",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
