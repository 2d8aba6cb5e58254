//! What a store's failures mean.

use object_store::path::Path;
use thiserror::Error;

/// Why the store didn't do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No room.
    #[error("the store has no room for {0}")]
    Full(Path),
    /// The object isn't there.
    #[error("{0} is missing from the store")]
    Missing(Path),
    /// An object of this name is there already.
    #[error("{0} is in the store already")]
    Exists(Path),
    /// The object's bytes are not what was written.
    #[error("{path} is corrupt: {reason}")]
    Corrupt {
        /// Which.
        path: Path,
        /// In what way.
        reason: String,
    },
    /// Anything else.
    #[error("the store failed at {path}: {source}")]
    Failed {
        /// Where.
        path: Path,
        /// How.
        #[source]
        source: object_store::Error,
    },
}

impl StoreError {
    pub(super) fn of(path: &Path, error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => Self::Missing(path.clone()),
            object_store::Error::AlreadyExists { .. }
            | object_store::Error::Precondition { .. } => Self::Exists(path.clone()),
            error if is_full(&error) => Self::Full(path.clone()),
            source => Self::Failed {
                path: path.clone(),
                source,
            },
        }
    }

    /// The medium of a local store can't read the object: a bad sector, not a store that is away.
    pub(crate) fn is_unreadable(&self) -> bool {
        let Self::Failed { source, .. } = self else {
            return false;
        };
        io_error(source).and_then(std::io::Error::raw_os_error)
            == Some(rustix::io::Errno::IO.raw_os_error())
    }

    pub(super) fn corrupt(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Corrupt {
            path: path.clone(),
            reason: reason.to_string(),
        }
    }
}

fn is_full(error: &object_store::Error) -> bool {
    io_error(error).is_some_and(|io| {
        matches!(
            io.kind(),
            std::io::ErrorKind::StorageFull
                | std::io::ErrorKind::QuotaExceeded
                | std::io::ErrorKind::FileTooLarge
        )
    })
}

/// What the system said, where the failure came from it.
fn io_error(error: &object_store::Error) -> Option<&std::io::Error> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        source = error.source();
    }
    None
}

/// What a failed read of a range means.
pub(super) fn short_or(path: &Path, error: object_store::Error) -> StoreError {
    // A range behind the end of an object: the object was cut short.
    match error {
        object_store::Error::Generic { ref source, .. } if source.to_string().contains("range") => {
            StoreError::corrupt(path, "it is cut short")
        }
        error => StoreError::of(path, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_sector_is_told_from_a_store_that_is_away() {
        let path = Path::from("a");
        let failed = |source: std::io::Error| {
            let source = object_store::Error::Generic {
                store: "local",
                source: source.into(),
            };
            StoreError::of(&path, source)
        };
        assert!(failed(std::io::Error::from_raw_os_error(5)).is_unreadable());
        assert!(!failed(std::io::ErrorKind::ConnectionRefused.into()).is_unreadable());
        assert!(!StoreError::Missing(path.clone()).is_unreadable());
        let full = failed(std::io::ErrorKind::StorageFull.into());
        assert!(matches!(full, StoreError::Full(_)), "{full}");
    }
}
