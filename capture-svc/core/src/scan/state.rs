//! What is recorded of a volume that is scanned: the open interval, and the file's times when it was the base.
//!
//! One record, replaced as a whole. The file of kept blocks that it doesn't name does not exist.

use tidemark_block::{
    BlockSize, Geometry, VolumeId,
    wire::{Reader, WireError, seal, unseal},
};

use super::moment::FileTimes;
use crate::engine::records::FileIdentity;

/// Magic of [`State::encode`].
pub const SCAN_MAGIC: [u8; 8] = *b"TMSCANNR";
const VERSION: u16 = 1;
/// Cuts only ever rise: there must be room to.
const CUT_MAX: u64 = 1 << 62;

/// At these times the file was a certain image, and nobody was writing it: while it has them it is still the same. Only so
/// within one boot and one mount: a loss of power can take the times back and leave the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The kernel's boot.
    pub boot: [u8; 16],
    /// The mount of the volume file.
    pub mount: u64,
    /// The times.
    pub times: FileTimes,
}

/// The open interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenInterval {
    /// Its cut.
    pub cut: u64,
    /// Bytes of the file of kept blocks; 0 where nothing has changed and there is none.
    pub kept_bytes: u64,
    /// Blocks that differ from the base.
    pub changed: u64,
    /// None where the image of the cut isn't known by times.
    pub proof: Option<Proof>,
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
    /// The last cut that was recorded.
    pub last_cut: u64,
    /// Of the base; none where that isn't known by times.
    pub proof: Option<Proof>,
    /// None where none is open.
    pub interval: Option<OpenInterval>,
}

impl State {
    /// Of a volume of which nothing was cut yet.
    #[must_use]
    pub const fn new(volume: VolumeId, geometry: Geometry, file: FileIdentity) -> Self {
        Self {
            volume,
            geometry,
            boot: file.boot,
            mount: 0,
            file,
            last_cut: 0,
            proof: None,
            interval: None,
        }
    }

    /// Opens the interval of a cut; none must be open.
    pub fn begin(&mut self, interval: OpenInterval) {
        debug_assert!(self.interval.is_none() && interval.cut > self.last_cut);
        self.last_cut = interval.cut;
        self.interval = Some(interval);
    }

    /// Closes the interval, which is the base now. False where no interval with this cut is open.
    pub fn commit(&mut self, cut: u64) -> bool {
        let Some(interval) = self.interval.filter(|interval| interval.cut == cut) else {
            return false;
        };
        self.proof = interval.proof;
        self.interval = None;
        true
    }

    /// Closes the interval, which isn't the base. Where nothing had changed the base is what the file was at its cut; else
    /// the file is not the base, whatever its times say.
    pub fn give_up(&mut self) {
        match self.interval.take() {
            Some(interval) if interval.changed > 0 => self.proof = None,
            Some(interval) => self.proof = interval.proof.or(self.proof),
            None => {}
        }
    }

    /// Neither the base nor what is on its way is known by times.
    pub const fn doubt(&mut self) {
        self.proof = None;
        if let Some(interval) = &mut self.interval {
            interval.proof = None;
        }
    }

