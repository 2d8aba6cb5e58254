//! Starting and stopping a mount.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Session, SessionACL};
use parking_lot::Mutex;

use super::crew::Crew;
use super::files::Files;
use super::mount::{Device, How, Mount, MountError, mount_at};
use super::session::{Mounted, Requests, WORKERS};
use super::tree::Tree;
use crate::exports::Exports;

/// How long a server that is dropped without [`FuseServer::stop`] waits.
const DROP_GRACE: Duration = Duration::from_secs(1);
/// How often it is looked whether the threads have ended.
const LOOK: Duration = Duration::from_millis(5);

/// How a stop went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unmounted {
    /// Files that programs had open and that nothing is behind any more: they get `ESTALE`.
    pub cut_off: usize,
}

/// A mounted directory. Dropping it unmounts.
#[derive(Debug)]
pub struct FuseServer {
    mounted: Arc<Mounted>,
    mount: Arc<Mount>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    session: BackgroundSession,
    watch: JoinHandle<()>,
}

impl FuseServer {
    /// Mounts at `at` and serves from now on. The directory is made where it doesn't exist; what a killed server has
    /// left mounted there is unmounted first.
    ///
    /// # Errors
    /// [`MountError`], which says what to do: nothing is mounted then.
    pub fn start(exports: Arc<dyn Exports>, at: &Path) -> Result<Self, MountError> {
        let (device, mount) = mount_at(at)?;
        match Self::serve(exports, device) {
            Ok((mounted, running)) => Ok(Self {
                mounted,
                mount: Arc::new(mount),
                running: Mutex::new(Some(running)),
            }),
            Err(error) => {
                let _gone = mount.detach();
                Err(MountError::Failed {
                    at: mount.path().to_owned(),
                    error,
                })
            }
        }
    }

    fn serve(exports: Arc<dyn Exports>, device: Device) -> io::Result<(Arc<Mounted>, Running)> {
        let mounted = Arc::new(Mounted {
            tree: Tree::new(exports),
            files: Files::default(),
            crew: Crew::new(device.fd.try_clone()?),
        });
        let mut config = Config::default();
        config.n_threads = Some(WORKERS);
        config.clone_fd = device.clonable;
        // The kernel has checked who asks: `default_permissions`, or the mount's owner alone.
        let acl = SessionACL::All;
        let session = Session::from_fd(Requests(Arc::clone(&mounted)), device.fd, acl, config)?;
        let watched = Arc::clone(&mounted);
        let watch = std::thread::Builder::new()
            .name("fuse-watch".to_owned())
            .spawn(move || watched.crew.keep_watch())?;
        match session.spawn() {
            Ok(session) => Ok((mounted, Running { session, watch })),
            Err(error) => {
                mounted.crew.close();
                Err(error)
            }
        }
    }

    /// The directory, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Takes an export's device away from whoever has its file open: requests that run end, later ones get `ESTALE`.
    /// Returns how many files there were; that they are gone is seen by [`crate::Export::clients`].
    pub fn disconnect(&self, export: &str) -> usize {
        self.mounted
            .files
            .disconnect(|found| found.name() == export)
    }

    /// Unmounts: whole where nobody uses it; otherwise, or where requests don't end within `grace`, the directory is
    /// free at once and open files have nothing behind them. Repeating it does nothing.
    pub fn stop(&self, grace: Duration) -> Unmounted {
        let Some(Running { session, watch }) = self.running.lock().take() else {
            return Unmounted { cut_off: 0 };
        };
        // Whoever stands by must see the end, too.
        self.mounted.crew.close();
        let _watched = watch.join();
        let deadline = Instant::now() + grace;
        let at = self.mount.path().display();
        match self.unmount(grace) {
            Ok(How::Whole) => {
                // Somebody else may have unmounted it lazily: then the threads go on.
                while !session.guard.is_finished() && Instant::now() < deadline {
                    std::thread::sleep(LOOK);
                }
            }
            Ok(How::Lazily) => {}
            Err(error) => tracing::warn!(%at, %error, "unmount"),
        }
        self.mounted.tree.close();
        let cut_off = self.mounted.files.disconnect(|_| true);
        if session.guard.is_finished()
            && let Err(error) = session.join()
        {
            tracing::warn!(%at, %error, "serving the mounted directory failed");
        }
        Unmounted { cut_off }
    }

    /// An unmount waits for requests, and a request may wait for room: it has a thread of its own.
    fn unmount(&self, grace: Duration) -> io::Result<How> {
        let (done, told) = mpsc::channel();
        let mount = Arc::clone(&self.mount);
        std::thread::Builder::new()
            .name("fuse-unmount".to_owned())
            .spawn(move || {
                // Nobody listens once the grace is over.
                let _late = done.send(mount.unmount());
            })?;
        match told.recv_timeout(grace) {
            Ok(how) => how,
            Err(RecvTimeoutError::Timeout) => self.mount.detach().map(|()| How::Lazily),
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the thread ended early")),
        }
    }
}

impl Drop for FuseServer {
    fn drop(&mut self) {
        self.stop(DROP_GRACE);
    }
}
