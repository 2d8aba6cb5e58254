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

/// The name of the layer of [`Origin::Standard`].
const STANDARD: &str = "standard";

struct Layer {
    origin: Origin,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        let origin = self.origin.clone();
        let name = match origin {
            Origin::Standard(_) => STANDARD,
            _ => "",
        };
        Metadata::named(name).interpolater(move |_: &Profile, keys: &[&str]| {
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
    defaults: Dict,
    figment: Figment,
    /// Keys whose value is text, whatever the key's type is.
    texts: BTreeSet<String>,
    /// Keys that could not be read: nothing more is said of them.
    unread: BTreeSet<&'static str>,
    problems: Vec<String>,
    /// Keys that a standard variable has set to what is of no use.
    passed_over: Vec<String>,
}

impl Layers {
    pub(crate) fn new(defaults: &impl Serialize, known: &'static [&'static str]) -> Self {
        let mut layers = Self {
            known,
            defaults: Dict::new(),
            figment: Figment::new(),
            texts: BTreeSet::new(),
            unread: BTreeSet::new(),
            problems: Vec::new(),
            passed_over: Vec::new(),
        };
        let defaults = Serialized::defaults(defaults).data();
        if let Ok(profiles) = &defaults {
            layers.defaults = profiles.get(&Profile::Default).cloned().unwrap_or_default();
        }
        layers.add(Origin::Default, defaults);
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

    /// Takes the values of variables that many programs heed. One that is empty or not UTF-8 is as good as none.
    pub(crate) fn add_standard(
        &mut self,
        variables: &'static [(&'static str, &'static str)],
        environment: &[(OsString, OsString)],
    ) {
        let values = variables.iter().filter_map(|(name, key)| {
            let (_, value) = environment.iter().find(|(given, _)| given == name)?;
            let value = value.to_str().filter(|value| !value.is_empty())?;
            Some(((*key).to_owned(), value.to_owned()))
        });
        self.add_texts(Origin::Standard(variables), values.collect());
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

    /// Puts the configuration together and checks it. A standard variable is meant for many programs: what is of no use
    /// to this one is passed over.
    pub(crate) fn settle<C>(
        &mut self,
        read: impl Fn(&mut Self) -> C,
        check: impl Fn(&C, &mut Rules),
    ) -> C {
        let so_far = self.problems.len();
        loop {
            let config = read(self);
            let mut rules = Rules::default();
            check(&config, &mut rules);
            self.add_broken(rules);
            if self.passed_over.is_empty() {
                return config;
            }
            self.problems.truncate(so_far);
            self.unread.clear();
            let keys = std::mem::take(&mut self.passed_over);
            let defaults = &self.defaults;
            let values = keys.into_iter().filter_map(|key| {
                let value = defaults.get(&key)?.clone();
                Some((key, value))
            });
            let values = Map::from([(Profile::Default, values.collect())]);
            self.add(Origin::Default, Ok(values));
        }
    }

    fn note(&mut self, key: &str, what: &str) {
        let origin = match self.figment.find_metadata(key) {
            Some(metadata) if metadata.name == STANDARD => {
                return self.passed_over.push(key.to_owned());
            }
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
