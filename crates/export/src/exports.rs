//! Which device a name means, and how many clients use it.
//!
//! A front end finds an [`Export`] by name and holds a [`ConnectedClient`] for as long as its client is connected.
//! Whoever wants to take a device away calls [`Export::retire`], which succeeds only while no client is connected and
//! admits none from then on: there is no moment at which a client could slip in between the check and the removal.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use tidemark_block::Geometry;

use crate::device::BlockDevice;
use crate::scratch::{Scratch, ScratchRoom};

/// The longest name of an export, in bytes of UTF-8; the protocol's own bound for a string.
pub const EXPORT_NAME_MAX: usize = 4096;

/// What stands between a volume's name and a snapshot's in the name of a snapshot's export. No volume has it in its name.
pub const SNAPSHOT_SIGN: char = '@';

/// Set in the client count once the export admits no more clients.
const RETIRED: u32 = 1 << 31;

/// A device under a name.
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    /// What makes it writable, where it is a scratch.
    scratch: Option<ScratchOf>,
    clients: AtomicU32,
}

/// Clients that are there at the same time share a scratch; it goes with the last of them.
struct ScratchOf {
    geometry: Geometry,
    room: Arc<ScratchRoom>,
    shared: Mutex<Weak<Scratch>>,
}

impl ScratchOf {
    fn share(&self, below: &Arc<dyn BlockDevice>) -> Arc<Scratch> {
        let mut shared = self.shared.lock();
        if let Some(scratch) = shared.upgrade() {
            return scratch;
        }
        let (below, room) = (Arc::clone(below), Arc::clone(&self.room));
        let fresh = Arc::new(Scratch::new(below, self.geometry, room));
        *shared = Arc::downgrade(&fresh);
        fresh
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("length", &self.device.length())
            .field("clients", &self.clients())
            .finish_non_exhaustive()
    }
}

/// Why a client was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The export is being removed; connect again once it is served anew.
    #[error("the export is being removed")]
    Retired,
}

/// Why an export could not be added or removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No export has this name.
    #[error("no export is named {0:?}")]
    Unknown(String),
    /// An export of this name exists already.
    #[error("an export named {0:?} exists already")]
    Exists(String),
    /// The name is empty, too long, or holds a control character.
    #[error("an export's name must have 1 to {EXPORT_NAME_MAX} bytes and no control characters")]
    BadName,
    /// Clients are connected; disconnect them first.
    #[error("export {name:?} is in use by {clients} client(s): disconnect them first")]
    InUse {
        /// The export.
        name: String,
        /// How many clients are connected.
        clients: u32,
    },
}

impl Export {
    /// An export that nobody uses yet.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        description: impl Into<String>,
        device: Arc<dyn BlockDevice>,
    ) -> Self {
        Self {
            name: name.into(),
            description: description.into(),
            device,
            scratch: None,
            clients: AtomicU32::new(0),
        }
    }

    /// An export that can be written although `device` can't: clients that use it at the same time see each other's
    /// writes, which are thrown away when the last of them has gone.
    #[must_use]
    pub fn scratch(
        name: impl Into<String>,
        device: Arc<dyn BlockDevice>,
        geometry: Geometry,
        room: Arc<ScratchRoom>,
    ) -> Self {
        Self {
            scratch: Some(ScratchOf {
                geometry,
                room,
                shared: Mutex::default(),
            }),
            ..Self::new(name, "", device)
        }
    }

    /// The name that clients ask for.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The volume and the snapshot, where the export is a snapshot's.
    #[must_use]
    pub fn snapshot(&self) -> Option<(&str, &str)> {
        self.name.split_once(SNAPSHOT_SIGN)
    }

    /// One line for people; may be empty.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The device behind the name. What clients use is [`ConnectedClient::device`].
    #[must_use]
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Whether what clients write is thrown away.
    #[must_use]
    pub const fn is_scratch(&self) -> bool {
        self.scratch.is_some()
    }

    /// Bytes that its clients have written, where that is thrown away; else 0.
    #[must_use]
    pub fn scratch_bytes(&self) -> u64 {
        let shared = self.scratch.as_ref().map(|scratch| scratch.shared.lock());
        let scratch = shared.and_then(|shared| shared.upgrade());
        scratch.map_or(0, |scratch| scratch.bytes_used())
    }

    /// Whether clients can't write.
    #[must_use]
    pub fn read_only(&self) -> bool {
        !self.is_scratch() && self.device.read_only()
    }

    /// How many clients (connections) use it now.
    #[must_use]
    pub fn clients(&self) -> u32 {
        self.clients.load(Ordering::Acquire) & !RETIRED
    }

    /// Counts one more client until the returned value is dropped.
    ///
    /// # Errors
    /// [`ConnectError::Retired`] once [`Export::retire`] has succeeded.
    pub fn connect(self: &Arc<Self>) -> Result<ConnectedClient, ConnectError> {
        let device = match &self.scratch {
            None => Arc::clone(&self.device),
            Some(scratch) => scratch.share(&self.device),
        };
        self.clients
            .try_update(Ordering::AcqRel, Ordering::Acquire, |n| {
                (n & RETIRED == 0).then_some(n + 1)
            })
            .map_err(|_| ConnectError::Retired)?;
        Ok(ConnectedClient {
            export: Arc::clone(self),
            device,
        })
    }

    /// Admits no more clients, for good. Repeating it is harmless.
    ///
    /// # Errors
    /// The number of clients that are connected; nothing has changed then.
    pub fn retire(&self) -> Result<(), u32> {
        self.clients
            .try_update(Ordering::AcqRel, Ordering::Acquire, |n| {
                (n & !RETIRED == 0).then_some(RETIRED)
            })
            .map(|_| ())
            .map_err(|n| n & !RETIRED)
    }
}

