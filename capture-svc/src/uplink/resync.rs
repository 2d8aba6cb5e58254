//! Makes the checksum table that of the vault's head: a walk down the tree, into what differs only.
//!
//! Leaves, then the groups of leaves that differ, then the blocks of groups that differ. Differing blocks join the
//! engine's doubt, durably, before the table is told: a walk that is broken off finds them again or has them in doubt.

use std::{io, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Checksum128, Extent, GenerationId, ImageDigest, TableView,
    VolumeId, WriterTerm,
    digest::{FANOUT, group_count, leaf_count},
};
use tidemark_disk::ChecksumTable;
use tidemark_proto::{
    RpcError,
    convert::{DigestLevel, DigestRun, DigestsRequest, NodeRange},
    vault::v1::GetBlockDigestsRequest,
};

use super::link::{Link, bad_answer, stalled};
use crate::engine::Engine;

/// Nodes asked for in one call, at most: bounds what is held in memory.
const NODES_PER_CALL: u64 = 64 << 10;
/// Ranges of one call.
const RANGES_PER_CALL: usize = 1024;
const STALL_MAX: Duration = Duration::from_secs(120);

/// Why a resync ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResyncError {
    /// The vault, or the way to it.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// The checksum table.
    #[error("use the checksum table: {0}")]
    Table(io::Error),
    /// Something else here.
    #[error("{0:#}")]
    Local(#[from] anyhow::Error),
}

/// Whose table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) volume: VolumeId,
    pub(crate) term: WriterTerm,
    /// 0: the table of the all-zero image, for which the vault isn't asked.
    pub(crate) generation: GenerationId,
    pub(crate) digest: Option<ImageDigest>,
}

/// What the walk needs of the rest.
pub(crate) trait Doubt: Clone + Send + 'static {
    /// Puts blocks into the next interval, durably.
    fn doubt(&self, blocks: &BlockSet) -> Result<()>;
}

/// The doubt of a volume's engine.
#[derive(Debug, Clone)]
pub(crate) struct EngineDoubt(pub(crate) Arc<Engine>);

impl Doubt for EngineDoubt {
    fn doubt(&self, blocks: &BlockSet) -> Result<()> {
        if !blocks.is_empty() {
            self.0.doubt(blocks).context("put blocks in doubt")?;
        }
        Ok(())
    }
}

/// Walks; returns how many blocks differed.
pub(crate) async fn resync(
    link: &Link,
    target: Target,
    table: &Arc<ChecksumTable>,
    doubt: impl Doubt,
) -> Result<u64, ResyncError> {
    // What a crash tore is made whole first; otherwise equal leaves could stand above differing blocks.
    blocking(table, |table| table.rebuild_upper_levels()).await?;
    if target.generation == GenerationId::ZERO {
        blocking(table, |table| table.apply_zero(table.geometry().all())).await?;
        return Ok(0);
    }
    let geometry = table.geometry();
    let mut differing = 0;
    let mut at = 0;
    let leaves = leaf_count(geometry);
    while at < leaves {
        let range = NodeRange {
            start: at,
            count: NODES_PER_CALL.min(leaves - at),
        };
        let theirs = fetch(link, target, DigestLevel::Leaf, vec![range]).await?;
        let wrong = compare_leaves(table, range, theirs).await?;
        for part in wrong.chunks(RANGES_PER_CALL) {
            let groups = descend(link, target, table, DigestLevel::Group, part).await?;
            for part in groups.chunks(RANGES_PER_CALL) {
                differing += fix_blocks(link, target, table, &doubt, part).await?;
            }
        }
        at += range.count;
    }
    let found = blocking(table, |table| table.digest()).await?;
    if target.digest.is_some_and(|digest| digest != found) {
        return Err(ResyncError::Local(anyhow::anyhow!(
            "the vault's checksum table of generation {} gives image digest {found}, its manifest another one: \
             check the vault's log",
            target.generation
        )));
    }
    Ok(differing)
}

async fn blocking<T: Send + 'static>(
    table: &Arc<ChecksumTable>,
    work: impl FnOnce(&ChecksumTable) -> io::Result<T> + Send + 'static,
) -> Result<T, ResyncError> {
    let table = Arc::clone(table);
    let done = tokio::task::spawn_blocking(move || work(&table)).await;
    done.context("join the table's work")?
        .map_err(ResyncError::Table)
}

