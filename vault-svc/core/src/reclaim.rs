//! Reclaim: which segments go, and which are rewritten first. Plans only; nothing here reads or deletes.
//!
//! Three reasons to touch segments, each with a bound on what it may cost:
//! - **space**: stored bytes above [`Policy::start`] of what a perfect rewrite would take. Finding out needs a sweep
//!   over all indexes, so it is run only when what was retired since the last one could have pushed the ratio there
//!   ([`SpaceEstimate`]); victims are those with the most dead bytes, until the ratio is at [`Policy::stop`];
//! - **depth**: too many segments over the same blocks, which makes reading slow. Seen from the records alone;
//! - **count**: too many small segments, which makes manifests long. Seen from the records alone.
//!
//! For depth and count liveness is computed among the victims only, which can keep a dead block for longer, never
//! drop a live one.

use std::collections::HashMap;

use tidemark_block::SegmentId;

use crate::{
    image::LivePiece,
    segment::{SegmentIndex, SegmentRecord},
};

/// When to do what. Ratios are hundredths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Rewriting begins above this many stored bytes per 100 live ones.
    pub start: u64,
    /// And goes on until this.
    pub stop: u64,
    /// A segment below this many bytes is small.
    pub small_bytes: u64,
    /// More small segments than this are merged.
    pub small_max: usize,
    /// More segments over the same blocks than this are merged.
    pub depth_max: usize,
    /// Bytes of victims of one round: bounds its time and the space it needs before it frees any.
    pub round_bytes: u64,
    /// Victims of one round: bounds its memory.
    pub round_segments: usize,
    /// Frame bytes of a segment that reclaim writes.
    pub segment_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            start: 125,
            stop: 115,
            small_bytes: 4 << 20,
            small_max: 64,
            depth_max: 64,
            round_bytes: 512 << 20,
            round_segments: 128,
            segment_bytes: 16 << 20,
        }
    }
}

/// A segment and what of it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// The segment.
    pub record: SegmentRecord,
    /// Bytes that a rewrite of its live blocks would take.
    pub live_bytes: u64,
}

/// Why segments are rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Too many dead bytes.
    Space,
    /// Too many segments over the same blocks.
    Depth,
    /// Too many small segments.
    Count,
}

/// One round of reclaim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Nothing of these is needed: condemned as they are.
    pub dead: Vec<SegmentRecord>,
    /// The live part of these moves to new segments; then they are condemned.
    pub rewrite: Vec<SegmentRecord>,
    /// Why.
    pub reason: Reason,
}

impl Plan {
    /// All that will be condemned.
    pub fn victims(&self) -> impl Iterator<Item = &SegmentRecord> {
        self.dead.iter().chain(&self.rewrite)
    }
}

/// Adds up what is live, window by window.
#[derive(Debug, Default)]
pub struct Tally {
    live: HashMap<SegmentId, u64>,
}

impl Tally {
    /// Counts the live pieces of one window. `records` and `indexes` are in the same order.
    pub fn add<'a>(
        &mut self,
        records: &[SegmentRecord],
        indexes: &[impl AsRef<SegmentIndex>],
        pieces: impl IntoIterator<Item = &'a LivePiece>,
    ) {
        for live in pieces {
            let at = live.piece.source.index as usize;
            let entry = &indexes[at].as_ref().entries()[live.piece.source.entry as usize];
            // A zero above nothing is not needed: a block without any version is zero.
            if !(entry.zero && live.oldest) {
                *self.live.entry(records[at].id).or_insert(0) +=
                    entry.bytes_of(live.piece.blocks.count());
            }
        }
    }

    /// The result, in the order of `records`. Nothing counts for more than its segment has.
    #[must_use]
    pub fn finish(&self, records: &[SegmentRecord]) -> Vec<Liveness> {
        let of = |record: &SegmentRecord| Liveness {
            record: *record,
            live_bytes: self
                .live
                .get(&record.id)
                .copied()
                .unwrap_or(0)
                .min(record.file_len),
        };
        records.iter().map(of).collect()
    }
}

