//! What somebody may be.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an identity is for. An identity may have several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Ships the intervals of its own volumes, and nothing else: it can't read, retire or hold what a vault keeps.
    Source,
    /// Reads the content of generations and snapshots.
    Restorer,
    /// Looks after volumes: adds and removes them, cuts, scrubs, retires. Reads no content.
    Operator,
    /// Sees what there is, and how it does. Reads no content.
    Viewer,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Source, Self::Restorer, Self::Operator, Self::Viewer];

    /// As it is written in the file of identities.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Restorer => "restorer",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }

    /// The role of this name.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Roles(u8);

impl Roles {
    /// These.
    #[must_use]
    pub const fn of(roles: &[Role]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < roles.len() {
            bits |= 1 << roles[at] as u8;
            at += 1;
        }
        Self(bits)
    }

    /// Whether a role is among them.
    #[must_use]
    pub const fn has(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
    }

    /// Whether both sets have a role in common.
    #[must_use]
    pub const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// In the order of [`Role::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(move |role| self.has(*role))
    }
}

impl fmt::Display for Roles {
    /// `source, viewer`, or `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("none");
        }
        for (n, role) in self.iter().enumerate() {
            write!(f, "{}{role}", if n > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_it_was_made_of_and_nothing_else() {
        let set = Roles::of(&[Role::Viewer, Role::Source]);
        let has: Vec<_> = set.iter().collect();
        assert_eq!(has, [Role::Source, Role::Viewer]);
        assert_eq!(set.to_string(), "source, viewer");
        assert!(set.meets(Roles::of(&[Role::Viewer, Role::Operator])));
        assert!(!set.meets(Roles::of(&[Role::Restorer, Role::Operator])));
        assert_eq!(Roles::default().to_string(), "none");
    }

    #[test]
    fn roles_are_known_by_their_names() {
        for role in Role::ALL {
            assert_eq!(Role::named(role.as_str()), Some(role));
        }
        assert_eq!(Role::named("root"), None);
    }
}
