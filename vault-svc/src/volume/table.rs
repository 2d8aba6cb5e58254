//! The checksum table of a volume's newest generation: a cache that can always be replayed from segments.
//!
//! A commit computes its digest from the table of its base, so the table is brought up to the head before an
//! interval is let in, and never touched between a header and its commit. What a commit changed is applied after its
//! manifest is durable, from memory where it is small, else from the checksum sections of its segments. The stamp on
//! disk advances later, after a sync. A damaged or missing table is made anew from the newest image's segments.

use std::{collections::VecDeque, path::PathBuf, sync::Arc};

use parking_lot::Mutex as SyncMutex;
use tidemark_block::{
    BlockIndex, Checksum128, Extent, GenerationId, Sequence, TableView, digest, xxh3_128,
};
use tidemark_disk::checksum_table::{ChecksumTable, TableError};
use tidemark_proto::RpcError;
use tokio::sync::Mutex;
use vault_core::{
    image::{ByWindow, overlay},
    ingest::Overlay,
    manifest::Manifest,
};

use super::Volume;
use crate::error::{of_io, of_store};

/// Changes of committed generations kept in memory until they are applied.
const PENDING_MAX: usize = 2;

/// Where the tables of a vault lie.
#[derive(Debug, Clone)]
pub(crate) struct TableFiles {
    pub(crate) dir: PathBuf,
}

#[derive(Debug)]
pub(crate) struct Table {
    files: TableFiles,
    opened: Mutex<Option<Opened>>,
    pending: SyncMutex<VecDeque<Pending>>,
}

#[derive(Debug, Clone)]
struct Opened {
    table: Arc<ChecksumTable>,
    /// The generation whose image it describes.
    applied: GenerationId,
}

#[derive(Debug)]
struct Pending {
    base: GenerationId,
    generation: GenerationId,
    overlay: Overlay,
}

impl Table {
    pub(super) fn new(files: TableFiles) -> Self {
        Self {
            files,
            opened: Mutex::new(None),
            pending: SyncMutex::default(),
        }
    }
}

/// A table together with what it describes.
#[derive(Debug, Clone)]
pub(crate) struct TableAt {
    pub(crate) table: Arc<ChecksumTable>,
    pub(crate) generation: GenerationId,
}

impl Volume {
    /// Hands over what a committed generation changed, to be applied when the table is next needed.
    pub(crate) fn note_committed(
        &self,
        base: GenerationId,
        generation: GenerationId,
        overlay: Overlay,
    ) {
        let mut pending = self.table.pending.lock();
        pending.push_back(Pending {
            base,
            generation,
            overlay,
        });
        while pending.len() > PENDING_MAX {
            pending.pop_front();
        }
    }

    /// The table of the newest generation, brought up to it where it isn't.
    pub(crate) async fn table_at_head(&self) -> Result<TableAt, RpcError> {
        let mut slot = self.table.opened.lock().await;
        let manifest = self.manifest();
        let head = manifest.head_id();
        // A failed write leaves the table poisoned: open it again, which replays it.
        let mut opened = match slot.take() {
            Some(opened) if opened.table.block(BlockIndex::ZERO).is_ok() => opened,
            _ => self.open_table(&manifest).await?,
        };
        while opened.applied < head {
            opened = self.advance(&manifest, opened).await?;
        }
        let at = TableAt {
            table: Arc::clone(&opened.table),
            generation: opened.applied,
        };
        *slot = Some(opened);
        Ok(at)
    }

    /// Applies the next pending change, or everything up to the head from segments.
    async fn advance(&self, manifest: &Manifest, opened: Opened) -> Result<Opened, RpcError> {
        let next = {
            let mut pending = self.table.pending.lock();
            while pending
                .front()
                .is_some_and(|p| p.generation <= opened.applied)
            {
                pending.pop_front();
            }
            pending.pop_front_if(|p| p.base == opened.applied)
        };
        let Opened { table, applied } = opened;
        if let Some(pending) = next {
            let generation = pending.generation;
            let target = Arc::clone(&table);
            blocking(move || apply_overlay(&target, &pending.overlay)).await?;
            return Ok(Opened {
                table,
                applied: generation,
            });
        }
        self.replay(manifest, &table, applied, false).await?;
        if self.matches_head(manifest, &table).await? {
            return Ok(Opened {
                table,
                applied: manifest.head_id(),
            });
        }
        tracing::error!(volume = %self.id, "the checksum table doesn't have the head's digest; it is made anew");
        drop(table);
        self.make_table(manifest).await
    }

