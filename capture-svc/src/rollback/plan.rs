//! The file that a rollback is carried out from: `rollback` in a volume's state directory.
//!
//! A sealed head, then frames, each behind its length. It gets its name when it is whole and durable.
//! `docs/FORMAT-CAPTURE.md` has its bytes.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use capture_core::rollback::HEAD_LEN;
pub(crate) use capture_core::rollback::Plan;
use tidemark_block::{
    BlockIndex, Checksum128, CodecChoice, Extent, FrameDecoder, FrameEncoder, Geometry,
    UnverifiedFrame, VerifiedFrame, VolumeId,
    frame::{EXTENTS_MAX, blocks_max},
};
use tidemark_disk::durable;

use crate::engine::SnapshotId;

/// Frames hold at most 1 MiB of blocks.
const FRAME_LEN_MAX: u32 = 2 << 20;

/// Where it lies.
pub(super) fn path_in(dir: &Path) -> PathBuf {
    dir.join("rollback")
}

fn temporary_in(dir: &Path) -> PathBuf {
    dir.join("rollback.tmp")
}

/// Removes a plan that never got its name. Gives the snapshot that was taken for it, where it says so.
pub(super) fn remove_unfinished(dir: &Path) -> io::Result<Option<SnapshotId>> {
    let path = temporary_in(dir);
    let kept = File::open(&path)
        .and_then(|mut file| {
            let mut head = [0; HEAD_LEN];
            file.read_exact(&mut head)?;
            Ok(Plan::decode(&head).ok().map(|plan| SnapshotId(plan.kept)))
        })
        .ok()
        .flatten();
    durable::remove_file(&path)?;
    Ok(kept)
}

/// A plan that is being written; nothing happens for it yet.
pub(super) struct Draft {
    dir: PathBuf,
    plan: Plan,
    file: BufWriter<File>,
    encoder: FrameEncoder,
    frame: Vec<u8>,
    blocks: Vec<(BlockIndex, Checksum128)>,
    data: Vec<u8>,
    zeros: Vec<Extent>,
}

impl Draft {
    pub(super) fn create(
        dir: &Path,
        volume: VolumeId,
        geometry: Geometry,
        snapshot: SnapshotId,
        kept: SnapshotId,
    ) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // It holds what the volume held.
            .mode(0o600)
            .open(temporary_in(dir))?;
        let plan = Plan {
            volume,
            geometry,
            snapshot: snapshot.0,
            kept: kept.0,
            blocks: 0,
            frames: 0,
            frame_bytes: 0,
        };
        // At once: whoever finds it knows which snapshot was taken for it.
        file.write_all(&plan.encode())?;
        Ok(Self {
            dir: dir.to_owned(),
            plan,
            file: BufWriter::with_capacity(1 << 20, file),
            encoder: FrameEncoder::new(geometry),
            frame: Vec::new(),
            blocks: Vec::new(),
            data: Vec::new(),
            zeros: Vec::new(),
        })
    }

    /// Blocks that differ, so far.
    pub(super) const fn blocks(&self) -> u64 {
        self.plan.blocks
    }

    /// The block is to hold these bytes. Blocks come in ascending order.
    pub(super) fn data(
        &mut self,
        block: BlockIndex,
        checksum: Checksum128,
        bytes: &[u8],
    ) -> io::Result<()> {
        self.plan.blocks += 1;
        self.blocks.push((block, checksum));
        self.data.extend_from_slice(bytes);
        if self.blocks.len() == blocks_max(self.plan.geometry.block_size()) {
            self.close_data()?;
        }
        Ok(())
    }

    /// The block is to be zero.
    pub(super) fn zero(&mut self, block: BlockIndex) -> io::Result<()> {
        self.plan.blocks += 1;
        let one = Extent::between(block, block.next());
        match self.zeros.last_mut() {
            Some(last) if last.end() == block && last.count().get() < u64::from(u32::MAX) => {
                *last = Extent::between(last.start(), one.end());
            }
            _ => {
                if self.zeros.len() == EXTENTS_MAX {
                    self.close_zeros()?;
                }
                self.zeros.push(one);
            }
        }
        Ok(())
    }

    fn close_data(&mut self) -> io::Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        self.encoder
            .encode_data(&self.blocks, &self.data, CodecChoice::Raw, &mut self.frame);
        self.blocks.clear();
        self.data.clear();
        self.put_frame()
    }

    fn close_zeros(&mut self) -> io::Result<()> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        self.encoder.encode_zero(&self.zeros, &mut self.frame);
        self.zeros.clear();
        self.put_frame()
    }

    fn put_frame(&mut self) -> io::Result<()> {
        let len = u32::try_from(self.frame.len()).unwrap_or(u32::MAX);
        self.file.write_all(&len.to_le_bytes())?;
        self.file.write_all(&self.frame)?;
        self.plan.frames += 1;
        self.plan.frame_bytes += 4 + u64::from(len);
        self.frame.clear();
        Ok(())
    }

    /// Makes it durable and gives it its name: from now on the rollback happens.
    pub(super) fn decide(mut self) -> io::Result<Plan> {
        self.close_data()?;
        self.close_zeros()?;
        let mut file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&self.plan.encode())?;
        file.sync_all()?;
        durable::rename(&temporary_in(&self.dir), &path_in(&self.dir))?;
        Ok(self.plan)
    }
}

/// A plan that was decided on.
pub(super) struct Decided {
    pub(super) plan: Plan,
    file: BufReader<File>,
}

impl Decided {
    /// The plan of a state directory; none where there is none.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>> {
        let file = match File::open(path_in(dir)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let length = file.metadata()?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut head = [0; HEAD_LEN];
        file.read_exact(&mut head).context("its head")?;
        let plan = Plan::decode(&head)?;
        if plan.frame_bytes.checked_add(HEAD_LEN as u64) != Some(length) {
            bail!("it has {length} bytes, its head says otherwise");
        }
        Ok(Some(Self { plan, file }))
    }

    /// Gives each frame to `each`, verified; begins at the first one whenever it is called.
    pub(super) fn frames(
        &mut self,
        mut each: impl FnMut(&VerifiedFrame) -> Result<()>,
    ) -> Result<()> {
        self.file.seek(SeekFrom::Start(HEAD_LEN as u64))?;
        let mut decoder = FrameDecoder::new();
        let mut blocks = 0;
        for _ in 0..self.plan.frames {
            let mut len = [0; 4];
            self.file.read_exact(&mut len)?;
            let len = u32::from_le_bytes(len);
            if len > FRAME_LEN_MAX {
                bail!("a frame of {len} bytes");
            }
            let mut bytes = vec![0; len as usize];
            self.file.read_exact(&mut bytes)?;
            let (frame, rest) = UnverifiedFrame::split(Bytes::from(bytes))?;
            if !rest.is_empty() {
                bail!("bytes behind a frame");
            }
            let frame = frame.verify(self.plan.geometry, &mut decoder)?;
            blocks += frame.block_count().get();
            each(&frame)?;
        }
        if blocks != self.plan.blocks {
            bail!("{blocks} blocks, its head says {}", self.plan.blocks);
        }
        Ok(())
    }
}
