//! Which roles each call takes. What is not listed is refused; a test holds the list and the protocol together, and
//! another one `docs/SECURITY.md`.

use crate::role::{
    Role::{Operator, Restorer, Source, Viewer},
    Roles,
};

/// Who may make a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Whoever can connect, without any identity.
    Anybody,
    /// Every identity, whatever its roles.
    Known,
    /// An identity with one of these roles.
    Having(Roles),
}

/// What a call's request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sends {
    /// One message, which must arrive in time.
    One,
    /// A stream, whose pace the service itself watches over.
    Stream,
}

/// How long a call may take, once its request is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// It tells what there is.
    AMoment,
    /// As long as its work takes: whoever asked for it must hear what became of it. Or it is a stream.
    AsItTakes,
}

/// What one call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// As it is in the request: `/package.Service/Method`.
    pub path: &'static str,
    /// Who may make it.
    pub who: Who,
    /// How its request comes.
    pub sends: Sends,
    /// How long it may take.
    pub lasts: Lasts,
}

const fn look(path: &'static str, roles: Roles) -> Rule {
    Rule {
        path,
        who: Who::Having(roles),
        sends: Sends::One,
        lasts: Lasts::AMoment,
    }
}

const fn one(path: &'static str, roles: Roles) -> Rule {
    Rule {
        path,
        who: Who::Having(roles),
        sends: Sends::One,
        lasts: Lasts::AsItTakes,
    }
}

const fn stream(path: &'static str, roles: Roles) -> Rule {
    Rule {
        path,
        who: Who::Having(roles),
        sends: Sends::Stream,
        lasts: Lasts::AsItTakes,
    }
}

const fn health(path: &'static str) -> Rule {
    Rule {
        path,
        who: Who::Anybody,
        sends: Sends::One,
        lasts: Lasts::AMoment,
    }
}

const fn reflection(path: &'static str) -> Rule {
    Rule {
        path,
        who: Who::Known,
        sends: Sends::Stream,
        lasts: Lasts::AsItTakes,
    }
}

const SOURCES: Roles = Roles::of(&[Source]);
const RESTORERS: Roles = Roles::of(&[Restorer]);
const OPERATORS: Roles = Roles::of(&[Operator]);
const READERS: Roles = Roles::of(&[Restorer, Operator, Viewer]);
const AGENTS: Roles = Roles::of(&[Source, Operator]);

