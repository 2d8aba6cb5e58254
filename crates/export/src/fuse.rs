//! Exports as files in a mounted directory, through FUSE.
//!
//! `<mount>/<volume>.img` is a volume, `<mount>/.snapshots/<volume>/<snapshot>.img` a snapshot of it. What is there is
//! asked of [`crate::Exports`] at each lookup, and names are cached for no time, so that volumes and snapshots come and
//! go while the directory is mounted. A file's size is its device's length and can't be changed; a file that can't be
//! written says `EROFS`; a file whose device was taken away says `ESTALE`.
//!
//! **Writes go through.** The kernel's writeback cache is not asked for: a `write` returns after the device has
//! performed it. With it a cut would show a volume without writes that had returned before the cut, and a killed
//! service would lose them with the connection that they wait for, where one that is started again has them otherwise.
//! Pages that are written through a shared mapping are the exception that there always is: they reach the device by
//! `msync`, `fsync`, or when the kernel chooses; `fsync` sends them and then flushes the device.
//!
//! **Reads are cached by the kernel** while at least one program has the file open. The first to open a file drops
//! what is left of earlier times, because another front end may have written since; so a file follows an NBD client's
//! writes from open to open. Snapshots don't change: theirs stays.
//!
//! Requests are performed by the thread that read them from the kernel, as in [`crate::nbd`]: there are
//! [`WORKERS`] of these, each with a buffer for the largest request (1 MiB), and none is async. One of them receives
//! while requests are quick.
//!
//! In the order in which data meets them: `mount` (the mount point), `session` (the kernel's requests), `crew` (which
//! thread receives), `tree` (which file a name is), `files` (what is open), `server` (start and stop).

mod crew;
mod files;
mod mount;
mod server;
mod session;
mod tree;

pub use mount::MountError;
pub use server::{FuseServer, Unmounted};
pub use session::WORKERS;
