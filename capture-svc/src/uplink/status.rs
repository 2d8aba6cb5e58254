//! What an uplink shows of itself.

use tidemark_block::{GenerationId, Receipt, WriterTerm};

/// What the uplink is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UplinkState {
    /// Nothing to ship.
    #[default]
    Idle,
    /// On the way to the vault.
    Connecting,
    /// Comparing checksum tables with the vault.
    Resyncing,
    /// An interval is on its way.
    Shipping,
    /// Waiting before the next try.
    Backoff,
    /// Another writer owns the volume at the vault.
    Fenced,
}

/// One look at an uplink.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UplinkStatus {
    /// What it is doing.
    pub state: UplinkState,
    /// The last failure, and what to do about it; none after a success.
    pub error: Option<String>,
    /// The vault holds the image as it was then, in milliseconds since the Unix epoch; 0 = nothing yet.
    pub recovery_point_ms: u64,
    /// Blocks that the interval under way may change.
    pub blocks_total: u64,
    /// Those that have been looked at.
    pub blocks_done: u64,
    /// Encoded bytes of the interval sent by this process.
    pub bytes_sent: u64,
    /// Of the last interval that this process shipped.
    pub last_receipt: Option<Receipt>,
    /// The newest generation that the source knows to be committed.
    pub base: GenerationId,
    /// The writer term; 0 = none yet.
    pub term: WriterTerm,
    /// Image digests that differed from the vault's, since the service started.
    pub digest_mismatches: u64,
}
