//! Adding a volume: all of it, or nothing.

use std::{
    fs::{File, OpenOptions},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use tidemark_block::{BlockSize, Geometry, VolumeId};
use tidemark_disk::durable;
use tidemark_proto::{Reason, RpcError};

use super::{
    Registry, choose::first_that_fits, local, mark_in, remove_record, remove_state, unmark,
    volumes_dir,
};
use crate::{
    config::{Config, EngineSetting},
    engine::{FileKey, file_key},
    uplink::{blocking, random_id},
    volume::{Ready, Volume, VolumeRecord},
};

/// The longest path of a volume file, in bytes.
const PATH_BYTES_MAX: usize = 4096;

/// What is wanted.
#[derive(Debug, Clone)]
pub(crate) struct AddVolume {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    /// None: the file's own.
    pub(crate) length: Option<u64>,
    pub(crate) block_size: BlockSize,
    /// None: as configured.
    pub(crate) engine: Option<EngineSetting>,
}

/// A name that can be an export, a file and a word on a command line.
fn check_name(name: &str) -> Result<(), RpcError> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ok = (1..=63).contains(&name.len())
        && name.bytes().all(|c| plain(c) || b"._-".contains(&c))
        && name.bytes().next().is_some_and(plain);
    // A UUID as a name would hide the volume that has it.
    if ok && name.parse::<VolumeId>().is_err() {
        return Ok(());
    }
    Err(RpcError::new(
        Reason::VolumeNameInvalid,
        format!("{name:?} can't be the name of a volume"),
        "give it 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, that are no UUID",
    ))
}

fn bad_file(message: String, action: &str) -> RpcError {
    RpcError::new(Reason::VolumeFileInvalid, message, action)
}

fn geometry(file: &Path, length: u64, block_size: BlockSize) -> Result<Geometry, RpcError> {
    Geometry::new(length, block_size).map_err(|error| {
        RpcError::new(
            Reason::GeometryInvalid,
            format!("{} can't be a volume: {error}", file.display()),
            "make the file's size a multiple of the block size, or choose another block size",
        )
    })
}

/// What an addition made.
struct Made {
    volume: Volume,
    ready: Ready,
    /// The volume file, where it wasn't there before.
    file: Option<PathBuf>,
}

/// A file, found or made.
struct Found {
    geometry: Geometry,
    created: bool,
}

impl AddVolume {
    fn check(&self) -> Result<(), RpcError> {
        check_name(&self.name)?;
        if !self.file.is_absolute() || self.file.as_os_str().len() > PATH_BYTES_MAX {
            return Err(bad_file(
                format!(
                    "{} is not an absolute path of at most {PATH_BYTES_MAX} bytes",
                    self.file.display()
                ),
                "give the absolute path of the volume file",
            ));
        }
        Ok(())
    }

    /// Looks at the file, or makes it.
    fn find_or_create(&self) -> Result<Found, RpcError> {
        let shown = self.file.display();
        match std::fs::metadata(&self.file) {
            Ok(metadata) if !metadata.is_file() => Err(bad_file(
                format!("{shown} is not a regular file"),
                "name the file that holds the volume, or one that doesn't exist yet",
            )),
            Ok(metadata) => {
                let found = metadata.len();
                if let Some(length) = self.length.filter(|length| *length != found) {
                    return Err(bad_file(
                        format!("{shown} exists and has {found} bytes, not {length}"),
                        "leave the length out to take the file as it is, or name a file that doesn't exist",
                    ));
                }
                Ok(Found {
                    geometry: geometry(&self.file, found, self.block_size)?,
                    created: false,
                })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let Some(length) = self.length else {
                    return Err(bad_file(
                        format!("{shown} doesn't exist"),
                        "correct the path, or give a length to create the file",
                    ));
                };
                let geometry = geometry(&self.file, length, self.block_size)?;
                self.create(length).map_err(|error| {
                    bad_file(
                        format!("{shown} can't be created: {error}"),
                        "check that its directory exists and that the service may write to it",
                    )
                })?;
                Ok(Found {
                    geometry,
                    created: true,
                })
            }
            Err(error) => Err(bad_file(
                format!("{shown} can't be looked at: {error}"),
                "check the path and that the service may read it",
            )),
        }
    }

    fn create(&self, length: u64) -> std::io::Result<()> {
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&self.file)
            .and_then(|file: File| {
                file.set_len(length)?;
                file.sync_all()
            });
        let synced = made.and_then(|()| match self.file.parent() {
            Some(parent) => durable::sync_dir(parent),
            None => Ok(()),
        });
        synced.inspect_err(|error| {
            if error.kind() != ErrorKind::AlreadyExists {
                let _ = std::fs::remove_file(&self.file);
            }
        })
    }

    /// All the blocking part. What fails leaves nothing behind.
    fn perform(self, config: &Config, others: &[(String, PathBuf)]) -> Result<Made, RpcError> {
        let Found { geometry, created } = self.find_or_create()?;
        let id = VolumeId::from_bytes(random_id());
        let dir = volumes_dir(&config.state).join(id.to_string());
        let file = created.then_some(self.file.clone());
        let setting = self.engine.unwrap_or(config.engine);
        let made = check_overlap(&self.file, others).and_then(|()| {
            first_that_fits(setting, config, &self.file, |(engine, why)| {
                let record = VolumeRecord {
                    id,
                    name: self.name.clone(),
                    file: self.file.clone(),
                    geometry,
                    engine,
                    engine_why: why.to_owned(),
                };
                match make_state(&record, &dir, config) {
                    Ok(ready) => Ok((record, ready)),
                    Err(error) => {
                        undo(&dir, id, None);
                        Err(error)
                    }
                }
            })
        });
        match made {
            Ok((record, ready)) => Ok(Made {
                volume: Volume::failed(record, dir, "it is being added"),
                ready,
                file,
            }),
            Err(error) => {
                undo(&dir, id, file.as_deref());
                Err(error)
            }
        }
    }
}