    async fn open_table(&self, manifest: &Manifest) -> Result<Opened, RpcError> {
        let path = self.table_path();
        let (volume, geometry, head) = (self.id, manifest.geometry, manifest.head_id());
        let opened = blocking(move || Ok(ChecksumTable::open(&path, volume, geometry))).await?;
        match opened {
            Ok(table) if table.stamp() <= head => {
                let opened = Opened {
                    applied: table.stamp(),
                    table: Arc::new(table),
                };
                // What was applied after the stamp may have reached the disk in part: apply it again, groups and
                // leaves with it.
                if opened.applied < head {
                    self.replay(manifest, &opened.table, opened.applied, true)
                        .await?;
                    let table = Arc::clone(&opened.table);
                    blocking(move || table.rebuild_upper_levels()).await?;
                }
                if self.matches_head(manifest, &opened.table).await? {
                    return Ok(Opened {
                        applied: head,
                        ..opened
                    });
                }
                tracing::error!(volume = %self.id, "the checksum table doesn't have the head's digest; it is made anew");
            }
            Ok(table) => {
                tracing::error!(
                    volume = %self.id, committed = %table.stamp(), newest = %head,
                    "this vault has committed a newer generation than its store has: the store was put back from a \
                     copy, or its newest manifest is lost; the source ships what differs"
                );
            }
            Err(TableError::Missing(_)) => {}
            Err(error) => {
                tracing::warn!(volume = %self.id, %error, "the checksum table is made anew")
            }
        }
        self.make_table(manifest).await
    }

    fn table_path(&self) -> PathBuf {
        self.table.files.dir.join(self.id.to_string())
    }

    /// Makes the table anew from the segments.
    async fn make_table(&self, manifest: &Manifest) -> Result<Opened, RpcError> {
        let path = self.table_path();
        let (volume, geometry, head) = (self.id, manifest.geometry, manifest.head_id());
        let table = blocking(move || {
            ChecksumTable::create(&path, volume, geometry).map_err(std::io::Error::other)
        })
        .await?;
        let table = Arc::new(table);
        self.replay(manifest, &table, GenerationId::ZERO, false)
            .await?;
        if !self.matches_head(manifest, &table).await? {
            return Err(RpcError::new(
                tidemark_proto::Reason::StoreCorrupt,
                format!(
                    "volume {}: its segments don't give the digest of generation {head}",
                    self.id
                ),
                "restore an older generation, and report it",
            ));
        }
        Ok(Opened {
            table,
            applied: head,
        })
    }

    async fn matches_head(
        &self,
        manifest: &Manifest,
        table: &Arc<ChecksumTable>,
    ) -> Result<bool, RpcError> {
        let Some(head) = manifest.head() else {
            return Ok(true);
        };
        let table = Arc::clone(table);
        let digest = blocking(move || table.digest()).await?;
        Ok(digest == head.digest)
    }