/// The rule of every call of both services.
pub const RULES: &[Rule] = &[
    one("/tidemark.vault.v1.Ingest/StartTerm", SOURCES),
    stream("/tidemark.vault.v1.Ingest/Ship", SOURCES),
    one("/tidemark.vault.v1.Ingest/MarkCurrent", SOURCES),
    one("/tidemark.vault.v1.Ingest/GetBlockDigests", SOURCES),
    look("/tidemark.vault.v1.Vault/ListVolumes", READERS),
    look("/tidemark.vault.v1.Vault/ListGenerations", READERS),
    look("/tidemark.vault.v1.Vault/GetGeneration", READERS),
    one("/tidemark.vault.v1.Vault/Restore", RESTORERS),
    one("/tidemark.vault.v1.Vault/Maintain", OPERATORS),
    one("/tidemark.vault.v1.Vault/Scrub", OPERATORS),
    look("/tidemark.vault.v1.Vault/GetStatus", READERS),
    one("/tidemark.capture.v1.Capture/AddVolume", OPERATORS),
    look("/tidemark.capture.v1.Capture/ListVolumes", READERS),
    look("/tidemark.capture.v1.Capture/GetVolume", READERS),
    one("/tidemark.capture.v1.Capture/RemoveVolume", OPERATORS),
    one("/tidemark.capture.v1.Capture/ReadoptVolume", OPERATORS),
    one("/tidemark.capture.v1.Capture/CreateSnapshot", OPERATORS),
    one("/tidemark.capture.v1.Capture/CreateSnapshots", OPERATORS),
    look("/tidemark.capture.v1.Capture/ListSnapshots", READERS),
    one("/tidemark.capture.v1.Capture/DeleteSnapshot", OPERATORS),
    one("/tidemark.capture.v1.Capture/ReadSnapshot", RESTORERS),
    one("/tidemark.capture.v1.Capture/RollbackVolume", OPERATORS),
    one("/tidemark.capture.v1.Capture/TriggerInterval", OPERATORS),
    one("/tidemark.capture.v1.Capture/ScrubVolume", OPERATORS),
    look("/tidemark.capture.v1.Capture/GetStatus", READERS),
    look("/tidemark.capture.v1.Capture/WatchStatus", READERS),
    stream("/tidemark.capture.v1.Coherence/Attach", AGENTS),
    health("/grpc.health.v1.Health/Check"),
    health("/grpc.health.v1.Health/List"),
    health("/grpc.health.v1.Health/Watch"),
    reflection("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    reflection("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
];

/// The rule of a call; none where there is no such call, as far as this release knows.
#[must_use]
pub fn rule(path: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.path == path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::role::Role;

    /// Every call of the protocol, and how its request comes.
    fn protocol() -> BTreeMap<String, Sends> {
        let set = FileDescriptorSet::decode(tidemark_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut calls = BTreeMap::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let sends = if method.client_streaming() {
                        Sends::Stream
                    } else {
                        Sends::One
                    };
                    calls.insert(path, sends);
                }
            }
        }
        calls
    }

    #[test]
    fn every_call_of_the_protocol_has_a_rule_and_no_rule_is_of_another() {
        let ours = RULES.iter().filter(|rule| rule.path.contains("tidemark."));
        let ruled: BTreeMap<_, _> = ours
            .map(|rule| (rule.path.to_owned(), rule.sends))
            .collect();
        assert_eq!(ruled, protocol());
        assert!(ruled.len() > 20);
    }

    #[test]
    fn every_call_of_the_protocol_takes_an_identity_with_a_role() {
        for rule in RULES.iter().filter(|rule| rule.path.contains("tidemark.")) {
            assert!(
                matches!(rule.who, Who::Having(roles) if roles != Roles::default()),
                "{rule:?}"
            );
        }
    }

    #[test]
    fn only_calls_that_change_nothing_are_given_up_when_they_take_long() {
        for rule in RULES.iter().filter(|rule| rule.lasts == Lasts::AMoment) {
            let call = rule.path.rsplit('/').next().unwrap();
            let looks = ["Get", "List", "Watch", "Check"];
            assert!(looks.iter().any(|verb| call.starts_with(verb)), "{call}");
        }
    }

    #[test]
    fn a_source_can_only_append() {
        let paths: Vec<_> = RULES
            .iter()
            .filter(|rule| matches!(rule.who, Who::Having(roles) if roles.has(Role::Source)))
            .map(|rule| rule.path.rsplit('.').next().unwrap())
            .collect();
        assert_eq!(
            paths,
            [
                "Ingest/StartTerm",
                "Ingest/Ship",
                "Ingest/MarkCurrent",
                "Ingest/GetBlockDigests",
                "Coherence/Attach"
            ]
        );
    }

    #[test]
    fn only_a_restorer_reads_content() {
        for path in [
            "/tidemark.vault.v1.Vault/Restore",
            "/tidemark.capture.v1.Capture/ReadSnapshot",
        ] {
            assert_eq!(rule(path).unwrap().who, Who::Having(RESTORERS));
        }
    }

    #[test]
    fn the_rules_are_as_documented() {
        let page = include_str!("../../../docs/SECURITY.md");
        let rows: Vec<Vec<&str>> = page
            .lines()
            .skip_while(|line| !line.starts_with("| call | source"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        let told: BTreeMap<_, _> = rows.iter().map(|row| (row[0], row[1..].to_vec())).collect();
        assert_eq!(rows.len(), told.len());
        let ruled = RULES.iter().filter_map(|rule| {
            let Who::Having(roles) = rule.who else {
                return None;
            };
            let call = rule.path.rsplit('.').next()?;
            let marks = Role::ALL.map(|role| if roles.has(role) { "yes" } else { "" });
            Some((call, marks.to_vec()))
        });
        let ruled: BTreeMap<_, _> = ruled
            .map(|(call, marks)| (format!("`{call}`"), marks))
            .collect();
        let ruled: BTreeMap<_, _> = ruled.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        assert_eq!(told, ruled);
    }

    #[test]
    fn what_is_not_listed_has_no_rule() {
        for path in [
            "",
            "/",
            "/tidemark.vault.v1.Vault/restore",
            "/tidemark.vault.v1.Vault/Restore/",
        ] {
            assert_eq!(rule(path), None);
        }
    }
}