/// Removes what an addition made that failed. The record goes first: what is left without it the next start removes.
fn undo(dir: &Path, id: VolumeId, file: Option<&Path>) {
    let removed = remove_record(dir)
        .and_then(|()| remove_state(dir, id))
        .and_then(|()| file.map_or(Ok(()), durable::remove_file));
    if let Err(error) = removed {
        tracing::warn!(%error, path = %dir.display(), "remove what is left of a volume that was not added");
    }
}

fn make_state(record: &VolumeRecord, dir: &Path, config: &Config) -> Result<Ready, RpcError> {
    durable::create_dir(dir)
        .and_then(|()| durable::write_file(&mark_in(dir), &[]))
        .context("create the volume's state directory")
        .map_err(|e| local(&e))?;
    let ready = Ready::create(record, dir, config).map_err(|e| local(&e))?;
    if let Err(error) = record.store(dir) {
        ready.close();
        return Err(local(&error));
    }
    unmark(dir);
    Ok(ready)
}

/// No two volumes share a file, by whatever path.
fn check_overlap(file: &Path, others: &[(String, PathBuf)]) -> Result<(), RpcError> {
    let key = |path: &Path| -> Option<FileKey> { file_key(path).ok() };
    let ours = key(file);
    for (name, path) in others {
        if path == file || (ours.is_some() && key(path) == ours) {
            return Err(RpcError::new(
                Reason::VolumeExists,
                format!("{} is the file of volume {name} already", file.display()),
                "use that volume, or remove it first",
            ));
        }
    }
    Ok(())
}

impl Registry {
    /// Adds a volume and serves it.
    pub(crate) async fn add(&self, add: AddVolume) -> Result<Arc<Volume>, RpcError> {
        add.check()?;
        self.stopping()?;
        let _change = self.change.lock().await;
        let all = self.list();
        if all.iter().any(|volume| volume.record.name == add.name) {
            return Err(RpcError::new(
                Reason::VolumeExists,
                format!("there is a volume {:?} already", add.name),
                "choose another name, or remove that volume first",
            ));
        }
        if all.len() >= self.shared.config.volumes_max as usize {
            return Err(RpcError::new(
                Reason::LimitReached,
                format!(
                    "the service has {} volumes, the most it may have",
                    all.len()
                ),
                "raise volumes_max, or remove volumes",
            ));
        }
        let others: Vec<_> = all
            .iter()
            .map(|volume| (volume.record.name.clone(), volume.record.file.clone()))
            .collect();
        let config = Arc::clone(&self.shared.config);
        let work = tokio::task::spawn_blocking(move || add.perform(&config, &others));
        let Made {
            volume,
            ready,
            file,
        } = work
            .await
            .map_err(|error| RpcError::internal(format!("add the volume: {error}")))??;
        let volume = Arc::new(volume);
        let served = volume.serve(ready, &self.shared).await;
        if let Err(error) = served {
            let (dir, id) = (volume.dir.clone(), volume.record.id);
            let undone = blocking(move || {
                undo(&dir, id, file.as_deref());
                Ok(())
            });
            undone.await.map_err(|e| local(&e))?;
            return Err(local(&error));
        }
        self.volumes
            .write()
            .insert(volume.record.id, Arc::clone(&volume));
        tracing::info!(
            volume = %volume.record.name, id = %volume.record.id, file = %volume.record.file.display(),
            geometry = %volume.record.geometry, engine = %volume.record.engine, why = volume.record.engine_why,
            "added"
        );
        Ok(volume)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_that_cannot_be_served_is_not_added_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state: dir.path().join("state"),
            vault: "http://127.0.0.1:1".to_owned(),
            engine: EngineSetting::Intercept,
            ..Config::default()
        };
        let (_stop, stopping) = watch::channel(false);
        let registry = Registry::open(Arc::new(config), stopping).await.unwrap();
        let add = |name: &str| AddVolume {
            name: name.to_owned(),
            file: dir.path().join(name),
            length: Some(8192),
            block_size: BlockSize::MIN,
            engine: None,
        };
        registry.add(add("first")).await.unwrap();
        let served = tidemark_export::Exports::find(&**registry.exports(), "first").unwrap();
        let device = Arc::clone(served.device());
        registry.exports().add("taken", "", device).unwrap();

        registry.add(add("taken")).await.unwrap_err();
        assert_eq!(registry.list().len(), 1);
        assert!(!dir.path().join("taken").exists());
        let states = std::fs::read_dir(volumes_dir(&registry.config().state)).unwrap();
        assert_eq!(states.count(), 1);
        // A file that was there before is left alone.
        std::fs::write(dir.path().join("taken"), [1; 8192]).unwrap();
        registry.add(add("taken")).await.unwrap_err();
        assert_eq!(std::fs::read(dir.path().join("taken")).unwrap(), [1; 8192]);
        registry.exports().remove("taken").unwrap();
        registry.add(add("taken")).await.unwrap();
        registry.close().await.unwrap();
    }

    #[test]
    fn names_are_words_that_need_no_quoting() {
        for name in ["a", "data", "pg-main_1.img", "0", &"x".repeat(63)] {
            check_name(name).unwrap();
        }
        for name in [
            "",
            "Data",
            "-a",
            ".a",
            "a b",
            "a/b",
            "ä",
            &"x".repeat(64),
            "00112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert_eq!(
                check_name(name).unwrap_err().reason,
                Reason::VolumeNameInvalid,
                "{name}"
            );
        }
    }
}
