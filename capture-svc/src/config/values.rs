//! Values of keys as people write them: `give-up`, `unix:/run/nbd.sock`.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc};

use cronexpr::{Crontab, jiff::Timestamp};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A closed list of words.
macro_rules! kebab {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl $name {
            /// As it is written in the configuration.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// What is written so; none where nothing is.
            #[must_use]
            pub fn named(text: &str) -> Option<Self> {
                [$(Self::$variant,)*].into_iter().find(|value| value.as_str() == text)
            }
        }
    };
}
pub(super) use kebab;

/// Where the NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdListen {
    /// A unix socket, by absolute path.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl FromStr for NbdListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || {
            format!("\"{text}\" is no NBD address: write unix:/ABSOLUTE/PATH or tcp:ADDRESS:PORT")
        };
        match text.split_once(':') {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => address.parse().map(Self::Tcp).map_err(|_| error()),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for NbdListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Any number of NBD addresses: a list, or a text with commas.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NbdListens(pub Vec<NbdListen>);

impl Serialize for NbdListens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(ToString::to_string))
    }
}

impl<'de> Deserialize<'de> for NbdListens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no NBD addresses: write [\"unix:/ABSOLUTE/PATH\", \"tcp:ADDRESS:PORT\"]"
        )]
        enum Raw {
            Text(String),
            List(Vec<String>),
        }
        let texts = match Raw::deserialize(deserializer)? {
            Raw::Text(text) => text.split(',').map(|t| t.trim().to_owned()).collect(),
            Raw::List(texts) => texts,
        };
        texts
            .iter()
            .filter(|text| !text.is_empty())
            .map(|text| text.parse().map_err(D::Error::custom))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A command to run: a line for the shell, or a program and its arguments; by default none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandLine(Command);

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Command {
    Shell(String),
    Program(Vec<String>),
}

impl Default for Command {
    fn default() -> Self {
        Self::Shell(String::new())
    }
}

impl CommandLine {
    /// Whether there is nothing to run.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            Command::Shell(line) => line.trim().is_empty(),
            Command::Program(words) => words.is_empty(),
        }
    }

    /// The program and its arguments.
    #[must_use]
    pub fn words(&self) -> Vec<&str> {
        match &self.0 {
            Command::Shell(line) => vec!["/bin/sh", "-c", line],
            Command::Program(words) => words.iter().map(String::as_str).collect(),
        }
    }
}

impl From<&str> for CommandLine {
    fn from(line: &str) -> Self {
        Self(Command::Shell(line.to_owned()))
    }
}

impl Serialize for CommandLine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for CommandLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no command: write \"a line for the shell\", or [\"/program\", \"argument\"]"
        )]
        enum Raw {
            Shell(String),
            Program(Vec<String>),
        }
        Ok(Self(match Raw::deserialize(deserializer)? {
            Raw::Shell(line) => Command::Shell(line),
            Raw::Program(words) => Command::Program(words),
        }))
    }
}

/// Times to cut at: five fields of cron and a time zone; by default none.
#[derive(Debug, Clone, Default)]
pub struct Schedule {
    text: String,
    times: Option<Arc<Crontab>>,
}

impl Schedule {
    /// The first of its times after this one, both in milliseconds since the Unix epoch; none where there is none.
    #[must_use]
    pub fn next_after(&self, now_ms: u64) -> Option<u64> {
        let now = Timestamp::from_millisecond(i64::try_from(now_ms).ok()?).ok()?;
        let next = self.times.as_ref()?.find_next(now).ok()?;
        u64::try_from(next.timestamp().as_millisecond()).ok()
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Schedule {}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let times = cronexpr::parse_crontab(text).map_err(|_| {
            format!(
                "\"{text}\" is no schedule: write minute, hour, day of month, month, day of week and a time zone, \
                 as in 0 3 * * * Europe/Berlin"
            )
        })?;
        Ok(Self {
            text: text.to_owned(),
            times: Some(Arc::new(times)),
        })
    }
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.text.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}
