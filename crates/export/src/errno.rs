//! The one place that turns a device's [`io::Error`] into what a client is told: an NBD error value, or an errno.
//!
//! The NBD protocol knows a closed list of errors, with the numbers of Linux. What a device fails with is mapped to the
//! nearest of them; anything unknown is `EIO`, so that a client never takes a failure for something milder.

use std::io;

/// The errors of the NBD protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The device failed.
    Io = 5,
    /// Out of memory.
    NoMem = 12,
    /// The request makes no sense: unknown flag, or a range outside of the export.
    Inval = 22,
    /// No space left for the write.
    NoSpc = 28,
    /// The reply would be too large for one chunk.
    Overflow = 75,
    /// Not supported, or not faster than writing (`FAST_ZERO`).
    NotSup = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

impl NbdError {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// The NBD error that tells `error` best.
#[must_use]
pub fn nbd_error(error: &io::Error) -> NbdError {
    if let Some(errno) = error.raw_os_error() {
        return match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => NbdError::Perm,
            libc::ENOMEM => NbdError::NoMem,
            libc::EINVAL => NbdError::Inval,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => NbdError::NoSpc,
            libc::EOVERFLOW => NbdError::Overflow,
            libc::ENOTSUP | libc::ENOSYS | libc::ENOTTY => NbdError::NotSup,
            libc::ESHUTDOWN => NbdError::Shutdown,
            _ => NbdError::Io,
        };
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => NbdError::Perm,
        io::ErrorKind::OutOfMemory => NbdError::NoMem,
        io::ErrorKind::InvalidInput => NbdError::Inval,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            NbdError::NoSpc
        }
        io::ErrorKind::Unsupported => NbdError::NotSup,
        _ => NbdError::Io,
    }
}

/// The errno that tells `error` best, for a client that is a program on this machine. What a device names by number is
/// passed on; a refused change is [`libc::EROFS`].
#[must_use]
pub fn errno(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(number) if number > 0 => number,
        _ => match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
            io::ErrorKind::OutOfMemory => libc::ENOMEM,
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::StorageFull => libc::ENOSPC,
            io::ErrorKind::QuotaExceeded => libc::EDQUOT,
            io::ErrorKind::FileTooLarge => libc::EFBIG,
            io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
            io::ErrorKind::StaleNetworkFileHandle => libc::ESTALE,
            _ => libc::EIO,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_os_errno_and_its_error_kind_map_to_the_same_nbd_error() {
        for errno in [
            libc::EPERM,
            libc::EACCES,
            libc::EROFS,
            libc::ENOMEM,
            libc::EINVAL,
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EFBIG,
            libc::ENOSYS,
            libc::EIO,
            libc::ENODEV,
        ] {
            let by_errno = io::Error::from_raw_os_error(errno);
            let by_kind = io::Error::from(by_errno.kind());
            assert_eq!(nbd_error(&by_errno), nbd_error(&by_kind), "errno {errno}");
        }
    }

    #[test]
    fn an_unknown_failure_is_told_as_an_input_output_error() {
        assert_eq!(
            nbd_error(&io::Error::other("a checksum did not match")),
            NbdError::Io
        );
        assert_eq!(
            nbd_error(&io::Error::from_raw_os_error(libc::ESTALE)),
            NbdError::Io
        );
    }

    #[test]
    fn a_program_is_told_a_devices_own_errno_and_that_a_device_is_read_only() {
        for (error, told) in [
            (io::Error::from_raw_os_error(libc::ENOSPC), libc::ENOSPC),
            (io::Error::from_raw_os_error(libc::ESTALE), libc::ESTALE),
            (io::ErrorKind::PermissionDenied.into(), libc::EROFS),
            (io::ErrorKind::Unsupported.into(), libc::EOPNOTSUPP),
            (io::Error::other("a checksum did not match"), libc::EIO),
        ] {
            assert_eq!(errno(&error), told, "{error}");
        }
    }
}
