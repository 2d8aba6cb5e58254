//! How far the tracking can be trusted when a volume is opened: the part that needs no reading of the volume.

use super::records::{FileIdentity, Identity, Place};

/// What the identities tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Mapped files and volume are as the last process left them, unless recorded blocks say otherwise.
    Exact {
        /// It was closed cleanly.
        clean: bool,
    },
    /// What was not synced may be lost.
    PowerLoss,
    /// It is not the same volume file, or somebody else wrote to it.
    Everything(&'static str),
}

/// Compares the identity that was recorded with the file and the state directory that were found.
#[must_use]
pub fn judge(recorded: &Identity, found: &FileIdentity, state: &Place) -> Judgement {
    let was = &recorded.file;
    if was.filesystem != found.filesystem {
        return Judgement::Everything("the volume file lies on another filesystem than before");
    }
    if was.inode != found.inode {
        return Judgement::Everything("the volume file was replaced by another file");
    }
    if recorded.clean {
        let untouched = (was.modified_s, was.modified_ns) == (found.modified_s, found.modified_ns);
        return if untouched {
            Judgement::Exact { clean: true }
        } else {
            Judgement::Everything("the volume file was modified while the service was stopped")
        };
    }
    if was.boot != found.boot || was.mount != found.mount {
        return Judgement::PowerLoss;
    }
    if was.device != found.device {
        return Judgement::Everything("the volume file lies on another device than before");
    }
    if recorded.failed || recorded.state != *state {
        return Judgement::PowerLoss;
    }
    Judgement::Exact { clean: false }
}

#[cfg(test)]
mod tests {
    use tidemark_block::{BlockSize, Geometry, VolumeId};

    use super::*;

    #[test]
    fn tracking_is_trusted_only_as_far_as_the_identity_allows() {
        let file = FileIdentity {
            boot: [1; 16],
            mount: 2,
            filesystem: [3; 16],
            device: 4,
            inode: 5,
            modified_s: 6,
            modified_ns: 7,
        };
        let state = Place {
            mount: 8,
            filesystem: [9; 16],
            device: 10,
        };
        let judge = |recorded: &Identity, found: &FileIdentity| judge(recorded, found, &state);
        let running = Identity {
            volume: VolumeId::from_bytes([9; 16]),
            geometry: Geometry::new(1 << 20, BlockSize::MIN).unwrap(),
            clean: false,
            failed: false,
            epoch_limit: 8,
            file,
            state,
        };
        let clean = Identity {
            clean: true,
            ..running
        };
        let exact = |clean| Judgement::Exact { clean };
        let everything = |judgement: Judgement| matches!(judgement, Judgement::Everything(_));

        assert_eq!(judge(&running, &file), exact(false));
        assert_eq!(judge(&clean, &file), exact(true));
        // A running service modifies its file, so that the time says nothing.
        assert_eq!(
            judge(
                &running,
                &FileIdentity {
                    modified_ns: 8,
                    ..file
                }
            ),
            exact(false)
        );
        assert!(everything(judge(
            &clean,
            &FileIdentity {
                modified_ns: 8,
                ..file
            }
        )));
        for found in [
            FileIdentity {
                boot: [2; 16],
                ..file
            },
            FileIdentity { mount: 3, ..file },
        ] {
            assert_eq!(judge(&running, &found), Judgement::PowerLoss);
            assert_eq!(judge(&clean, &found), exact(true));
        }
        for found in [
            FileIdentity { inode: 6, ..file },
            FileIdentity {
                filesystem: [4; 16],
                ..file
            },
        ] {
            assert!(everything(judge(&running, &found)));
            assert!(everything(judge(&clean, &found)));
        }
        assert!(everything(judge(
            &running,
            &FileIdentity { device: 5, ..file }
        )));
        let rebooted = FileIdentity {
            boot: [2; 16],
            device: 5,
            ..file
        };
        assert_eq!(judge(&running, &rebooted), Judgement::PowerLoss);
        let failed = Identity {
            failed: true,
            ..running
        };
        assert_eq!(judge(&failed, &file), Judgement::PowerLoss);
        for elsewhere in [
            Place { mount: 1, ..state },
            Place {
                filesystem: [1; 16],
                ..state
            },
            Place { device: 1, ..state },
        ] {
            let judge = |recorded| super::judge(recorded, &file, &elsewhere);
            assert_eq!(judge(&running), Judgement::PowerLoss);
            assert_eq!(judge(&clean), exact(true));
        }
    }
}
