//! Files, as both services need them: durable writes, small records, locks, guarded memory maps, checksum tables; and what a
//! service asks of the heap and of the kernel's table of mounts.
//!
//! [`durable`] is the one place where files are renamed, removed and synced.

pub mod checksum_table;
pub mod descriptors;
pub mod durable;
pub mod guarded_map;
pub mod heap;
pub mod lock;
pub mod mount_table;
pub mod record;

pub use checksum_table::{ChecksumTable, TableError};
pub use guarded_map::VolumeMap;
pub use lock::{FileLock, LockError};