/// Bytes that every segment has, whatever is in it: rewriting doesn't save them.
const FIXED_BYTES: u64 = 512;

impl Liveness {
    /// Bytes that a rewrite would save.
    const fn dead_bytes(&self) -> u64 {
        self.record
            .file_len
            .saturating_sub(self.live_bytes)
            .saturating_sub(FIXED_BYTES)
    }
}

/// Sums of a sweep: stored bytes, live bytes.
#[must_use]
pub fn totals(segments: &[Liveness]) -> (u64, u64) {
    (
        segments.iter().map(|segment| segment.record.file_len).sum(),
        segments.iter().map(|segment| segment.live_bytes).sum(),
    )
}

/// The most victims of a round, where the manifest's list of condemned objects has room for `room` more: each may
/// cost its page as well.
const fn victims_max(room: usize) -> usize {
    room / 2
}

/// What to do about dead bytes, in a manifest that has room for `room` more condemned objects; `None` where nothing
/// is worth it or there is no room.
#[must_use]
pub fn plan_space(segments: &[Liveness], policy: &Policy, room: usize) -> Option<Plan> {
    let (mut dead, mut rest): (Vec<Liveness>, Vec<Liveness>) =
        segments.iter().partition(|segment| segment.live_bytes == 0);
    dead.truncate(victims_max(room));
    let rewrites = policy.round_segments.min(victims_max(room) - dead.len());
    let live: u64 = rest.iter().map(|segment| segment.live_bytes).sum();
    let mut stored: u64 = live + rest.iter().map(Liveness::dead_bytes).sum::<u64>();
    let mut rewrite = Vec::new();
    if stored * 100 > live * policy.start {
        // Most dead per byte first: dead_a / len_a > dead_b / len_b.
        let share =
            |a: &Liveness, b: &Liveness| u128::from(a.dead_bytes()) * u128::from(b.record.file_len);
        rest.sort_by(|a, b| share(b, a).cmp(&share(a, b)));
        let mut bytes = 0;
        for segment in rest {
            let enough = stored * 100 <= live * policy.stop;
            if enough || bytes >= policy.round_bytes || rewrite.len() >= rewrites {
                break;
            }
            // Rewriting what is nearly all alive frees next to nothing.
            if segment.dead_bytes() * 64 < segment.record.file_len {
                break;
            }
            stored -= segment.dead_bytes();
            bytes += segment.record.file_len;
            rewrite.push(segment.record);
        }
    }
    let dead: Vec<_> = dead.into_iter().map(|segment| segment.record).collect();
    (!dead.is_empty() || !rewrite.is_empty()).then_some(Plan {
        dead,
        rewrite,
        reason: Reason::Space,
    })
}

/// What to do about many segments over the same blocks, or many small ones; `None` where there are not. `room` is as
/// for [`plan_space`].
#[must_use]
pub fn plan_merge(records: &[SegmentRecord], policy: &Policy, room: usize) -> Option<Plan> {
    let (reason, mut candidates) = match deepest(records) {
        Some((depth, at)) if depth > policy.depth_max => {
            let over: Vec<_> = records
                .iter()
                .filter(|record| record.blocks.contains(at))
                .copied()
                .collect();
            (Reason::Depth, over)
        }
        _ => {
            let small: Vec<_> = records
                .iter()
                .filter(|record| record.file_len < policy.small_bytes)
                .copied()
                .collect();
            if small.len() <= policy.small_max {
                return None;
            }
            (Reason::Count, small)
        }
    };
    candidates.sort_by_key(|record| (record.file_len, record.id));
    let most = match reason {
        // The smallest ones are merged until half the depth is left.
        Reason::Depth => candidates.len() - policy.depth_max / 2,
        Reason::Space | Reason::Count => candidates.len(),
    };
    let mut bytes = 0;
    let rewrite: Vec<_> = candidates
        .into_iter()
        .take(most.min(policy.round_segments).min(victims_max(room)))
        .take_while(|record| {
            bytes += record.file_len;
            bytes <= policy.round_bytes
        })
        .collect();
    (rewrite.len() > 1).then_some(Plan {
        dead: Vec::new(),
        rewrite,
        reason,
    })
}

