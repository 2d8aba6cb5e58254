//! Retention: which generations go. A plan from a manifest, shown or executed; nothing here deletes.

use tidemark_block::GenerationId;

use crate::manifest::Manifest;

/// What a volume keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// The newest so many generations; at least 1.
    pub newest: usize,
}

/// The generations that the policy lets go, oldest first. The newest one never goes.
#[must_use]
pub fn plan(manifest: &Manifest, policy: RetentionPolicy) -> Vec<GenerationId> {
    let keep = policy.newest.max(1);
    let count = manifest.generations.len().saturating_sub(keep);
    manifest.generations[..count]
        .iter()
        .map(|generation| generation.id)
        .collect()
}

/// The manifest without these generations. Their receipts stay, and so do their segments until reclaim finds what
/// no retained generation needs.
#[must_use]
pub fn retire(manifest: &Manifest, retired: &[GenerationId], now_ms: u64) -> Manifest {
    let mut next = manifest.successor(now_ms);
    next.generations
        .retain(|generation| !retired.contains(&generation.id));
    next
}
