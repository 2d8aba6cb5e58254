//! What leads to the segments: the store's marker, manifests, pages, the advisory object. Most of it can be put back.

use tidemark_block::{Checksum128, Sequence};
use tidemark_proto::{Reason, RpcError};
use vault_core::manifest::{Manifest, NewPage, encode_page};

use super::{Damage, NeededFor, Pass, since, sound};
use crate::{
    error::of_store,
    store::{MARKER, StoreError, Whose},
    volume::now_ms,
};

/// Why nothing may be written to the store.
fn another_store(why: &str) -> RpcError {
    RpcError::new(
        Reason::StoreCorrupt,
        format!("what is at the place of the vault's store is not that store: {why}"),
        "mount the vault's own store at store_dir again, and restart the vault; the scrub has written nothing",
    )
}

impl Pass<'_> {
    /// The marker, the manifests, the advisory object and the pages.
    pub(super) async fn roots(&mut self) -> Result<(), RpcError> {
        self.marker().await?;
        self.manifests().await?;
        self.advisory().await?;
        let manifest = self.volume.manifest();
        for page in &manifest.pages {
            self.page(page.name, page.sequences.0).await?;
        }
        Ok(())
    }

    /// So many bytes of an object that is no segment were read.
    async fn read_beside(&mut self, bytes: u64) {
        self.has_read(bytes);
        self.found.progress.bytes_total += bytes;
        (self.told)(self.found.progress);
        self.pace.spent_beside(bytes).await;
    }

    async fn marker(&mut self) -> Result<(), RpcError> {
        let Some(problem) = self.own_store().await? else {
            self.note(MARKER, None);
            return Ok(());
        };
        // A store without its marker would be taken for an empty one: every byte of it is known here.
        let store = self.volume.store.root();
        let damage = Damage {
            repaired: store
                .replace_marker(self.volume.shared.marker)
                .await
                .is_ok(),
            ..Damage::new(MARKER.to_owned(), problem, NeededFor::Start)
        };
        self.note(MARKER, Some(damage));
        Ok(())
    }

    /// Makes sure that this is the store that the vault has opened; gives what is wrong with its marker. The newest
    /// manifest proves it, too. Asked before anything is put right or told: the disk may go away at any moment, and what
    /// remains of a store then is an empty directory.
    ///
    /// # Errors
    /// It is another store, or none; that is told as damage.
    pub(super) async fn own_store(&mut self) -> Result<Option<String>, RpcError> {
        let volume = self.volume;
        let whose = volume.store.root().whose(volume.shared.marker).await;
        let (problem, why) = match sound(whose).map_err(|e| of_store(&e))? {
            Ok(Whose::Own) => return Ok(None),
            Ok(Whose::Anothers) => {
                let problem = "it is another store's".to_owned();
                (problem, "its marker names another one".to_owned())
            }
            Err(problem) => {
                let newest = volume.manifest();
                let read = volume.store.check_manifest(&newest, newest.version).await;
                let Err(other) = sound(read).map_err(|e| of_store(&e))? else {
                    return Ok(Some(problem));
                };
                let object = volume.store.manifest_name(newest.version);
                let why = format!("of its marker, {problem}; of {object}, {other}");
                (problem, why)
            }
        };
        let damage = Damage::new(MARKER.to_owned(), problem, NeededFor::Start);
        self.note(MARKER, Some(damage));
        Err(another_store(&why))
    }

    async fn manifests(&mut self) -> Result<(), RpcError> {
        let newest = self.volume.manifest();
        let listed = self.volume.store.versions().await;
        let mut versions = listed.map_err(|e| of_store(&e))?;
        // One that is gone is looked for, and missed.
        if !versions.contains(&newest.version) {
            versions.push(newest.version);
        }
        for version in versions {
            self.manifest(&newest, version).await?;
        }
        Ok(())
    }

    async fn manifest(&mut self, newest: &Manifest, version: u64) -> Result<(), RpcError> {
        let object = self.volume.store.manifest_name(version);
        let read = self.volume.store.check_manifest(newest, version).await;
        let problem = match sound(read).map_err(|e| of_store(&e))? {
            Ok(bytes) => {
                self.read_beside(bytes).await;
                self.note(&object, None);
                return Ok(());
            }
            Err(problem) => problem,
        };
        self.own_store().await?;
        if self.is_pruned(version).await.map_err(|e| of_store(&e))? {
            self.volume.scrub.sound(&object);
            return Ok(());
        }
        let damage = if version < newest.version {
            Damage::new(object.clone(), problem, NeededFor::Nothing)
        } else {
            self.damaged_root(newest, object.clone(), problem).await
        };
        self.note(&object, Some(damage));
        Ok(())
    }

    /// Whether an old version has been deleted since they were listed.
    async fn is_pruned(&self, version: u64) -> Result<bool, StoreError> {
        let newest = self.volume.manifest().version;
        Ok(version < newest && !self.volume.store.versions().await?.contains(&version))
    }

    /// The newest manifest is damaged or gone: what the vault has in memory is written as the next version. Once that
    /// is the root, the damaged one is put back, too: nobody needs it, and nobody need wonder about it.
    async fn damaged_root(&self, newest: &Manifest, object: String, problem: String) -> Damage {
        let damage = Damage::new(object, problem, NeededFor::Volume);
        let repaired = self
            .volume
            .edit(|manifest| Ok(Some((manifest.successor(now_ms()), Vec::new()))))
            .await;
        if let Err(error) = repaired {
            tracing::error!(
                volume = %self.volume.id, %error,
                "the newest manifest is damaged and could not be written again: don't stop the vault before it can be; {}",
                error.action
            );
            return Damage {
                generations: newest.generations.iter().map(|g| g.id).collect(),
                ..damage
            };
        }
        if let Err(error) = self.volume.store.replace_manifest(newest).await {
            tracing::warn!(volume = %self.volume.id, %error, "a manifest that nothing needs any more stays damaged");
        }
        Damage {
            repaired: true,
            ..damage
        }
    }

    async fn advisory(&mut self) -> Result<(), RpcError> {
        let object = self.volume.store.current_name();
        let read = self.volume.store.check_current().await;
        let damage = match sound(read).map_err(|e| of_store(&e))? {
            Ok(bytes) => {
                self.read_beside(bytes).await;
                None
            }
            Err(problem) => {
                self.own_store().await?;
                Some(Damage {
                    repaired: self.volume.rewrite_current().await.is_ok(),
                    ..Damage::new(object.clone(), problem, NeededFor::CurrentThrough)
                })
            }
        };
        self.note(&object, damage);
        Ok(())
    }

    async fn page(&mut self, name: Checksum128, oldest: Sequence) -> Result<(), RpcError> {
        let object = self.volume.store.page_name(name);
        let read = self.volume.store.check_page(name).await;
        let damage = match sound(read).map_err(|e| of_store(&e))? {
            Ok(bytes) => {
                self.read_beside(bytes).await;
                None
            }
            Err(problem) => {
                // While it is held, no page that this manifest names is deleted.
                let (_lease, manifest) = self.lease();
                if !manifest.pages.iter().any(|page| page.name == name) {
                    return Ok(());
                }
                self.own_store().await?;
                let damage = Damage::new(object.clone(), problem, NeededFor::ChecksumTable);
                Some(if self.restore_page(name).await {
                    Damage {
                        repaired: true,
                        ..damage
                    }
                } else {
                    Damage {
                        generations: since(&manifest, oldest),
                        ..damage
                    }
                })
            }
        };
        self.note(&object, damage);
        Ok(())
    }

    /// Puts a page again from memory, where it is still there.
    async fn restore_page(&self, name: Checksum128) -> bool {
        let pages = &self.volume.shared.pages;
        let Some(records) = pages.get(&(self.volume.id, name)) else {
            return false;
        };
        let page = NewPage {
            name,
            bytes: encode_page(&records),
            records: records.to_vec(),
        };
        tidemark_block::xxh3_128(&page.bytes) == name
            && self.volume.store.put_page(&page).await.is_ok()
    }
}
