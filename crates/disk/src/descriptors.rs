//! File descriptors, which clients and files share: some are kept back for files, because a record that can't be
//! replaced for want of one stops its volume.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most that are kept back, and the part of all that is where there are few.
const KEPT_MAX: u64 = 64;
const KEPT_PART: u64 = 4;

/// Raises this process's limit of open files to what it may be at most; the usual one dates from programs that wait
/// with `select`.
///
/// # Errors
/// Where the system refuses: the limit stays as it was.
pub fn raise_limit() -> std::io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// Whether a client that has this descriptor is to be turned away. The system gives the lowest number that is free, so
/// a number near the limit says that few are left.
#[must_use]
pub fn is_kept_back(client: BorrowedFd<'_>) -> bool {
    let number = u64::try_from(client.as_raw_fd()).unwrap_or(0);
    getrlimit(Resource::Nofile)
        .current
        .is_some_and(|limit| number >= clients_max(limit))
}

/// Descriptors below this number are for anybody.
fn clients_max(limit: u64) -> u64 {
    limit - (limit / KEPT_PART).min(KEPT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_kept_back_and_never_all() {
        assert_eq!(clients_max(0), 0);
        assert_eq!(clients_max(64), 48);
        assert_eq!(clients_max(1024), 960);
        assert_eq!(clients_max(524_288), 524_224);
    }
}