/// The block that most segments span, and how many do.
fn deepest(records: &[SegmentRecord]) -> Option<(usize, tidemark_block::BlockIndex)> {
    let mut events: Vec<_> = records
        .iter()
        .filter(|record| !record.blocks.is_empty())
        .flat_map(|record| [(record.blocks.start(), 1_i64), (record.blocks.end(), -1)])
        .collect();
    // Ends sort before starts at the same block.
    events.sort_unstable();
    let (mut depth, mut found) = (0_i64, None);
    for (block, change) in events {
        depth += change;
        if found.is_none_or(|(most, _)| depth > most) {
            found = Some((depth, block));
        }
    }
    found.map(|(depth, block)| (usize::try_from(depth).unwrap_or(0), block))
}

/// Whether a sweep is worth it: a bound on the dead bytes, kept up to date without reading anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceEstimate {
    live: u64,
    dead: u64,
    doubt: u64,
}

impl SpaceEstimate {
    /// After a sweep.
    #[must_use]
    pub const fn exact(stored: u64, live: u64) -> Self {
        Self {
            live,
            dead: stored.saturating_sub(live),
            doubt: 0,
        }
    }

    /// A generation was retired: the versions that the next retained one replaced are not needed any more, at most
    /// `changed_blocks` of them.
    pub const fn retired(&mut self, changed_blocks: u64, block_size: u32) {
        let per_block = block_size as u64 + 64;
        self.doubt = self
            .doubt
            .saturating_add(changed_blocks.saturating_mul(per_block));
    }

    /// Live bytes at the last sweep.
    #[must_use]
    pub const fn live_bytes(&self) -> u64 {
        self.live
    }

    /// Whether there may be more dead bytes than the policy suffers, with `stored` bytes in all.
    #[must_use]
    pub fn may_need_space(&self, stored: u64, policy: &Policy) -> bool {
        let live_at_least = stored.saturating_sub(self.dead).saturating_sub(self.doubt);
        let worth_it = self.doubt.saturating_mul(20) >= self.live;
        worth_it && stored.saturating_mul(100) > live_at_least.saturating_mul(policy.start)
    }
}

#[cfg(test)]
mod tests {
    use tidemark_block::{BlockCount, BlockIndex, Extent, IntervalId, Sequence};

    use super::*;
    use crate::manifest::CONDEMNED_MAX;
    use crate::segment::{FOOTER_LEN, FRAMES_AT, SegmentKind};

    fn record(n: u8, blocks: (u64, u64), bytes: u64) -> SegmentRecord {
        SegmentRecord {
            id: SegmentId {
                origin: IntervalId::from_bytes([n; 16]),
                part: 0,
            },
            kind: SegmentKind::Received,
            sequences: (Sequence::new(1), Sequence::new(1)),
            blocks: Extent::between(BlockIndex::new(blocks.0), BlockIndex::new(blocks.1)),
            file_len: bytes,
            index_at: bytes.saturating_sub(FOOTER_LEN).max(FRAMES_AT),
            index_len: 0,
            checksums_len: 0,
            data_blocks: BlockCount::ZERO,
        }
    }

    fn life(n: u8, bytes: u64, live_bytes: u64) -> Liveness {
        Liveness {
            record: record(n, (0, 10), bytes),
            live_bytes,
        }
    }

    fn names(plan: &Plan) -> (Vec<u8>, Vec<u8>) {
        let name = |record: &SegmentRecord| record.id.origin.as_bytes()[0];
        (
            plan.dead.iter().map(name).collect(),
            plan.rewrite.iter().map(name).collect(),
        )
    }

