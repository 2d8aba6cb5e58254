//! How far the tracking can be trusted when a volume is opened: the part that needs no reading of the volume.

use thiserror::Error;
use tidemark_block::BlockIndex;

use super::{
    damage::Damage,
    records::{FileIdentity, Identity, Place},
};

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
    /// It is not the same volume file, or somebody else wrote to it, or the state is damaged.
    Everything(Reason),
}

/// Why nothing is known of any block.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Reason {
    /// It is another file.
    #[error("the volume file was replaced by another file")]
    Replaced,
    /// The filesystem can't be told from another one.
    #[error("the volume file may lie on another filesystem than before")]
    Filesystem,
    /// Its modification time is not that of the clean close.
    #[error("the volume file was modified while the service was stopped")]
    Modified,
    /// The state was put back from a copy.
    #[error("the volume's state is a copy, which may be an older one")]
    Copied,
    /// Another device, in the same boot and mount.
    #[error("the volume file lies on another device than before")]
    Device,
    /// The operator said so.
    #[error("the volume was readopted")]
    Readopted,
    /// A recorded block isn't what was recorded.
    #[error("block {0} is not what was written to it last")]
    Overwritten(BlockIndex),
    /// A file of the state.
    #[error(transparent)]
    Damaged(#[from] Damage),
}

/// In what a file differs from the recorded one, so that it can't be the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Replacement {
    /// The filesystems' UUIDs differ.
    #[error("it lies on another filesystem")]
    Filesystem,
    /// The inodes' numbers differ.
    #[error("it has inode {found}, the recorded one had {recorded}")]
    Inode {
        /// The number recorded.
        recorded: u64,
        /// The number found.
        found: u64,
    },
    /// The inode has the same number, which filesystems give again once a file is removed.
    #[error("it was created at another time than the recorded one")]
    Birth,
}

/// Whether a file is another one than the recorded. Boot, mount and device tell nothing about that: they change when a
/// filesystem is mounted again.
#[must_use]
pub fn replaced(recorded: &FileIdentity, found: &FileIdentity) -> Option<Replacement> {
    // What stands for a missing UUID is made from the device's number by some filesystems.
    let uuids = has_uuid(recorded) && has_uuid(found);
    if uuids && recorded.filesystem != found.filesystem {
        return Some(Replacement::Filesystem);
    }
    if recorded.inode != found.inode {
        return Some(Replacement::Inode {
            recorded: recorded.inode,
            found: found.inode,
        });
    }
    let born = [recorded, found].map(|file| (file.born_s, file.born_ns));
    (!born.contains(&(0, 0)) && born[0] != born[1]).then_some(Replacement::Birth)
}

/// Whether the filesystem is known by a UUID. What stands for a missing one has 8 bytes.
fn has_uuid(file: &FileIdentity) -> bool {
    file.filesystem[8..] != [0; 8]
}

/// Whether the state is a copy of the recorded one, put back in its place: what was written since it was taken is not
/// in its maps. A state that was closed cleanly may be moved; then the volume's modification time tells.
fn copied(recorded: &Place, found: &Place) -> bool {
    let born = [recorded, found].map(|place| (place.born_s, place.born_ns));
    recorded.inode != found.inode || (!born.contains(&(0, 0)) && born[0] != born[1])
}

/// Compares the identity that was recorded with the file and the state directory that were found.
#[must_use]
pub fn judge(recorded: &Identity, found: &FileIdentity, state: &Place) -> Judgement {
    let was = &recorded.file;
    if replaced(was, found).is_some() {
        return Judgement::Everything(Reason::Replaced);
    }
    if was.filesystem != found.filesystem {
        return Judgement::Everything(Reason::Filesystem);
    }
    if recorded.clean {
        let untouched = (was.modified_s, was.modified_ns) == (found.modified_s, found.modified_ns);
        return if untouched {
            Judgement::Exact { clean: true }
        } else {
            Judgement::Everything(Reason::Modified)
        };
    }
    if copied(&recorded.state, state) {
        return Judgement::Everything(Reason::Copied);
    }
    if was.boot != found.boot || was.mount != found.mount {
        return Judgement::PowerLoss;
    }
    if was.device != found.device {
        return Judgement::Everything(Reason::Device);
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

    /// A volume file whose every field differs from every other's.
    fn recorded_file() -> FileIdentity {
        FileIdentity {
            boot: [1; 16],
            mount: 2,
            filesystem: [3; 16],
            device: 4,
            inode: 5,
            modified_s: 6,
            modified_ns: 7,
            born_s: 8,
            born_ns: 9,
        }
    }

    #[test]
    fn tracking_is_trusted_only_as_far_as_the_identity_allows() {
        let file = recorded_file();
        let state = Place {
            mount: 10,
            filesystem: [11; 16],
            device: 12,
            inode: 13,
            born_s: 14,
            born_ns: 15,
        };
        let judge = |recorded: &Identity, found: &FileIdentity| judge(recorded, found, &state);
        let running = Identity {
            volume: VolumeId::from_bytes([9; 16]),
            geometry: Geometry::new(1 << 20, BlockSize::MIN).unwrap(),
            clean: false,
            failed: false,
            old: false,
            seals: None,
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
            FileIdentity { born_s: 2, ..file },
            FileIdentity {
                filesystem: [4; 16],
                ..file
            },
            FileIdentity {
                filesystem: [0; 16],
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
        for copy in [
            Place { inode: 1, ..state },
            Place {
                born_ns: 1,
                ..state
            },
        ] {
            let judge = |recorded, found| super::judge(recorded, found, &copy);
            assert!(everything(judge(&running, &file)));
            assert!(everything(judge(&running, &rebooted)));
            assert_eq!(judge(&clean, &file), exact(true));
        }
    }

    #[test]
    fn a_file_is_another_one_by_inode_birth_or_uuid_and_never_by_where_it_is_mounted() {
        let file = recorded_file();
        let weak = |byte| {
            let mut filesystem = [0; 16];
            filesystem[..8].fill(byte);
            FileIdentity { filesystem, ..file }
        };
        let untold = FileIdentity {
            born_s: 0,
            born_ns: 0,
            ..file
        };
        let elsewhere = FileIdentity {
            boot: [2; 16],
            mount: 3,
            device: 5,
            modified_s: 9,
            ..file
        };
        for (recorded, found) in [
            (file, file),
            (file, elsewhere),
            (file, untold),
            (untold, file),
            (weak(1), weak(2)),
            (weak(1), file),
            (file, weak(1)),
        ] {
            assert_eq!(replaced(&recorded, &found), None, "{recorded:?} {found:?}");
        }
        let inode = |inode| FileIdentity { inode, ..elsewhere };
        let found = Replacement::Inode {
            recorded: 5,
            found: 6,
        };
        assert_eq!(replaced(&file, &inode(6)), Some(found));
        for born in [(8, 10), (10, 9)] {
            let (born_s, born_ns) = born;
            let later = FileIdentity {
                born_s,
                born_ns,
                ..elsewhere
            };
            assert_eq!(replaced(&file, &later), Some(Replacement::Birth));
        }
        let copied = FileIdentity {
            filesystem: [4; 16],
            ..elsewhere
        };
        assert_eq!(replaced(&file, &copied), Some(Replacement::Filesystem));
    }
}
