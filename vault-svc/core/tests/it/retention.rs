//! Which generations go.

use tidemark_block::GenerationId;
use vault_core::{
    manifest::check_invariants,
    retention::{RetentionPolicy, plan, retire},
};

use crate::samples::manifest;

#[test]
fn the_newest_generations_stay_and_the_head_whatever_is_asked_for() {
    let manifest = manifest();
    for (newest, gone) in [(0, 2), (1, 2), (2, 1), (3, 0), (usize::MAX, 0)] {
        let planned = plan(&manifest, RetentionPolicy { newest });
        let oldest: Vec<_> = (1..=gone).map(GenerationId::new).collect();
        assert_eq!(planned, oldest, "the newest {newest} stay");
        let after = retire(&manifest, &planned, 1_700_000_009_000);
        assert_eq!(after.head(), manifest.head());
        assert_eq!(
            after.recent, manifest.recent,
            "receipts outlive generations"
        );
        check_invariants(&after, Some(&manifest)).unwrap();
    }
}
