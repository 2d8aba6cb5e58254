//! Mounting a block device's filesystem.
//!
//! The filesystem is made ready (journals are replayed then) before it gets its directory, in one last step. A mount
//! that has no directory yet ends with the process that made it.

use std::{fmt, fs::File, io::Read, path::Path};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

/// How a filesystem is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) read_only: bool,
    attributes: MountAttrFlags,
    /// What is the filesystem's own, with values where there are any.
    own: Vec<(String, Option<String>)>,
}

/// Attributes of a mount, as `mount -o` names them: what each sets, and what it takes away.
const ATTRIBUTES: [(&str, MountAttrFlags, MountAttrFlags); 12] = {
    use MountAttrFlags as A;
    const NONE: MountAttrFlags = MountAttrFlags::empty();
    const TIMES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR__ATIME;
    [
        ("nosuid", A::MOUNT_ATTR_NOSUID, NONE),
        ("suid", NONE, A::MOUNT_ATTR_NOSUID),
        ("nodev", A::MOUNT_ATTR_NODEV, NONE),
        ("dev", NONE, A::MOUNT_ATTR_NODEV),
        ("noexec", A::MOUNT_ATTR_NOEXEC, NONE),
        ("exec", NONE, A::MOUNT_ATTR_NOEXEC),
        ("noatime", A::MOUNT_ATTR_NOATIME, TIMES),
        ("relatime", A::MOUNT_ATTR_RELATIME, TIMES),
        ("strictatime", A::MOUNT_ATTR_STRICTATIME, TIMES),
        ("nodiratime", A::MOUNT_ATTR_NODIRATIME, NONE),
        ("nosymfollow", A::MOUNT_ATTR_NOSYMFOLLOW, NONE),
        ("defaults", NONE, NONE),
    ]
};

impl Options {
    /// Those given, each list as after `mount -o`, upon what is safe for a disk that somebody else may have written:
    /// no set-user-id programs, no devices.
    pub(crate) fn new(read_only: bool, given: &[String]) -> Self {
        let mut options = Self {
            read_only,
            attributes: MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
            own: Vec::new(),
        };
        let each = given.iter().flat_map(|list| list.split(','));
        for option in each.map(str::trim).filter(|option| !option.is_empty()) {
            options.add(option);
        }
        options
    }

    /// Adds one, which counts before those that were there.
    pub(crate) fn add(&mut self, option: &str) {
        match option {
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            _ => match ATTRIBUTES.iter().find(|(name, ..)| *name == option) {
                Some((_, set, taken)) => {
                    self.attributes = self.attributes.difference(*taken).union(*set);
                }
                None => self.own.push(match option.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (option.to_owned(), None),
                }),
            },
        }
    }
}

/// A filesystem that is ready, and has no directory yet.
#[derive(Debug)]
pub(crate) struct Ready(rustix::fd::OwnedFd);

/// What the kernel didn't like.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) errno: Errno,
    /// What it said besides; mostly empty.
    said: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = std::io::Error::from(self.errno);
        if self.said.is_empty() {
            write!(f, "{error}")
        } else {
            write!(f, "{} ({error})", self.said)
        }
    }
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            said: String::new(),
        }
    }
}

/// Makes the filesystem on a device ready: checks it, and replays its journal.
pub(crate) fn prepare(device: &Path, kind: &str, options: &Options) -> Result<Ready, Refused> {
    let context = File::from(fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?);
    configure(&context, device, options)
        .and_then(|()| fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, options.attributes))
        .map(Ready)
        .map_err(|errno| Refused {
            errno,
            said: said(context),
        })
}

fn configure(context: &File, device: &Path, options: &Options) -> rustix::io::Result<()> {
    fsconfig_set_string(context, "source", device)?;
    if options.read_only {
        fsconfig_set_flag(context, "ro")?;
    }
    for (key, value) in &options.own {
        match value {
            Some(value) => fsconfig_set_string(context, key.as_str(), value.as_str())?,
            None => fsconfig_set_flag(context, key.as_str())?,
        }
    }
    fsconfig_create(context)
}

/// What the kernel has said of a context: lines with a letter for how bad it is in front.
fn said(mut context: File) -> String {
    let (mut said, mut line) = (Vec::new(), [0; 1024]);
    while let Ok(length @ 1..) = context.read(&mut line) {
        let text = String::from_utf8_lossy(&line[..length]);
        let text = text.trim();
        said.push(
            text.split_once(' ')
                .map_or(text, |(_, text)| text)
                .to_owned(),
        );
    }
    said.join("; ")
}

impl Ready {
    /// Gives it its directory, for everybody to see.
    pub(crate) fn place(self, at: &Path) -> Result<(), Refused> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.0, c"", CWD, at, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(read_only: bool, given: &[&str]) -> Options {
        let given: Vec<_> = given.iter().map(ToString::to_string).collect();
        Options::new(read_only, &given)
    }

    #[test]
    fn options_are_the_mounts_or_the_filesystems_and_the_last_one_counts() {
        use MountAttrFlags as A;
        let safe = A::MOUNT_ATTR_NOSUID | A::MOUNT_ATTR_NODEV;
        assert_eq!(options(true, &[]).attributes, safe);
        let told = options(
            true,
            &["rw,noatime,data=ordered", "strictatime,suid, discard,,"],
        );
        assert!(!told.read_only);
        assert_eq!(
            told.attributes,
            A::MOUNT_ATTR_NODEV | A::MOUNT_ATTR_STRICTATIME
        );
        let own = [
            ("data".to_owned(), Some("ordered".to_owned())),
            ("discard".to_owned(), None),
        ];
        assert_eq!(told.own, own);
        assert!(options(false, &["rw", "ro"]).read_only);
    }
}
