//! What both sides say about an interval: its header, its seal and the receipt.
//!
//! Times are milliseconds since the Unix epoch, UTC; they are shown, never ordered by: generations are ordered by
//! number.

use crate::{
    digest::ImageDigest,
    geometry::Geometry,
    ids::{IntervalId, VolumeId},
    units::{BlockCount, Epoch, GenerationId, WriterTerm},
    wire::{Reader, WireError},
};

macro_rules! coded {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $code,)*
        }

        impl $name {
            /// The number that stands for it in durable structures and on the wire.
            #[must_use]
            pub const fn code(self) -> u8 {
                self as u8
            }

            /// What a stored number stands for; none where it stands for nothing.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// As users see it: lower case, words joined by underscores.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

coded!(
    /// How trustworthy a cut is for the workload, the best last.
    Coherence {
        /// As after a power cut: exact write order, nothing else.
        Crash = 1 "crash",
        /// Cut while no write was under way for some time.
        Lull = 2 "lull",
        /// Every write before the cut was followed by a completed flush.
        Flushed = 3 "flushed",
        /// The workload was quiesced.
        Quiesced = 4 "quiesced",
    }
);

coded!(
    /// Why an interval was cut.
    Trigger {
        /// The first interval of a volume.
        Initial = 1 "initial",
        /// The longest time between two cuts had passed.
        IntervalMax = 2 "interval_max",
        /// So many blocks had changed since the last cut.
        ChangedBlocksMax = 3 "changed_blocks_max",
        /// Somebody asked for it.
        Request = 4 "request",
        /// Tracking was in doubt and the volume was compared with the vault.
        Resync = 5 "resync",
        /// The schedule said so.
        Schedule = 6 "schedule",
        /// The workload said that it is a good moment.
        Hint = 7 "hint",
    }
);

/// Why a cut is not more trustworthy for the workload: one line for people; empty where there is nothing to say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CutReason(String);

impl CutReason {
    /// The most bytes of it.
    pub const LEN_MAX: usize = 255;

    /// Makes one of any text: what is too long is cut off, control characters become spaces.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut end = text.len().min(Self::LEN_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let mut line: String = text[..end].chars().map(printable).collect();
        line.truncate(line.trim_end().len());
        Self(line)
    }

    /// The line.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing to say.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends it to a durable structure: its length (2 bytes), then its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u16::try_from(self.0.len()).unwrap_or(0).to_le_bytes());
        out.extend_from_slice(self.0.as_bytes());
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// Where it is cut short, or no text that could have been written.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let length = usize::from(r.u16()?);
        let bytes = r.bytes(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| WireError::Range("reason"))?;
        let reason = Self::new(text);
        if reason.0 == text {
            Ok(reason)
        } else {
            Err(WireError::Range("reason"))
        }
    }
}

impl std::fmt::Display for CutReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The newest generation of a volume at the vault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Its number, from 1.
    pub generation: GenerationId,
    /// Of its image.
    pub digest: ImageDigest,
    /// What made it.
    pub interval: IntervalId,
}

/// What the source says before the first frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IntervalHeader {
    /// The volume that changed.
    pub volume: VolumeId,
    /// Under which term the source writes.
    pub term: WriterTerm,
    /// Drawn at random for this one cut, durable at the source before it is sent.
    pub interval: IntervalId,
    /// The generation that the interval changes: the vault's newest; 0 for the all-zero image.
    pub base: GenerationId,
    /// The volume's shape at the cut.
    pub geometry: Geometry,
    /// The epoch that the cut closed.
    pub epoch: Epoch,
    /// When the cut was made.
    pub cut_time_ms: u64,
    /// How good the moment was.
    pub coherence: Coherence,
    /// Why it was no better.
    pub reason: CutReason,
    /// Why it was made.
    pub trigger: Trigger,
}

/// What the source says after the last frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IntervalSeal {
    /// Blocks in all frames, those in zero frames included.
    pub changed_blocks: BlockCount,
    /// Frames sent since the header, in all streams of the interval.
    pub frame_count: u64,
    /// Of the whole image at the cut, as the source computed it.
    pub image_digest: ImageDigest,
}

/// What the vault answers to a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    /// The volume.
    pub volume: VolumeId,
    /// The interval.
    pub interval: IntervalId,
    /// What the interval became, or, where nothing had changed, what is still current.
    pub generation: GenerationId,
    /// False where the interval had no changes and made no generation.
    pub created: bool,
    /// Of the whole image at the cut.
    pub image_digest: ImageDigest,
    /// Blocks in all frames.
    pub changed_blocks: BlockCount,
    /// Encoded bytes of all frames.
    pub frame_bytes: u64,
    /// When the cut was made.
    pub cut_time_ms: u64,
    /// When the vault committed.
    pub committed_time_ms: u64,
    /// How good the moment of the cut was.
    pub coherence: Coherence,
    /// Why it was no better.
    pub reason: CutReason,
    /// Why the cut was made.
    pub trigger: Trigger,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_stands_for_one_thing_and_unknown_codes_for_none() {
        for code in 0..=u8::MAX {
            assert!(Coherence::from_code(code).is_none_or(|c| c.code() == code));
            assert!(Trigger::from_code(code).is_none_or(|t| t.code() == code));
        }
        assert_eq!(Coherence::from_code(0), None);
        assert_eq!(Trigger::from_code(8), None);
        assert!(Coherence::Quiesced > Coherence::Crash);
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length_and_survives_its_bytes() {
        let long = format!("x{}", "é".repeat(200));
        for (text, line) in [
            ("", ""),
            ("agent db went away", "agent db went away"),
            ("two\nlines\u{1b}[31m\n", "two lines [31m"),
            (long.as_str(), &long[..255]),
        ] {
            let reason = CutReason::new(text);
            assert_eq!(reason.as_str(), line);
            let mut bytes = Vec::new();
            reason.encode(&mut bytes);
            let mut r = Reader::new(&bytes);
            assert_eq!(CutReason::decode(&mut r), Ok(reason));
            assert!(r.rest().is_empty());
        }
        for bytes in [&[1, 0][..], &[1, 0, 0xff], &[1, 0, b'\n']] {
            assert!(CutReason::decode(&mut Reader::new(bytes)).is_err());
        }
    }
}
