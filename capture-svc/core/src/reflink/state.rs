//! What is recorded of a volume's clones: which one is the base, which the open interval, which are snapshots.
//!
//! One record, replaced as a whole. A clone that it doesn't name does not exist; so each step is "make the clone, name
//! it" or "stop naming it, remove it", and a crash between the two leaves a file that the next opening removes.

use thiserror::Error;
use tidemark_block::{
    BlockSet, BlockSize, Coherence, CutReason, Extent, Geometry, VolumeId,
    wire::{Reader, WireError, seal, unseal},
};

use crate::engine::records::{FileIdentity, LABEL_MAX, grade, no_grade, put_grade};

/// Magic of [`State::encode`].
pub const REFLINK_MAGIC: [u8; 8] = *b"TMREFLNK";
const VERSION: u16 = 2;
/// From this version on the grades of snapshots are recorded.
const GRADED: u16 = 2;
/// Cuts and numbers only ever rise: there must be room to.
const COUNTER_MAX: u64 = 1 << 62;
/// The longest path of the clones' directory.
pub const DIR_BYTES_MAX: usize = 4096;

/// One clone, and what tells its file from every other one, and from itself after somebody wrote to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloneFile {
    /// Its cut, which is also its name.
    pub cut: u64,
    /// Number of its inode.
    pub inode: u64,
    /// When it was created: seconds since 1970.
    pub born_s: i64,
    /// And nanoseconds.
    pub born_ns: u32,
    /// When it was modified: seconds since 1970.
    pub modified_s: i64,
    /// And nanoseconds.
    pub modified_ns: u32,
}

/// What the next clone is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing was committed yet: the all-zero image.
    Zero,
    /// The clone of the last committed cut.
    Clone(CloneFile),
    /// Nothing that is known: every block is in the carry.
    Lost,
}

/// The open interval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenInterval {
    /// The volume at its cut.
    pub clone: CloneFile,
    /// The carry that it took.
    pub doubted: BlockSet,
}

/// A user's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotClone {
    /// Its number, from 1.
    pub id: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// At most [`LABEL_MAX`] bytes.
    pub label: String,
    /// The volume at its cut.
    pub clone: CloneFile,
    /// How good the moment of its cut was.
    pub coherence: Coherence,
    /// Why it was no better.
    pub reason: CutReason,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Whose it is.
    pub volume: VolumeId,
    /// Its shape.
    pub geometry: Geometry,
    /// The kernel's boot when it was opened last.
    pub boot: [u8; 16],
    /// The mount of the state's directory then.
    pub mount: u64,
    /// What tells the volume file from another one: filesystem, inode, time of creation.
    pub file: FileIdentity,
    /// Absolute path of the directory of the clones.
    pub dir: Vec<u8>,
    /// The last cut that was named.
    pub last_cut: u64,
    /// The highest number of a snapshot given so far.
    pub last_id: u64,
    /// What the next clone is compared with.
    pub base: Base,
    /// None where none is open.
    pub interval: Option<OpenInterval>,
    /// What the next interval holds besides what the clones tell.
    pub carry: BlockSet,
    /// Oldest first.
    pub snapshots: Vec<SnapshotClone>,
}

/// A clone that the record names and that is not there as it was.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Loss {
    /// That of the base.
    #[error("the clone of the base, {0}, is missing or was changed: every block is compared")]
    Base(u64),
    /// That of the open interval.
    #[error(
        "the clone of the open interval, {0}, is missing or was changed: it is given up, and every block is compared"
    )]
    Interval(u64),
    /// That of a snapshot.
    #[error("the clone {cut} of snapshot {id} is missing or was changed: the snapshot is gone")]
    Snapshot {
        /// The snapshot's number.
        id: u64,
        /// The clone's.
        cut: u64,
    },
}

/// Why the record can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StateError {
    /// The bytes are no such record.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A label isn't text.
    #[error("a label is not UTF-8")]
    Label,
}

impl State {
    /// Of a volume without any clone yet. `carry`: what the first interval holds besides what differs from the base.
    #[must_use]
    pub fn new(volume: VolumeId, geometry: Geometry, file: FileIdentity, base: Base) -> Self {
        Self {
            volume,
            geometry,
            boot: file.boot,
            mount: 0,
            file,
            dir: Vec::new(),
            last_cut: 0,
            last_id: 0,
            base,
            interval: None,
            carry: BlockSet::new(),
            snapshots: Vec::new(),
        }
    }

    /// Whether something is read from the clone of this cut.
    #[must_use]
    pub fn names(&self, cut: u64) -> bool {
        self.clones().any(|clone| clone.cut == cut)
    }

