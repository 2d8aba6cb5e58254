//! What is mounted where, as the kernel tells it in `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Unique while it is mounted.
    pub number: u64,
    /// Major and minor number, as in `7:0`; unique while anybody uses it.
    pub device: String,
    /// Where.
    pub at: PathBuf,
    /// The type of the filesystem, with its subtype, as in `fuse.tidemark`.
    pub kind: String,
    /// What was mounted: the path of a block device, where it is one.
    pub source: PathBuf,
    /// Nothing can be written through it.
    pub read_only: bool,
}

/// Every mount that this process sees, in the order in which they were made.
///
/// # Errors
/// Where the table can't be read.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let table = fs::read(TABLE)?;
    let lines = table.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(parse).collect())
}

/// The uppermost mount at exactly this path, which must be free of symbolic links.
///
/// # Errors
/// Where the table can't be read.
pub fn uppermost_at(at: &Path) -> io::Result<Option<Mounted>> {
    Ok(mounts()?.into_iter().rfind(|mounted| mounted.at == at))
}

/// A line: `number parent device root point options … - type source options`.
fn parse(line: &[u8]) -> Option<Mounted> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let is_ro = |options: &[u8]| options.split(|byte| *byte == b',').any(|one| one == b"ro");
    let mut fields = line.split(|byte| *byte == b' ');
    let number = text(fields.next()?).parse().ok()?;
    let device = text(fields.nth(1)?);
    let at = PathBuf::from(unescaped(fields.nth(1)?));
    let options = fields.next()?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = text(fields.next()?);
    let source = PathBuf::from(unescaped(fields.next()?));
    let of_filesystem = fields.next()?;
    Some(Mounted {
        number,
        device,
        at,
        kind,
        source,
        read_only: is_ro(options) || is_ro(of_filesystem),
    })
}

/// A path of the table: blanks, line ends and backslashes are three octal digits after a backslash.
fn unescaped(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let octal = |digit: &u8| {
            (b'0'..=b'7')
                .contains(digit)
                .then(|| u32::from(digit - b'0'))
        };
        let escaped = match (first, after) {
            (b'\\', [a, b, c, ..]) => octal(a)
                .zip(octal(b))
                .zip(octal(c))
                .and_then(|((a, b), c)| u8::try_from(a * 64 + b * 8 + c).ok()),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() {
            &after[3..]
        } else {
            after
        };
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_mount_is_told_whole_however_the_kernel_writes_it() {
        let line =
            b"83 29 7:3 / /mnt/a\\040b rw,nosuid shared:7 - fuse.tidemark /dev/loop3 ro,user_id=0";
        let found = parse(line).unwrap();
        assert_eq!(found.number, 83);
        assert_eq!(found.device, "7:3");
        assert_eq!(found.at, Path::new("/mnt/a b"));
        assert_eq!(found.kind, "fuse.tidemark");
        assert_eq!(found.source, Path::new("/dev/loop3"));
        assert!(found.read_only);
        let bare = parse(b"1 0 8:1 / / rw - ext4 /dev/sda1 rw,errors=remount-ro").unwrap();
        assert!(!bare.read_only);
        for torn in [
            &b""[..],
            b"83",
            b"83 29 0:52 / /x",
            b"83 29 0:52 / /x rw shared:7",
            b"83 29 0:52 / /x rw shared:7 - ext4 /dev/sda1",
        ] {
            assert_eq!(parse(torn), None);
        }
    }

    #[test]
    fn the_table_names_the_filesystem_that_it_lies_on() {
        let found = uppermost_at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!(found.kind, "proc");
        assert_eq!(uppermost_at(Path::new("/proc/self")).unwrap(), None);
    }

    #[test]
    fn paths_are_read_as_the_kernel_writes_them() {
        for (written, meant) in [
            (&b"/a"[..], &b"/a"[..]),
            (b"/a\\134b", b"/a\\b"),
            (b"/a\\012", b"/a\n"),
            (b"/a\\", b"/a\\"),
            (b"/a\\99", b"/a\\99"),
            (b"/a\\777", b"/a\\777"),
        ] {
            assert_eq!(unescaped(written).as_bytes(), meant);
        }
    }
}
