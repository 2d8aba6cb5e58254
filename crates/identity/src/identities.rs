//! The operator's file of identities: which roles a name has, and for which volumes.
//!
//! ```toml
//! [[identity]]
//! name = "edge-7"
//! roles = ["source"]
//! volumes = ["*"]
//! ```

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    pattern::Pattern,
    role::{Role, Roles},
    token::TokenHash,
};

/// The most identities of a file, and patterns of an identity: whoever needs more writes patterns with stars.
const IDENTITIES_MAX: usize = 10_000;
const PATTERNS_MAX: usize = 256;
/// As long as the name of a source may be.
const NAME_BYTES_MAX: usize = 255;

/// Somebody who may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// As the certificate has it: its URI, else its first DNS name. For who comes with a token any name.
    pub name: String,
    roles: Vec<Role>,
    /// Which volumes the roles hold for.
    pub volumes: Vec<Pattern>,
    /// The SHA-256 of the token that is this identity, beside or in place of a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_sha256: Option<TokenHash>,
}

impl Identity {
    /// Somebody who comes with a certificate.
    #[must_use]
    pub fn new(name: impl Into<String>, roles: &[Role], volumes: Vec<Pattern>) -> Self {
        Self {
            name: name.into(),
            roles: roles.to_vec(),
            volumes,
            token_sha256: None,
        }
    }

    /// What they are.
    #[must_use]
    pub fn roles(&self) -> Roles {
        Roles::of(&self.roles)
    }
}

/// What is wrong with a file of identities, all of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("; "))]
pub struct IdentitiesError {
    /// Each names its identity.
    pub problems: Vec<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    identity: Vec<Identity>,
}

/// Everybody who may call.
#[derive(Debug, Clone, Default)]
pub struct Identities {
    by_name: BTreeMap<String, Arc<Identity>>,
}

impl Identities {
    /// Reads a file of them.
    ///
    /// # Errors
    /// Everything that is wrong with it, together; what is no TOML or has an unknown key hides the rest.
    pub fn parse(text: &str) -> Result<Self, IdentitiesError> {
        let file: File = toml::from_str(text).map_err(|error| IdentitiesError {
            problems: vec![error.to_string().trim_end().to_owned()],
        })?;
        Self::of(file.identity)
    }

    /// These.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub fn of(identities: Vec<Identity>) -> Result<Self, IdentitiesError> {
        let mut problems = Vec::new();
        if identities.len() > IDENTITIES_MAX {
            problems.push(format!("there are more than {IDENTITIES_MAX} identities"));
        }
        let mut by_name = BTreeMap::new();
        let mut tokens = BTreeMap::new();
        for identity in identities {
            let name = identity.name.clone();
            problems.extend(wrong_with(&identity).map(|what| format!("identity {name:?}: {what}")));
            if let Some(token) = identity.token_sha256
                && let Some(other) = tokens.insert(token.to_hex(), name.clone())
            {
                problems.push(format!("identity {name:?}: its token is that of {other:?}"));
            }
            if by_name.insert(name.clone(), Arc::new(identity)).is_some() {
                problems.push(format!("identity {name:?}: it is there twice"));
            }
        }
        if problems.is_empty() {
            Ok(Self { by_name })
        } else {
            Err(IdentitiesError { problems })
        }
    }

    /// As a file, in the order of the names.
    ///
    /// # Panics
    /// Never: texts and lists of texts have a form in TOML.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let file = File {
            identity: self.by_name.values().map(|i| Identity::clone(i)).collect(),
        };
        toml::to_string(&file).expect("texts and lists of texts have a form in TOML")
    }

    /// The identity of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<&Arc<Identity>> {
        self.by_name.get(name)
    }

    /// The identity that has this token. Compares with all of them, so that the time tells nothing.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Option<&Arc<Identity>> {
        let shown = TokenHash::of(token);
        let mut found = None;
        for identity in self.by_name.values() {
            if identity.token_sha256.is_some_and(|kept| kept.is(&shown)) {
                found = Some(identity);
            }
        }
        found
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is nobody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Puts one in, in the place of the one of its name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn put(&mut self, identity: Identity) -> Result<(), IdentitiesError> {
        let others = self.by_name.values().filter(|i| i.name != identity.name);
        let mut all: Vec<_> = others.map(|i| Identity::clone(i)).collect();
        all.push(identity);
        *self = Self::of(all)?;
        Ok(())
    }
}

