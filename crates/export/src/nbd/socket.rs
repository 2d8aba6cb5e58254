//! Sockets: where a server listens, and one client's stream.
//!
//! A unix socket appears under its name by a rename, already with mode 0600, so there is no moment at which others
//! could connect. A socket file that a dead server left behind is replaced; a living server's is not: a lock file
//! beside it tells our own servers apart, and a connection attempt finds everyone else's.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg, sockopt};

use super::limits::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES};

/// Where an NBD server listens. As text: `unix:PATH`, or `HOST:PORT` with or without `tcp:` before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// A socket file.
    Unix(PathBuf),
    /// Port 0 means any free one.
    Tcp(SocketAddr),
}

/// Text that is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an NBD address: write unix:PATH or HOST:PORT")]
pub struct BadAddress(String);

impl FromStr for NbdAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = || BadAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(bad())
            } else {
                Ok(Self::Unix(PathBuf::from(path)))
            };
        }
        let host = text.strip_prefix("tcp:").unwrap_or(text);
        host.to_socket_addrs()
            .ok()
            .and_then(|mut all| all.next())
            .map(Self::Tcp)
            .ok_or_else(bad)
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// One client's connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        retried(|| match self {
            Self::Unix(stream) => (&*stream).read(buf),
            Self::Tcp(stream) => (&*stream).read(buf),
        })
    }

    pub(super) fn receive_vectored(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        retried(|| match self {
            Self::Unix(stream) => (&*stream).read_vectored(bufs),
            Self::Tcp(stream) => (&*stream).read_vectored(bufs),
        })
    }

    /// Sends some of `bytes`.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        retried(|| match self {
            Self::Unix(stream) => (&*stream).write(bytes),
            Self::Tcp(stream) => (&*stream).write(bytes),
        })
    }

    /// Sends everything, or fails; a client that takes nothing for the send timeout is a failure.
    pub(super) fn send_all(&self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let sent = retried(|| match self {
                Self::Unix(stream) => (&*stream).write_vectored(parts),
                Self::Tcp(stream) => (&*stream).write_vectored(parts),
            })?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut parts, sent);
        }
        Ok(())
    }

    /// What has arrived; [`io::ErrorKind::WouldBlock`] where nothing has.
    pub(super) fn receive_now(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut control = RecvAncillaryBuffer::default();
        retried(|| Ok(recvmsg(self, bufs, &mut control, RecvFlags::DONTWAIT)?.bytes))
    }

    /// Whether something waits to be received.
    pub(super) fn readable(&self) -> bool {
        let fd = self.as_fd();
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&now),
        )
        .is_ok_and(|ready| ready > 0)
    }

    pub(super) fn set_receive_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    pub(super) fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }

    /// Ends one direction or both; on a stream that has ended already there is nothing to do.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _already_closed = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// A client may idle for ever, but only while it is there: one whose host lost power says no goodbye, and would keep its
/// place among the connections.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// A socket that accepts clients.
#[derive(Debug)]
pub(super) enum Listener {
    Unix {
        listener: UnixListener,
        path: PathBuf,
        _lock: File,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`, without blocking in accept.
    pub(super) fn bind(address: &NbdAddress) -> io::Result<Self> {
        match address {
            NbdAddress::Unix(path) => bind_unix(path),
            NbdAddress::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// Where it listens, with the port that was chosen.
    pub(super) fn address(&self) -> io::Result<NbdAddress> {
        match self {
            Self::Unix { path, .. } => Ok(NbdAddress::Unix(path.clone())),
            Self::Tcp(listener) => listener.local_addr().map(NbdAddress::Tcp),
        }
    }

    /// The next client that waits, if any.
    pub(super) fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Self::Unix { listener, .. } => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok((Stream::Unix(stream), "unix".to_owned()))
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(false)?;
                // Replies are small and each is waited for: never hold one back.
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
                Ok((Stream::Tcp(stream), peer.to_string()))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix { listener, .. } => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix { path, .. } = self {
            // The lock is still held, so the name is ours. A file that stays is replaced at the next start.
            let _stays = fs::remove_file(path);
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<Listener> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    };
    DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;

    let mut lock_name = name.to_owned();
    lock_name.push(".lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(dir.join(lock_name))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(in_use()),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    refuse_unless_stale(path)?;

    // Bound under another name first: the socket must have its mode before anyone can find it.
    let hidden = dir.join(format!(".{:x}", std::process::id()));
    let _not_there = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    let published = fs::set_permissions(&hidden, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&hidden, path))
        .and_then(|()| listener.set_nonblocking(true));
    if let Err(error) = published {
        let _not_there = fs::remove_file(&hidden);
        return Err(error);
    }
    Ok(Listener::Unix {
        listener,
        path: path.to_owned(),
        _lock: lock,
    })
}

fn in_use() -> io::Error {
    io::Error::new(
        io::ErrorKind::AddrInUse,
        "another server listens there: stop it, or choose another socket",
    )
}

fn refuse_unless_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            let message =
                "a file that is not a socket lies there: remove it, or choose another name";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(in_use()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a socket's timeout has passed, or nothing has arrived yet.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_tcp_client_is_probed_so_that_one_that_is_gone_is_noticed() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let NbdAddress::Tcp(address) = listener.address().unwrap() else {
            panic!("not TCP")
        };
        let _client = TcpStream::connect(address).unwrap();
        // On loopback the connection is in the backlog once `connect` has returned.
        let (stream, _) = listener.accept().unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), KEEPALIVE_PROBES);
    }
}
