//! Whoever made a call, and whether the volume that it names is theirs.

use std::sync::Arc;

use tidemark_proto::{Reason, RpcError};

use crate::{identities::Identity, role::Role};

/// Whoever made a call.
#[derive(Debug, Clone)]
pub enum Caller {
    /// A process of this machine, or of a network without identities: it may do everything.
    Local,
    /// Somebody with a certificate or a token.
    Known(Arc<Identity>),
}

/// A volume is not theirs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Its patterns don't fit the volume.
    #[error("identity {name:?} has no rights to volume {volume:?} of source {source_name:?}")]
    Volume {
        /// Of the identity.
        name: String,
        /// The volume's name.
        volume: String,
        /// The source that the volume is of.
        source_name: String,
    },
}

impl From<Denied> for RpcError {
    fn from(denied: Denied) -> Self {
        let Denied::Volume {
            volume,
            source_name,
            ..
        } = &denied;
        let action = format!(
            "if that is meant, add \"{source_name}/{volume}\" to the volumes of this identity in the service's file of identities"
        );
        Self::new(Reason::PermissionDenied, denied.to_string(), action)
    }
}

impl Caller {
    /// For logs.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Local => "local",
            Self::Known(identity) => &identity.name,
        }
    }

    /// Whether it may see, read or look after a volume, as its roles have it.
    #[must_use]
    pub fn has(&self, source: &str, volume: &str) -> bool {
        match self {
            Self::Local => true,
            Self::Known(identity) => identity.volumes.iter().any(|p| p.fits(source, volume)),
        }
    }

    /// As [`Self::has`].
    ///
    /// # Errors
    /// It may not.
    pub fn need(&self, source: &str, volume: &str) -> Result<(), Denied> {
        self.unless_denied(self.has(source, volume), source, volume)
    }

    /// Whether it may write to a volume of this source, as a source does: to its own ones, and to others only where
    /// a pattern names their source.
    ///
    /// # Errors
    /// It may not.
    pub fn need_own(&self, source: &str, volume: &str) -> Result<(), Denied> {
        let is_own = match self {
            Self::Local => true,
            Self::Known(identity) => identity
                .volumes
                .iter()
                .any(|p| p.fits_own(&identity.name, source, volume)),
        };
        self.unless_denied(is_own, source, volume)
    }

    /// Whether it may speak for the workload of a volume: an operator of the volume, or the source that it is of.
    ///
    /// # Errors
    /// It may not.
    pub fn need_workload(&self, source: &str, volume: &str) -> Result<(), Denied> {
        match self {
            Self::Known(identity) if identity.roles().has(Role::Operator) => {
                self.need(source, volume)
            }
            _ => self.need_own(source, volume),
        }
    }

    /// The source that a volume is recorded under: the one that the caller claims to be where it may, else its own
    /// name.
    #[must_use]
    pub fn source_of(&self, claimed: String, volume: &str) -> String {
        match self {
            Self::Known(identity) if self.need_own(&claimed, volume).is_err() => {
                identity.name.clone()
            }
            _ => claimed,
        }
    }

    fn unless_denied(&self, may: bool, source: &str, volume: &str) -> Result<(), Denied> {
        if may {
            return Ok(());
        }
        Err(Denied::Volume {
            name: self.name().to_owned(),
            volume: volume.to_owned(),
            source_name: source.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(patterns: &[&str]) -> Caller {
        let patterns = patterns.iter().map(|p| p.parse().unwrap()).collect();
        Caller::Known(Arc::new(Identity::new("edge-7", &[Role::Source], patterns)))
    }

    #[test]
    fn a_source_writes_its_own_volumes_and_those_that_it_is_given_by_their_source() {
        let caller = known(&["data", "db-1/wal"]);
        assert!(caller.need_own("edge-7", "data").is_ok());
        assert!(caller.need_own("edge-7", "wal").is_err());
        assert!(caller.need_own("edge-8", "data").is_err());
        assert!(caller.need_own("db-1", "wal").is_ok());
        let error = RpcError::from(caller.need_own("edge-8", "data").unwrap_err());
        assert_eq!(error.reason, Reason::PermissionDenied);
        assert!(error.message.contains("\"edge-7\"") && error.message.contains("\"edge-8\""));
        assert!(error.action.contains("edge-8/data"));
    }

    #[test]
    fn a_source_is_recorded_as_itself_whatever_it_claims() {
        let caller = known(&["*", "db-1/wal"]);
        assert_eq!(caller.source_of("host".to_owned(), "data"), "edge-7");
        assert_eq!(caller.source_of("db-1".to_owned(), "wal"), "db-1");
        assert_eq!(caller.source_of("db-1".to_owned(), "data"), "edge-7");
        assert_eq!(Caller::Local.source_of("host".to_owned(), "data"), "host");
    }
}
