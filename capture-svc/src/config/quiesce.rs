//! What quiesces one volume, where that is not what quiesces all of them.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned, de::Error as _};
use tidemark_config::Span;

use super::{CommandLine, Config, QuiesceFailure};

/// What was given for one volume; what was not is as for all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct VolumeQuiesce {
    #[serde(skip_serializing_if = "Option::is_none")]
    pre: Option<CommandLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    post: Option<CommandLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<QuiesceFailure>,
}

/// Names of volumes with what quiesces them; by default none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Quiesces(BTreeMap<String, VolumeQuiesce>);

/// How a volume is quiesced, all told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quiescing<'a> {
    pub(crate) pre: &'a CommandLine,
    pub(crate) post: &'a CommandLine,
    pub(crate) timeout: Duration,
    pub(crate) failure: QuiesceFailure,
}

impl Config {
    /// What holds for a volume.
    pub(crate) fn quiescing(&self, volume: &str) -> Quiescing<'_> {
        let own = self.quiesce.0.get(volume);
        Quiescing {
            pre: own
                .and_then(|own| own.pre.as_ref())
                .unwrap_or(&self.quiesce_pre),
            post: own
                .and_then(|own| own.post.as_ref())
                .unwrap_or(&self.quiesce_post),
            timeout: own
                .and_then(|own| own.timeout)
                .unwrap_or(self.quiesce_timeout)
                .get(),
            failure: own
                .and_then(|own| own.failure)
                .unwrap_or(self.quiesce_failure),
        }
    }
}

/// The keys of a volume, as they stand.
type Fields = BTreeMap<String, toml::Value>;

fn take<T: DeserializeOwned>(
    name: &str,
    value: toml::Value,
    problems: &mut Vec<String>,
) -> Option<T> {
    let stated = value.to_string();
    let taken = value.try_into();
    taken
        .map_err(|error: toml::de::Error| {
            problems.push(format!("{name} = {stated}: {}", error.message()));
        })
        .ok()
}

impl VolumeQuiesce {
    fn of(volume: &str, fields: Fields, problems: &mut Vec<String>) -> Self {
        let mut own = Self::default();
        for (key, value) in fields {
            let name = format!("{volume}.{key}");
            match key.as_str() {
                "pre" => own.pre = take(&name, value, problems),
                "post" => own.post = take(&name, value, problems),
                "timeout" => own.timeout = take(&name, value, problems),
                "failure" => own.failure = take(&name, value, problems),
                _ => problems.push(format!(
                    "{name} = {value}: no such key; there are pre, post, timeout and failure"
                )),
            }
        }
        let empty = |command: &Option<CommandLine>| command.as_ref().map(CommandLine::is_empty);
        if empty(&own.pre) != empty(&own.post) {
            problems.push(format!(
                "{volume}.pre must be given together with {volume}.post: what freezes must be let go on"
            ));
        }
        if own.timeout.is_some_and(Span::is_zero) {
            problems.push(format!("{volume}.timeout must be above 0s"));
        }
        own
    }
}

impl<'de> Deserialize<'de> for Quiesces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no volumes with their keys: write [quiesce.VOLUME] and pre, post, timeout or failure below it, or \
                         in one line { VOLUME = { pre = \"COMMAND\", post = \"COMMAND\" } }"
        )]
        enum Raw {
            Text(String),
            Table(BTreeMap<String, Fields>),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Table(volumes) => Self::checked(volumes),
            Raw::Text(text) => text.parse(),
        }
        .map_err(D::Error::custom)
    }
}

impl FromStr for Quiesces {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::checked(read(text)?)
    }
}

impl Quiesces {
    /// All that is wrong is told at once.
    fn checked(volumes: BTreeMap<String, Fields>) -> Result<Self, String> {
        let mut problems = Vec::new();
        let each = volumes.into_iter().map(|(volume, fields)| {
            let own = VolumeQuiesce::of(&volume, fields, &mut problems);
            (volume, own)
        });
        let checked = Self(each.collect());
        if problems.is_empty() {
            Ok(checked)
        } else {
            Err(problems.join("; "))
        }
    }
}

/// Of a line, as an environment variable or a flag has it: a table of TOML, with or without its braces.
fn read(text: &str) -> Result<BTreeMap<String, Fields>, String> {
    let text = text.trim();
    let read = if text.starts_with('{') {
        let all: Result<BTreeMap<String, _>, _> = toml::from_str(&format!("all = {text}"));
        all.map(|mut all| all.remove("all").unwrap_or_default())
    } else {
        toml::from_str(text)
    };
    read.map_err(|error| {
        format!(
            "{}: write {{ VOLUME = {{ pre = \"COMMAND\", post = \"COMMAND\" }} }}",
            error.message()
        )
    })
}
