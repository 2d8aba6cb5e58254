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

    pub(super) fn corrupt(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Corrupt {
            path: path.clone(),
            reason: reason.to_string(),
        }
    }
}

fn is_full(error: &object_store::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return matches!(
                io.kind(),
                std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::QuotaExceeded
                    | std::io::ErrorKind::FileTooLarge
            );
        }
        source = error.source();
    }
    false
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