    #[test]
    fn dead_segments_go_and_the_deadest_are_rewritten_until_it_is_enough() {
        let policy = Policy::default();
        let none = [life(1, 100_000, 90_000), life(2, 100_000, 90_000)];
        assert_eq!(plan_space(&none, &policy, CONDEMNED_MAX), None);
        let dead = [life(1, 100_000, 90_000), life(2, 100_000, 0)];
        assert_eq!(
            names(&plan_space(&dead, &policy, CONDEMNED_MAX).unwrap()),
            (vec![2], vec![])
        );
        let some = [
            life(1, 100_000, 100_000),
            life(2, 100_000, 50_000),
            life(3, 100_000, 10_000),
            life(4, 100_000, 90_000),
        ];
        // 400,000 stored, 250,000 live; without the dead of 3 and 2: 260,000.
        assert_eq!(
            names(&plan_space(&some, &policy, CONDEMNED_MAX).unwrap()),
            (vec![], vec![3, 2])
        );
    }

    #[test]
    fn a_round_is_bounded() {
        let policy = Policy {
            round_segments: 3,
            ..Policy::default()
        };
        let many: Vec<_> = (0..10).map(|n| life(n, 100_000, 10)).collect();
        assert_eq!(
            plan_space(&many, &policy, CONDEMNED_MAX)
                .unwrap()
                .rewrite
                .len(),
            3
        );
    }

    #[test]
    fn a_plan_condemns_no_more_than_the_manifest_has_room_for() {
        let policy = Policy {
            small_max: 3,
            ..Policy::default()
        };
        let dead = |n: u16| Liveness {
            record: SegmentRecord {
                id: SegmentId {
                    origin: IntervalId::from_bytes([7; 16]),
                    part: n.into(),
                },
                ..record(7, (0, 10), 100_000)
            },
            live_bytes: u64::from(n >= 5000) * 10,
        };
        let many: Vec<_> = (0..6000).map(dead).collect();
        let records: Vec<_> = many.iter().map(|segment| segment.record).collect();
        for room in [0, 1, 2, 3, 40, 4000, CONDEMNED_MAX] {
            let space = plan_space(&many, &policy, room);
            let merge = plan_merge(&records, &policy, room);
            for plan in space.iter().chain(&merge) {
                // Each in a page of its own.
                assert!(2 * plan.victims().count() <= room, "room for {room}");
            }
            assert_eq!(space.is_some(), room > 1);
            assert_eq!(merge.is_some(), room > 3);
        }
        // What is dead goes first, then there is room for the others.
        let few = plan_space(&many[4990..], &policy, 40).unwrap();
        assert_eq!((few.dead.len(), few.rewrite.len()), (10, 10));
    }

    #[test]
    fn many_small_segments_are_merged() {
        let policy = Policy {
            small_max: 3,
            ..Policy::default()
        };
        let apart = |count: u8| -> Vec<_> {
            (0..count)
                .map(|n| record(n, (u64::from(n) * 10, u64::from(n) * 10 + 5), 1000))
                .collect()
        };
        assert_eq!(plan_merge(&apart(3), &policy, CONDEMNED_MAX), None);
        let plan = plan_merge(&apart(4), &policy, CONDEMNED_MAX).unwrap();
        assert_eq!((plan.rewrite.len(), plan.reason), (4, Reason::Count));
    }

    #[test]
    fn many_segments_over_the_same_blocks_are_merged_the_smallest_first() {
        let policy = Policy {
            depth_max: 4,
            ..Policy::default()
        };
        let mut records: Vec<_> = (0..6)
            .map(|n| record(n, (u64::from(n), 100), 8 << 20))
            .collect();
        records[5].file_len = 5 << 20;
        records.push(record(9, (200, 300), 8 << 20));
        let plan = plan_merge(&records, &policy, CONDEMNED_MAX).unwrap();
        assert_eq!(plan.reason, Reason::Depth);
        assert_eq!(names(&plan).1, [5, 0, 1, 2]);
    }

    #[test]
    fn a_sweep_is_run_only_when_it_could_find_enough() {
        let policy = Policy::default();
        let mut estimate = SpaceEstimate::exact(1 << 30, 1 << 30);
        assert!(!estimate.may_need_space(1 << 30, &policy));
        estimate.retired(1000, 4096);
        assert!(!estimate.may_need_space(1 << 30, &policy));
        estimate.retired(60_000, 4096);
        assert!(estimate.may_need_space(1 << 30, &policy));
        assert!(
            !estimate.may_need_space(8 << 30, &policy),
            "new bytes are alive"
        );
    }
}