fn wrong_with(identity: &Identity) -> impl Iterator<Item = String> {
    let name_is_good = !identity.name.is_empty()
        && identity.name.len() <= NAME_BYTES_MAX
        && !identity.name.contains(char::is_control);
    let name = (!name_is_good)
        .then(|| format!("a name has 1 to {NAME_BYTES_MAX} bytes and no control characters"));
    let roles = identity
        .roles
        .is_empty()
        .then(|| "it has no roles: give it some of source, restorer, operator, viewer".to_owned());
    let volumes = identity
        .volumes
        .is_empty()
        .then(|| "it has no volumes: \"*\" stands for all".to_owned());
    let many = (identity.volumes.len() > PATTERNS_MAX)
        .then(|| format!("it has more than {PATTERNS_MAX} patterns of volumes"));
    [name, roles, volumes, many].into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
[[identity]]
name = "edge-7"
roles = ["source"]
volumes = ["data", "db-*"]

[[identity]]
name = "desk"
roles = ["restorer", "viewer"]
volumes = ["edge-7/*"]
token_sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"#;

    #[test]
    fn a_file_reads_as_it_is_written() {
        let read = Identities::parse(TWO).unwrap();
        assert_eq!(read.len(), 2);
        let edge = read.named("edge-7").unwrap();
        assert!(edge.roles().has(Role::Source) && !edge.roles().has(Role::Viewer));
        assert!(edge.volumes[1].fits_own("edge-7", "edge-7", "db-1"));
        let again = Identities::parse(&read.to_toml()).unwrap();
        assert_eq!(again.to_toml(), read.to_toml());
    }

    #[test]
    fn a_token_is_its_identity_and_no_other() {
        let read = Identities::parse(TWO).unwrap();
        assert_eq!(read.with_token("abc").unwrap().name, "desk");
        assert!(read.with_token("abd").is_none());
        assert!(read.with_token("").is_none());
        assert!(read.named("nobody").is_none());
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_once() {
        let text = r#"
[[identity]]
name = "a"
roles = []
volumes = []

[[identity]]
name = ""
roles = ["viewer"]
volumes = ["*"]

[[identity]]
name = "a"
roles = ["viewer"]
volumes = ["*"]
"#;
        let problems = Identities::parse(text).unwrap_err().problems;
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems[0].contains("\"a\"") && problems[0].contains("no roles"));
        assert!(problems[1].contains("no volumes"));
        assert!(problems[2].contains("1 to 255"));
        assert!(problems[3].contains("twice"));
    }

    #[test]
    fn a_token_of_two_is_refused() {
        let mut read = Identities::parse(TWO).unwrap();
        let mut other = Identity::new("other", &[Role::Viewer], vec!["*".parse().unwrap()]);
        other.token_sha256 = Some(TokenHash::of("abc"));
        let problems = read.put(other).unwrap_err().problems;
        assert!(problems[0].contains("its token is that of"), "{problems:?}");
        assert_eq!(read.len(), 2);
    }

    #[test]
    fn a_role_a_key_or_a_pattern_that_is_none_is_refused_by_name() {
        for (text, told) in [
            ("name = 'a'\nroles = ['root']\nvolumes = ['*']", "root"),
            ("name = 'a'\nroles = ['viewer']\nvolume = ['*']", "volume"),
            ("name = 'a'\nroles = ['viewer']\nvolumes = ['/']", "pattern"),
            (
                "name = 'a'\nroles = ['viewer']\nvolumes = ['*']\ntoken_sha256 = 'abc'",
                "64 hexadecimal",
            ),
        ] {
            let error = Identities::parse(&format!("[[identity]]\n{text}\n")).unwrap_err();
            assert!(error.to_string().contains(told), "{error}");
        }
    }

    #[test]
    fn putting_one_in_takes_the_place_of_its_name() {
        let mut read = Identities::parse(TWO).unwrap();
        read.put(Identity::new(
            "edge-7",
            &[Role::Viewer],
            vec!["*".parse().unwrap()],
        ))
        .unwrap();
        assert_eq!(read.len(), 2);
        assert!(read.named("edge-7").unwrap().roles().has(Role::Viewer));
    }
}
