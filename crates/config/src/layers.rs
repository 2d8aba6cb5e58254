//! The layers that a configuration is put together from, and what is wrong with them.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Serialized, Toml},
    value::{Dict, Map, Value},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::Rules;

/// Where a value came from.
#[derive(Debug, Clone)]
enum Origin {
    Default,
    /// Variables that many programs heed, each for the key that it sets.
    Standard(&'static [(&'static str, &'static str)]),
    File(PathBuf),
    Environment(&'static str),
    Flags,
}

impl Origin {
    /// What a person has to look at to change the key.
    fn of(&self, key: &str) -> String {
        match self {
            Self::Default => "the default".to_owned(),
            Self::Standard(variables) => {
                let variable = variables.iter().find(|(_, set)| *set == key);
                variable
                    .map_or("the environment", |(name, _)| name)
                    .to_owned()
            }
            Self::File(path) => path.display().to_string(),
            Self::Environment(prefix) => format!("{prefix}{}", key.to_ascii_uppercase()),
            Self::Flags => format!("--{}", key.replace('_', "-")),
        }
    }
}

struct Layer {
    origin: Origin,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        let origin = self.origin.clone();
        Metadata::default().interpolater(move |_: &Profile, keys: &[&str]| {
            origin.of(keys.first().copied().unwrap_or_default())
        })
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// The layers so far, later ones over earlier ones, and the problems found in them.
#[derive(Debug)]
pub struct Layers {
    known: &'static [&'static str],
    figment: Figment,
    /// Keys whose value is text, whatever the key's type is.
    texts: BTreeSet<String>,
    /// Keys that could not be read: nothing more is said of them.
    unread: BTreeSet<&'static str>,
    problems: Vec<String>,
}

impl Layers {
    pub(crate) fn new(defaults: &impl Serialize, known: &'static [&'static str]) -> Self {
        let mut layers = Self {
            known,
            figment: Figment::new(),
            texts: BTreeSet::new(),
            unread: BTreeSet::new(),
            problems: Vec::new(),
        };
        layers.add(Origin::Default, Serialized::defaults(defaults).data());
        layers
    }

    pub(crate) fn add_file(&mut self, path: &Path) {
        match fs::read_to_string(path) {
            Ok(text) => self.add(Origin::File(path.to_owned()), Toml::string(&text).data()),
            Err(error) => self.problems.push(format!(
                "the configuration file {} can't be read: {error}",
                path.display()
            )),
        }
    }

    /// Takes the values of variables that many programs heed. An empty one is as good as none.
    pub(crate) fn add_standard(
        &mut self,
        variables: &'static [(&'static str, &'static str)],
        environment: &[(OsString, OsString)],
    ) {
        let origin = Origin::Standard(variables);
        let mut values = Vec::new();
        for (name, key) in variables {
            let given = environment.iter().find(|(given, _)| given == name);
            match given.map(|(_, value)| value.to_str().ok_or(value)) {
                Some(Ok("")) | None => {}
                Some(Ok(value)) => values.push(((*key).to_owned(), value.to_owned())),
                Some(Err(value)) => self.problems.push(format!(
                    "{key} = {value:?} ({}): isn't UTF-8",
                    origin.of(key)
                )),
            }
        }
        self.add_texts(origin, values);
    }

    pub(crate) fn add_environment(
        &mut self,
        prefix: &'static str,
        is_foreign: fn(&str) -> bool,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) {
        let mut values = Vec::new();
        for (name, value) in environment {
            let Some(key) = name.to_str().and_then(|name| name.strip_prefix(prefix)) else {
                continue;
            };
            let key = key.to_ascii_lowercase();
            if key == "config" || is_foreign(&key) {
                continue;
            }
            match value.into_string() {
                Ok(value) => values.push((key, value)),
                Err(value) => self.problems.push(format!(
                    "{key} = {value:?} ({}): isn't UTF-8",
                    Origin::Environment(prefix).of(&key)
                )),
            }
        }
        self.add_texts(Origin::Environment(prefix), values);
    }

    pub(crate) fn add_flags(&mut self, given: Vec<(&'static str, String)>) {
        let given = given
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value));
        self.add_texts(Origin::Flags, given.collect());
    }

    fn add_texts(&mut self, origin: Origin, texts: Vec<(String, String)>) {
        self.texts.extend(texts.iter().map(|(key, _)| key.clone()));
        let texts = texts
            .into_iter()
            .map(|(key, text)| (key, Value::from(text)));
        let values = Map::from([(Profile::Default, texts.collect())]);
        self.add(origin, Ok(values));
    }

    fn add(&mut self, origin: Origin, values: figment::Result<Map<Profile, Dict>>) {
        let values = match values {
            Ok(mut profiles) => profiles.remove(&Profile::Default).unwrap_or_default(),
            Err(error) => {
                let told = error.to_string().trim_end().replace('\n', "\n    ");
                return self.problems.push(format!("{}: {told}", origin.of("")));
            }
        };
        for (key, value) in &values {
            if !self.known.contains(&key.as_str()) {
                self.problems.push(format!(
                    "{}: no such key; --print-config shows those there are",
                    stated(key, value, &origin.of(key))
                ));
            }
        }
        let figment = std::mem::take(&mut self.figment);
        self.figment = figment.merge(Layer { origin, values });
    }

    /// The value of a key, unless it can't be read; that is then noted.
    pub fn read<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        let value = if self.texts.contains(key) {
            self.figment.extract_inner_lossy(key)
        } else {
            self.figment.extract_inner(key)
        };
        value
            .map_err(|errors| {
                for error in errors {
                    self.note(key, &error.kind.to_string());
                }
                self.unread.insert(key);
            })
            .ok()
    }

    pub(crate) fn add_broken(&mut self, rules: Rules) {
        for (key, what) in rules.into_broken() {
            if !self.unread.contains(key) {
                self.note(key, &what);
            }
        }
    }

    fn note(&mut self, key: &str, what: &str) {
        let origin = match self.figment.find_metadata(key) {
            Some(metadata) => metadata.interpolate(&Profile::Default, &[key]),
            None => Origin::Default.of(key),
        };
        let stated = match self.figment.find_value(key) {
            Ok(value) => stated(key, &value, &origin),
            Err(_) => format!("{key} ({origin})"),
        };
        self.problems.push(format!("{stated}: {what}"));
    }

    pub(crate) fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

fn stated(key: &str, value: &Value, origin: &str) -> String {
    match toml::Value::try_from(value) {
        Ok(value) => format!("{key} = {value} ({origin})"),
        Err(_) => format!("{key} ({origin})"),
    }
}