    /// Every clone that is named.
    pub fn clones(&self) -> impl Iterator<Item = CloneFile> + '_ {
        let base = match self.base {
            Base::Clone(clone) => Some(clone),
            Base::Zero | Base::Lost => None,
        };
        let interval = self.interval.as_ref().map(|interval| interval.clone);
        let snapshots = self.snapshots.iter().map(|snapshot| snapshot.clone);
        base.into_iter().chain(interval).chain(snapshots)
    }

    /// Puts every block into the next interval.
    pub fn doubt_everything(&mut self) {
        self.carry = std::iter::once(self.geometry.all()).collect();
    }

    /// Opens the interval of a cut; it takes the carry. None must be open.
    pub fn begin(&mut self, clone: CloneFile) {
        debug_assert!(self.interval.is_none() && clone.cut > self.last_cut);
        self.last_cut = clone.cut;
        let doubted = std::mem::take(&mut self.carry);
        self.interval = Some(OpenInterval { clone, doubted });
    }

    /// Closes the interval: its clone is what the next one is compared with. False where no interval with this cut is
    /// open.
    pub fn commit(&mut self, cut: u64) -> bool {
        match self.interval.take() {
            Some(interval) if interval.clone.cut == cut => {
                self.base = Base::Clone(interval.clone);
                true
            }
            other => {
                self.interval = other;
                false
            }
        }
    }

    /// Closes the interval, whose blocks are `changed`: they are in the next one. The base stays, so that the next clone
    /// shows them too; but bytes that come back to the place where they were before would not be seen as changed since
    /// the interval, which the vault may have committed all the same.
    pub fn give_up(&mut self, changed: &BlockSet) {
        if let Some(interval) = self.interval.take() {
            self.carry.union_with(&interval.doubted);
            self.carry.union_with(changed);
        }
    }

    /// Keeps the clone of a cut as a snapshot without a grade, and gives its number.
    pub fn keep(&mut self, clone: CloneFile, time_ms: u64, label: &str) -> u64 {
        self.last_cut = clone.cut;
        self.last_id += 1;
        let (coherence, reason) = no_grade();
        self.snapshots.push(SnapshotClone {
            id: self.last_id,
            time_ms,
            label: label.to_owned(),
            clone,
            coherence,
            reason,
        });
        self.last_id
    }

    /// Blocks of which a clone of the base may not hold what the base does.
    #[must_use]
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        if !matches!(self.base, Base::Clone(_)) {
            return std::iter::once(extent).collect();
        }
        let mut tracked = self.carry.intersect_extent(extent);
        if let Some(interval) = &self.interval {
            tracked.union_with(&interval.doubted.intersect_extent(extent));
        }
        tracked
    }

    /// Lets go of each clone that `is_there` doesn't find as it was recorded, and says what that costs.
    pub fn missing(&mut self, is_there: impl Fn(CloneFile) -> bool) -> Vec<Loss> {
        let mut lost = Vec::new();
        if let Base::Clone(clone) = self.base
            && !is_there(clone)
        {
            self.base = Base::Lost;
            self.doubt_everything();
            lost.push(Loss::Base(clone.cut));
        }
        if let Some(interval) = &self.interval
            && !is_there(interval.clone)
        {
            lost.push(Loss::Interval(interval.clone.cut));
            self.interval = None;
            self.doubt_everything();
        }
        self.snapshots.retain(|snapshot| {
            let there = is_there(snapshot.clone);
            if !there {
                let (id, cut) = (snapshot.id, snapshot.clone.cut);
                lost.push(Loss::Snapshot { id, cut });
            }
            there
        });
        lost
    }

    /// The record's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.volume.as_bytes().to_vec();
        out.extend_from_slice(&self.geometry.length().to_le_bytes());
        out.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        let base = match self.base {
            Base::Zero => 0_u32,
            Base::Clone(_) => 1,
            Base::Lost => 2,
        };
        out.extend_from_slice(&base.to_le_bytes());
        out.extend_from_slice(&self.boot);
        out.extend_from_slice(&self.mount.to_le_bytes());
        out.extend_from_slice(&self.file.filesystem);
        out.extend_from_slice(&self.file.inode.to_le_bytes());
        out.extend_from_slice(&self.file.born_s.to_le_bytes());
        out.extend_from_slice(&self.file.born_ns.to_le_bytes());
        out.extend_from_slice(&self.last_cut.to_le_bytes());
        out.extend_from_slice(&self.last_id.to_le_bytes());
        put_long(&mut out, &self.dir);
        if let Base::Clone(clone) = self.base {
            put_clone(&mut out, clone);
        }
        put_long(&mut out, &self.carry.encode());
        out.push(u8::from(self.interval.is_some()));
        if let Some(interval) = &self.interval {
            put_clone(&mut out, interval.clone);
            put_long(&mut out, &interval.doubted.encode());
        }
        out.extend_from_slice(&(self.snapshots.len() as u64).to_le_bytes());
        for snapshot in &self.snapshots {
            out.extend_from_slice(&snapshot.id.to_le_bytes());
            out.extend_from_slice(&snapshot.time_ms.to_le_bytes());
            put_clone(&mut out, snapshot.clone);
            put_grade(&mut out, snapshot.coherence, &snapshot.reason);
            let label = &snapshot.label.as_bytes()[..snapshot.label.len().min(LABEL_MAX)];
            out.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(label);
        }
        seal(REFLINK_MAGIC, VERSION, &out)
    }

    /// Decodes the record, that without grades too.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, payload) = unseal(REFLINK_MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let volume = VolumeId::from_bytes(r.array()?);
        let length = r.u64()?;
        let block_size = BlockSize::new(r.u32()?).map_err(|_| WireError::Range("block size"))?;
        let geometry = Geometry::new(length, block_size).map_err(|_| WireError::Range("length"))?;
        let base = r.u32()?;
        let (boot, mount) = (r.array()?, r.u64()?);
        let file = FileIdentity {
            filesystem: r.array()?,
            inode: r.u64()?,
            born_s: i64::from_le_bytes(r.array()?),
            born_ns: r.u32()?,
            ..FileIdentity::default()
        };
        let (last_cut, last_id) = (r.u64()?, r.u64()?);
        let dir = long(&mut r)?.to_vec();
        let base = match base {
            0 => Base::Zero,
            1 => Base::Clone(clone(&mut r)?),
            2 => Base::Lost,
            _ => return Err(WireError::Range("base").into()),
        };
        let all = geometry.all();
        let carry = BlockSet::decode(long(&mut r)?, all)?;
        let interval = match r.u8()? {
            0 => None,
            1 => Some(OpenInterval {
                clone: clone(&mut r)?,
                doubted: BlockSet::decode(long(&mut r)?, all)?,
            }),
            _ => return Err(WireError::Range("interval").into()),
        };
        let mut snapshots = Vec::new();
        for _ in 0..r.u64()? {
            let (id, time_ms, clone) = (r.u64()?, r.u64()?, clone(&mut r)?);
            let (coherence, reason) = match version {
                ..GRADED => no_grade(),
                GRADED.. => grade(&mut r)?,
            };
            let length = r.u8()?.into();
            let label = std::str::from_utf8(r.bytes(length)?).map_err(|_| StateError::Label)?;
            snapshots.push(SnapshotClone {
                id,
                time_ms,
                label: label.to_owned(),
                clone,
                coherence,
                reason,
            });
        }
        r.end()?;
        let state = Self {
            volume,
            geometry,
            boot,
            mount,
            file,
            dir,
            last_cut,
            last_id,
            base,
            interval,
            carry,
            snapshots,
        };
        state.check()?;
        Ok(state)
    }

    /// What every record holds to.
    fn check(&self) -> Result<(), WireError> {
        let ascending = self.snapshots.is_sorted_by(|a, b| a.id < b.id);
        let known = |clone: CloneFile| (1..=self.last_cut).contains(&clone.cut);
        if self.last_cut > COUNTER_MAX || !self.clones().all(known) {
            Err(WireError::Range("cut"))
        } else if self.last_id > COUNTER_MAX
            || !ascending
            || self
                .snapshots
                .iter()
                .any(|snapshot| snapshot.id > self.last_id)
        {
            Err(WireError::Range("number of a snapshot"))
        } else if self.dir.len() > DIR_BYTES_MAX {
            Err(WireError::Range("path of the clones"))
        } else {
            Ok(())
        }
    }
}

fn put_long(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn long<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let length = usize::try_from(r.u64()?).map_err(|_| WireError::Range("length of a field"))?;
    r.bytes(length)
}

fn put_clone(out: &mut Vec<u8>, clone: CloneFile) {
    out.extend_from_slice(&clone.cut.to_le_bytes());
    out.extend_from_slice(&clone.inode.to_le_bytes());
    out.extend_from_slice(&clone.born_s.to_le_bytes());
    out.extend_from_slice(&clone.born_ns.to_le_bytes());
    out.extend_from_slice(&clone.modified_s.to_le_bytes());
    out.extend_from_slice(&clone.modified_ns.to_le_bytes());
}

fn clone(r: &mut Reader<'_>) -> Result<CloneFile, WireError> {
    Ok(CloneFile {
        cut: r.u64()?,
        inode: r.u64()?,
        born_s: i64::from_le_bytes(r.array()?),
        born_ns: r.u32()?,
        modified_s: i64::from_le_bytes(r.array()?),
        modified_ns: r.u32()?,
    })
}

#[cfg(test)]
mod tests;