    /// The record's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.volume.as_bytes().to_vec();
        out.extend_from_slice(&self.geometry.length().to_le_bytes());
        out.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        out.extend_from_slice(&self.file.born_ns.to_le_bytes());
        out.extend_from_slice(&self.boot);
        out.extend_from_slice(&self.mount.to_le_bytes());
        out.extend_from_slice(&self.file.filesystem);
        out.extend_from_slice(&self.file.inode.to_le_bytes());
        out.extend_from_slice(&self.file.born_s.to_le_bytes());
        out.extend_from_slice(&self.last_cut.to_le_bytes());
        put_proof(&mut out, self.proof);
        out.push(u8::from(self.interval.is_some()));
        if let Some(interval) = &self.interval {
            for number in [interval.cut, interval.kept_bytes, interval.changed] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            put_proof(&mut out, interval.proof);
        }
        seal(SCAN_MAGIC, VERSION, &out)
    }

    /// Decodes the record.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (_, payload) = unseal(SCAN_MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let volume = VolumeId::from_bytes(r.array()?);
        let length = r.u64()?;
        let block_size = BlockSize::new(r.u32()?).map_err(|_| WireError::Range("block size"))?;
        let geometry = Geometry::new(length, block_size).map_err(|_| WireError::Range("length"))?;
        let born_ns = r.u32()?;
        let (boot, mount) = (r.array()?, r.u64()?);
        let file = FileIdentity {
            filesystem: r.array()?,
            inode: r.u64()?,
            born_s: i64::from_le_bytes(r.array()?),
            born_ns,
            ..FileIdentity::default()
        };
        let last_cut = r.u64()?;
        let proof = proof(&mut r)?;
        let interval = match r.u8()? {
            0 => None,
            1 => Some(OpenInterval {
                cut: r.u64()?,
                kept_bytes: r.u64()?,
                changed: r.u64()?,
                proof: self::proof(&mut r)?,
            }),
            _ => return Err(WireError::Range("interval")),
        };
        r.end()?;
        let known = |interval: &OpenInterval| {
            (1..=last_cut).contains(&interval.cut)
                && interval.changed <= geometry.block_count().get()
                && (interval.changed == 0) == (interval.kept_bytes == 0)
        };
        if last_cut > CUT_MAX || !interval.as_ref().is_none_or(known) {
            return Err(WireError::Range("cut"));
        }
        Ok(Self {
            volume,
            geometry,
            boot,
            mount,
            file,
            last_cut,
            proof,
            interval,
        })
    }
}

fn put_proof(out: &mut Vec<u8>, proof: Option<Proof>) {
    out.push(u8::from(proof.is_some()));
    if let Some(Proof { boot, mount, times }) = proof {
        out.extend_from_slice(&boot);
        out.extend_from_slice(&mount.to_le_bytes());
        out.extend_from_slice(&times.modified_s.to_le_bytes());
        out.extend_from_slice(&times.modified_ns.to_le_bytes());
        out.extend_from_slice(&times.changed_s.to_le_bytes());
        out.extend_from_slice(&times.changed_ns.to_le_bytes());
    }
}

