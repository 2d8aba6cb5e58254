//! How a service is configured: defaults → standard variables → TOML file → environment → flags, checked as a whole.
//!
//! Each key is listed once, in [`settings!`]: field, flag, environment variable and `--print-config` follow from it.
//! An unknown key is an error wherever it stands, because a misspelt limit that is silently ignored is found out when
//! it is needed. All that is wrong is told at once, each mistake with its key, its value and where that came from.

mod layers;
mod rules;
mod values;

use std::{ffi::OsString, fmt, path::Path};

use serde::Serialize;

pub use layers::Layers;
pub use rules::Rules;
pub use values::{ByteSize, OptionalAddr, Span};

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Each names its key, its value and where that came from.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the configuration has {} problem(s):",
            self.problems.len()
        )?;
        self.problems
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for ConfigError {}

/// What [`settings!`] makes of a list of keys.
pub trait Keys: Default + Serialize {
    /// One flag per key.
    type Flags;
    /// Every key, in the order in which they are shown.
    const KEYS: &'static [&'static str];

    /// The flags that were given.
    fn given(flags: Self::Flags) -> Vec<(&'static str, String)>;

    /// Reads every key; one that can't be read gets its default, and is noted as a problem.
    fn read(layers: &mut Layers) -> Self;
}

/// The configuration of a service.
pub trait Settings: Keys {
    /// What the names of its environment variables begin with.
    const PREFIX: &'static str;

    /// Variables without the prefix that many programs heed, each with the key that it sets. The file wins over them, and
    /// so does whatever wins over the file. What this service can't use of them is passed over.
    const STANDARD: &'static [(&'static str, &'static str)] = &[];

    /// Whether a variable that shares the prefix is none of ours to judge; `key` is in lower case and without it.
    /// `config`, the path of the file, never gets here.
    fn is_foreign(key: &str) -> bool;

    /// Checks what the types don't.
    fn check(&self, rules: &mut Rules);

    /// Puts the configuration together; `environment` is that of the process.
    ///
    /// # Errors
    /// Every unknown key, every value that can't be read and every value out of range, together.
    fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        flags: Self::Flags,
    ) -> Result<Self, ConfigError> {
        let environment: Vec<_> = environment.into_iter().collect();
        let mut layers = Layers::new(&Self::default(), Self::KEYS);
        layers.add_standard(Self::STANDARD, &environment);
        if let Some(path) = file {
            layers.add_file(path);
        }
        layers.add_environment(Self::PREFIX, Self::is_foreign, environment);
        layers.add_flags(Self::given(flags));
        let config = layers.settle(Self::read, Self::check);
        failing_with(layers.into_problems()).map(|()| config)
    }

    /// Checks a configuration that was not loaded but made.
    ///
    /// # Errors
    /// Every value that is out of range or contradicts another.
    fn validate(&self) -> Result<(), ConfigError> {
        let mut rules = Rules::default();
        self.check(&mut rules);
        let named = |(key, what)| format!("{key}: {what}");
        failing_with(rules.into_broken().map(named).collect())
    }

    /// As TOML, every key with its value.
    ///
    /// # Panics
    /// Never, for a configuration that was loaded: what was text has a form in TOML.
    fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers, texts and lists of texts have a form in TOML")
    }
}

fn failing_with(problems: Vec<String>) -> Result<(), ConfigError> {
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ConfigError { problems })
    }
}

/// Lists the keys of a service, each as `/// what it is` and `key: Type = default;`. Makes `Config`, with a field per
/// key, and `Flags`, with a flag per key for `clap`. The crate that calls it has `clap` and `serde`.
#[macro_export]
macro_rules! settings {
    ($($(#[$doc:meta])* $key:ident: $type:ty = $default:expr;)*) => {
        /// The configuration of the service; see each key.
        #[derive(Debug, Clone, PartialEq, Eq, ::serde::Serialize)]
        pub struct Config {
            $($(#[$doc])* pub $key: $type,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }

        /// One flag per key of [`Config`]; a flag that isn't given changes nothing.
        #[derive(Debug, Clone, Default, ::clap::Args)]
        pub struct Flags {
            $($(#[$doc])* #[arg(long, value_name = "VALUE")] $key: Option<String>,)*
        }

        impl $crate::Keys for Config {
            type Flags = Flags;
            const KEYS: &'static [&'static str] = &[$(stringify!($key),)*];

            fn given(flags: Flags) -> Vec<(&'static str, String)> {
                [$((stringify!($key), flags.$key),)*]
                    .into_iter()
                    .filter_map(|(key, value)| Some((key, value?)))
                    .collect()
            }

            fn read(layers: &mut $crate::Layers) -> Self {
                Self {
                    $($key: layers.read(stringify!($key)).unwrap_or_else(|| $default),)*
                }
            }
        }
    };
}

#[cfg(test)]
mod tests;