/// The nodes of `ranges` that the vault has, those that are zero left out.
async fn fetch(
    link: &Link,
    target: Target,
    level: DigestLevel,
    ranges: Vec<NodeRange>,
) -> Result<Vec<DigestRun>, ResyncError> {
    let asked: u64 = ranges.iter().map(|range| range.count).sum();
    let request = DigestsRequest {
        volume: target.volume,
        term: target.term,
        generation: target.generation,
        level,
        ranges,
    };
    let mut client = link.client();
    let call = client.get_block_digests(GetBlockDigestsRequest::from(request));
    let mut answers = tokio::time::timeout(STALL_MAX, call)
        .await
        .map_err(|_| stalled())?
        .map_err(RpcError::from)?
        .into_inner();
    let mut runs: Vec<DigestRun> = Vec::new();
    let mut nodes = 0;
    loop {
        let answer = tokio::time::timeout(STALL_MAX, answers.message())
            .await
            .map_err(|_| stalled())?
            .map_err(RpcError::from)?;
        let Some(answer) = answer else {
            return Ok(runs);
        };
        let run = DigestRun::try_from(answer).map_err(bad_answer)?;
        nodes += run.digests.len() as u64;
        let after = runs
            .last()
            .is_none_or(|last| last.start + last.digests.len() as u64 <= run.start);
        if nodes > asked || !after {
            return Err(ResyncError::Rpc(bad_answer(
                tidemark_proto::convert::WireError::Range {
                    field: "start",
                    value: run.start,
                },
            )));
        }
        runs.push(run);
    }
}

/// The digest of each node of ascending ranges, those that the vault left out being zero.
struct Nodes {
    runs: Vec<DigestRun>,
    at: usize,
}

impl Nodes {
    const fn new(runs: Vec<DigestRun>) -> Self {
        Self { runs, at: 0 }
    }

    fn get(&mut self, node: u64) -> Checksum128 {
        while let Some(run) = self.runs.get(self.at) {
            if node < run.start {
                return Checksum128::ZERO;
            }
            match usize::try_from(node - run.start) {
                Ok(n) if n < run.digests.len() => return run.digests[n],
                _ => self.at += 1,
            }
        }
        Checksum128::ZERO
    }
}

async fn compare_leaves(
    table: &Arc<ChecksumTable>,
    range: NodeRange,
    theirs: Vec<DigestRun>,
) -> Result<Vec<u64>, ResyncError> {
    blocking(table, move |table| {
        let mut theirs = Nodes::new(theirs);
        let mut ours = vec![Checksum128::ZERO; 4096];
        let mut wrong = Vec::new();
        let mut first = range.start;
        let end = range.start + range.count;
        while first < end {
            let count = usize::try_from(end - first).map_or(ours.len(), |n| n.min(ours.len()));
            table.leaves(first, &mut ours[..count])?;
            for (leaf, our) in (first..).zip(&ours[..count]) {
                if theirs.get(leaf) != *our {
                    wrong.push(leaf);
                }
            }
            first += count as u64;
        }
        Ok(wrong)
    })
    .await
}

/// The groups below `leaves` that differ.
async fn descend(
    link: &Link,
    target: Target,
    table: &Arc<ChecksumTable>,
    level: DigestLevel,
    leaves: &[u64],
) -> Result<Vec<u64>, ResyncError> {
    let groups = group_count(table.geometry());
    let fanout = FANOUT as u64;
    let children = |leaf: u64| NodeRange {
        start: leaf * fanout,
        count: fanout.min(groups - leaf * fanout),
    };
    let ranges = leaves.iter().map(|leaf| children(*leaf)).collect();
    let theirs = fetch(link, target, level, ranges).await?;
    let leaves = leaves.to_vec();
    blocking(table, move |table| {
        let mut theirs = Nodes::new(theirs);
        let mut wrong = Vec::new();
        for leaf in leaves {
            let ours = table.groups(leaf)?;
            let range = leaf * fanout..(leaf * fanout + fanout).min(groups);
            for (group, our) in range.zip(ours) {
                if theirs.get(group) != our {
                    wrong.push(group);
                }
            }
        }
        Ok(wrong)
    })
    .await
}

/// Fixes the blocks below `groups`; returns how many differed.
async fn fix_blocks(
    link: &Link,
    target: Target,
    table: &Arc<ChecksumTable>,
    doubt: &impl Doubt,
    groups: &[u64],
) -> Result<u64, ResyncError> {
    let geometry = table.geometry();
    let extent = move |group| tidemark_block::digest::group_extent(geometry, group);
    let ranges = groups
        .iter()
        .map(|group| NodeRange {
            start: extent(*group).start().get(),
            count: extent(*group).count().get(),
        })
        .collect();
    let theirs = fetch(link, target, DigestLevel::Block, ranges).await?;
    let (groups, doubt) = (groups.to_vec(), doubt.clone());
    let table = Arc::clone(table);
    let fixed = tokio::task::spawn_blocking(move || -> Result<u64, ResyncError> {
        let mut theirs = Nodes::new(theirs);
        let mut fixes: Vec<(BlockIndex, Checksum128)> = Vec::new();
        let mut differing = BlockSet::new();
        for group in groups {
            let ours = table.blocks(group).map_err(ResyncError::Table)?;
            for (block, our) in extent(group).iter().zip(ours) {
                let their = theirs.get(block.get());
                if their != our {
                    fixes.push((block, their));
                    differing.insert(Extent::new(block, BlockCount::new(1)));
                }
            }
        }
        doubt.doubt(&differing)?;
        let count = fixes.len() as u64;
        table.apply(fixes).map_err(ResyncError::Table)?;
        Ok(count)
    });
    fixed.await.context("join the table's work")?
}