/// One client's use of an export; dropping it ends the use.
pub struct ConnectedClient {
    export: Arc<Export>,
    device: Arc<dyn BlockDevice>,
}

impl fmt::Debug for ConnectedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectedClient")
            .field("export", &self.export)
            .finish_non_exhaustive()
    }
}

impl ConnectedClient {
    /// The export in use.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// What to read and to write.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }
}

impl Drop for ConnectedClient {
    fn drop(&mut self) {
        self.export.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Where a server finds exports. Called once per negotiation, never in the data path.
pub trait Exports: Send + Sync {
    /// The export of that name. The empty name asks for a default; there need not be one.
    fn find(&self, name: &str) -> Option<Arc<Export>>;

    /// Every export that may be listed, in the order in which to show them.
    fn list(&self) -> Vec<Arc<Export>>;
}

/// A set of exports in memory, changed at run time.
#[derive(Debug, Default)]
pub struct ExportRegistry {
    exports: RwLock<BTreeMap<String, Arc<Export>>>,
}

impl ExportRegistry {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `device` under `name` from now on.
    ///
    /// # Errors
    /// [`RegistryError::BadName`], [`RegistryError::Exists`].
    pub fn add(
        &self,
        name: &str,
        description: &str,
        device: Arc<dyn BlockDevice>,
    ) -> Result<Arc<Export>, RegistryError> {
        if name.is_empty() || name.len() > EXPORT_NAME_MAX || name.chars().any(char::is_control) {
            return Err(RegistryError::BadName);
        }
        let mut exports = self.exports.write();
        if exports.contains_key(name) {
            return Err(RegistryError::Exists(name.to_owned()));
        }
        let export = Arc::new(Export::new(name, description, device));
        exports.insert(name.to_owned(), Arc::clone(&export));
        Ok(export)
    }

    /// Stops serving `name`; its device is let go once the returned export is dropped.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`], [`RegistryError::InUse`]; nothing has changed then.
    pub fn remove(&self, name: &str) -> Result<Arc<Export>, RegistryError> {
        let mut exports = self.exports.write();
        let export = exports
            .get(name)
            .ok_or_else(|| RegistryError::Unknown(name.to_owned()))?;
        export.retire().map_err(|clients| RegistryError::InUse {
            name: name.to_owned(),
            clients,
        })?;
        exports
            .remove(name)
            .ok_or_else(|| RegistryError::Unknown(name.to_owned()))
    }
}

impl Exports for ExportRegistry {
    /// The empty name means the only export, where there is exactly one.
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let exports = self.exports.read();
        if name.is_empty() {
            return if exports.len() == 1 {
                exports.values().next().cloned()
            } else {
                None
            };
        }
        exports.get(name).cloned()
    }

    fn list(&self) -> Vec<Arc<Export>> {
        self.exports.read().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::device::{Durability, ZeroFlags};

    struct Nothing;

    impl BlockDevice for Nothing {
        fn length(&self) -> u64 {
            0
        }
        fn read_only(&self) -> bool {
            true
        }
        fn block_size_preferred(&self) -> u32 {
            4096
        }
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8], _: Durability) -> io::Result<()> {
            Err(io::ErrorKind::PermissionDenied.into())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn trim(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_export_in_use_is_not_removed_and_a_removed_one_admits_nobody() {
        let registry = ExportRegistry::new();
        let export = registry.add("data", "", Arc::new(Nothing)).unwrap();
        let client = export.connect().unwrap();
        assert_eq!(
            registry.remove("data").unwrap_err(),
            RegistryError::InUse {
                name: "data".to_owned(),
                clients: 1
            }
        );
        let second = export.connect().unwrap();
        assert_eq!(export.clients(), 2);
        drop((client, second));
        registry.remove("data").unwrap();
        assert_eq!(export.connect().unwrap_err(), ConnectError::Retired);
        assert_eq!(export.clients(), 0);
        assert!(registry.find("data").is_none());
    }

    #[test]
    fn the_empty_name_means_the_only_export() {
        let registry = ExportRegistry::new();
        assert!(registry.find("").is_none());
        registry.add("a", "", Arc::new(Nothing)).unwrap();
        assert_eq!(registry.find("").unwrap().name(), "a");
        registry.add("b", "", Arc::new(Nothing)).unwrap();
        assert!(registry.find("").is_none());
        assert_eq!(registry.list().len(), 2);
    }

    #[test]
    fn names_that_no_client_could_ask_for_are_refused() {
        let registry = ExportRegistry::new();
        for name in ["", "a\nb", &"x".repeat(EXPORT_NAME_MAX + 1)] {
            assert_eq!(
                registry.add(name, "", Arc::new(Nothing)).unwrap_err(),
                RegistryError::BadName
            );
        }
        registry.add("a", "", Arc::new(Nothing)).unwrap();
        assert_eq!(
            registry.add("a", "", Arc::new(Nothing)).unwrap_err(),
            RegistryError::Exists("a".to_owned())
        );
    }
}