    /// Applies the newest version of every block that changed after generation `above`, from the segments.
    async fn replay(
        &self,
        manifest: &Manifest,
        table: &Arc<ChecksumTable>,
        above: GenerationId,
        again: bool,
    ) -> Result<(), RpcError> {
        let geometry = manifest.geometry;
        let above = Sequence::new(above.get());
        let everything = self
            .segments(manifest, geometry.all(), above)
            .await
            .map_err(|e| of_store(&e))?;
        let newest = Sequence::new(u64::MAX);
        for (window, records) in ByWindow::new(geometry, &everything) {
            let indexes = self
                .indexes(manifest, &records)
                .await
                .map_err(|e| of_store(&e))?;
            let mut runs: Vec<(Extent, Vec<Checksum128>)> = Vec::new();
            let pieces = overlay(indexes.iter().map(AsRef::as_ref), window, newest);
            let mut sections: Vec<Option<Vec<Checksum128>>> = vec![None; records.len()];
            for piece in pieces {
                let (i, at) = (piece.source.index as usize, piece.source.entry as usize);
                let entry = &indexes[i].entries()[at];
                if entry.sequence <= above {
                    continue;
                }
                if entry.zero {
                    runs.push((piece.blocks, Vec::new()));
                    continue;
                }
                if sections[i].is_none() {
                    sections[i] = Some(
                        self.store
                            .checksums(&records[i])
                            .await
                            .map_err(|e| of_store(&e))?,
                    );
                }
                let skip = piece.blocks.start().since(entry.blocks.start()).get();
                let first = indexes[i].checksums_of(at).start + usize::try_from(skip).unwrap_or(0);
                let count = usize::try_from(piece.blocks.count().get()).unwrap_or(0);
                if let Some(section) = &sections[i] {
                    runs.push((piece.blocks, section[first..first + count].to_vec()));
                }
            }
            let table = Arc::clone(table);
            blocking(move || apply_runs(&table, &runs, again)).await?;
        }
        Ok(())
    }

    /// Forgets the table and makes it anew where it no longer has the head's digest: then a digest that differs from
    /// the source's was our fault. Returns whether it was.
    pub(crate) async fn recheck_table(&self) -> Result<bool, RpcError> {
        let at = self.table_at_head().await?;
        let was_right = self.matches_head(&self.manifest(), &at.table).await?;
        let table = Arc::clone(&at.table);
        let was_whole = blocking(move || {
            let before = upper_levels(&table)?;
            table.rebuild_upper_levels()?;
            Ok(before == upper_levels(&table)?)
        })
        .await?;
        if self.matches_head(&self.manifest(), &at.table).await? {
            let was_ours = !(was_right && was_whole);
            if was_ours {
                tracing::error!(volume = %self.id, "the checksum table was damaged above its blocks; it has been mended");
            }
            return Ok(was_ours);
        }
        let mut slot = self.table.opened.lock().await;
        *slot = None;
        let path = self.table_path();
        blocking(move || ChecksumTable::remove(&path)).await?;
        drop(slot);
        self.table_at_head().await?;
        Ok(true)
    }

    /// Makes what was applied durable, so that a restart has less to replay.
    pub(crate) async fn stamp_table(&self) -> Result<(), RpcError> {
        let opened = self.table.opened.lock().await.clone();
        let Some(Opened { table, applied }) = opened else {
            return Ok(());
        };
        if table.stamp() >= applied {
            return Ok(());
        }
        blocking(move || table.sync_and_stamp(applied)).await
    }
}

/// Sums up all groups.
fn upper_levels(table: &ChecksumTable) -> std::io::Result<Checksum128> {
    let mut sum = Checksum128::ZERO;
    for leaf in 0..digest::leaf_count(table.geometry()) {
        let children = table.groups(leaf)?;
        let bytes: Vec<u8> = std::iter::once(&sum)
            .chain(&children)
            .flat_map(|checksum| *checksum.as_bytes())
            .collect();
        sum = xxh3_128(&bytes);
    }
    Ok(sum)
}

fn apply_overlay(table: &ChecksumTable, overlay: &Overlay) -> std::io::Result<()> {
    apply_runs(table, &overlay.runs, false)
}

/// `again`: a crash may have torn the same before.
fn apply_runs(
    table: &ChecksumTable,
    runs: &[(Extent, Vec<Checksum128>)],
    again: bool,
) -> std::io::Result<()> {
    for group in runs.chunk_by(|a, b| a.1.is_empty() == b.1.is_empty()) {
        if group[0].1.is_empty() {
            for (blocks, _) in group {
                if again {
                    table.reapply_zero(*blocks)?;
                } else {
                    table.apply_zero(*blocks)?;
                }
            }
            continue;
        }
        let blocks = group
            .iter()
            .flat_map(|(blocks, checksums)| blocks.iter().zip(checksums.iter().copied()));
        if again {
            table.reapply(blocks)?;
        } else {
            table.apply(blocks)?;
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(std::io::Error::other)
        .and_then(|done| done)
        .map_err(|error| of_io("the checksum table", &error))
}