fn proof(r: &mut Reader<'_>) -> Result<Option<Proof>, WireError> {
    match r.u8()? {
        0 => Ok(None),
        1 => Ok(Some(Proof {
            boot: r.array()?,
            mount: r.u64()?,
            times: FileTimes {
                modified_s: i64::from_le_bytes(r.array()?),
                modified_ns: r.u32()?,
                changed_s: i64::from_le_bytes(r.array()?),
                changed_ns: r.u32()?,
            },
        })),
        _ => Err(WireError::Range("proof")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(second: i64) -> Option<Proof> {
        Some(Proof {
            boot: [1; 16],
            mount: 9,
            times: FileTimes {
                modified_s: second,
                modified_ns: 2,
                changed_s: -3,
                changed_ns: 4,
            },
        })
    }

    fn state() -> State {
        let geometry = Geometry::new(1 << 20, BlockSize::MIN).unwrap();
        let file = FileIdentity {
            filesystem: [2; 16],
            inode: 3,
            born_s: 4,
            born_ns: 5,
            ..FileIdentity::default()
        };
        State {
            boot: [6; 16],
            mount: 7,
            last_cut: 8,
            ..State::new(VolumeId::from_bytes([9; 16]), geometry, file)
        }
    }

    const fn interval(cut: u64, changed: u64, proof: Option<Proof>) -> OpenInterval {
        OpenInterval {
            cut,
            kept_bytes: if changed > 0 { 1000 } else { 0 },
            changed,
            proof,
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_each_flipped_bit_is_noticed() {
        for (proof, interval) in [
            (None, None),
            (proof(1), Some(interval(8, 3, None))),
            (None, Some(interval(7, 0, proof(2)))),
        ] {
            let state = State {
                proof,
                interval,
                ..state()
            };
            let bytes = state.encode();
            assert_eq!(State::decode(&bytes).unwrap(), state);
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                // Features that may be ignored, and bytes that say nothing.
                assert!(
                    State::decode(&damaged).is_err()
                        || (10..12).contains(&at)
                        || (14..16).contains(&at),
                    "{at}"
                );
            }
        }
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a test's own files")]
    fn the_golden_record_keeps_decoding() {
        let state = State {
            proof: proof(1),
            interval: Some(interval(8, 3, proof(2))),
            ..state()
        };
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/scan-v1");
        if std::env::var("TIDEMARK_BLESS").is_ok() {
            std::fs::write(path, state.encode()).unwrap();
        }
        let golden = std::fs::read(path).unwrap();
        assert_eq!(State::decode(&golden).unwrap(), state);
        assert!(state.encode() == golden, "it is encoded as ever");
    }

    #[test]
    fn the_page_of_formats_has_these_places() {
        let page = include_str!("../../../../docs/FORMAT-CAPTURE.md");
        let part = page.split("## scan: payload").nth(1).unwrap();
        let part = part.split("\n## ").next().unwrap();
        let state = State {
            interval: Some(interval(8, 3, proof(2))),
            proof: proof(1),
            ..state()
        };
        let bytes = &state.encode()[40..];
        for (place, length, expected) in [
            (0, 16, &[9; 16][..]),
            (16, 8, &(1_u64 << 20).to_le_bytes()),
            (24, 4, &4096_u32.to_le_bytes()),
            (28, 4, &5_u32.to_le_bytes()),
            (32, 16, &[6; 16]),
            (48, 8, &7_u64.to_le_bytes()),
            (56, 16, &[2; 16]),
            (72, 8, &3_u64.to_le_bytes()),
            (80, 8, &4_i64.to_le_bytes()),
            (88, 8, &8_u64.to_le_bytes()),
        ] {
            assert_eq!(&bytes[place..place + length], expected, "{place}");
            assert!(
                part.contains(&format!("\n| {place} | {length} |")),
                "{place}"
            );
        }
        // A proof: 1, boot id, mount id, and two times.
        let proof_len = 1 + 16 + 8 + 12 + 12;
        assert_eq!(bytes[96], 1);
        assert_eq!(bytes[96 + proof_len], 1);
        assert_eq!(bytes.len(), 96 + proof_len + 1 + 3 * 8 + proof_len);
    }

    #[test]
    fn what_no_volume_comes_to_is_refused() {
        for wrong in [
            interval(9, 3, None),
            interval(0, 3, None),
            interval(8, 257, None),
            OpenInterval {
                kept_bytes: 0,
                ..interval(8, 3, None)
            },
        ] {
            let state = State {
                interval: Some(wrong),
                ..state()
            };
            assert!(State::decode(&state.encode()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_base_is_known_by_the_times_of_its_own_cut_only() {
        let mut state = State {
            proof: proof(1),
            ..state()
        };
        state.begin(interval(10, 0, None));
        state.give_up();
        assert_eq!(state.proof, proof(1));
        state.begin(interval(11, 0, proof(3)));
        state.give_up();
        assert_eq!(state.proof, proof(3));
        state.begin(interval(12, 3, proof(4)));
        state.give_up();
        assert_eq!((state.proof, state.last_cut), (None, 12));
        state.begin(interval(13, 3, proof(5)));
        state.doubt();
        assert!(state.commit(13));
        assert_eq!(state.proof, None);
        state.begin(interval(14, 3, proof(6)));
        assert!(state.commit(14));
        assert_eq!(state.proof, proof(6));
        state.doubt();
        assert_eq!(state.proof, None);
        state.begin(interval(15, 3, None));
        assert!(!state.commit(11));
        assert!(state.commit(15));
        assert_eq!((state.proof, state.interval), (None, None));
        assert!(!state.commit(15));
    }
}
