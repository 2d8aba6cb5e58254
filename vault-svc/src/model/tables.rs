//! A damaged checksum table is noticed and mended, and not taken for the source's fault.

use std::{fs::OpenOptions, os::unix::fs::FileExt, sync::Arc};

use object_store::memory::InMemory;
use tidemark_block::{BlockIndex, Checksum128, GenerationId};
use tidemark_proto::{Reason, convert::CurrentMark};
use vault_core::ingest::{CLOCK_AHEAD_MAX_MS, Overlay};

use super::{BLOCKS, POLICY, config, deliver, read, scratch};
use crate::{Vault, interval::Source, ship::mark_current, store::Store, volume::now_ms};

/// Where the groups of a table of few leaves begin in its file.
const GROUPS_AT: u64 = 4096;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn vault(dir: &tempfile::TempDir) -> (Arc<Vault>, Source) {
    let store = Store::new(Arc::new(InMemory::new()));
    let vault = Vault::open_with(config(dir.path(), 4), store, POLICY)
        .await
        .unwrap();
    let mut source = Source::new(13, BLOCKS);
    source.term = vault
        .start_term(source.term_request(), &tidemark_identity::Caller::Local)
        .await
        .unwrap()
        .term;
    (vault, source)
}

#[test]
fn damage_above_the_blocks_is_mended_and_the_interval_asked_for_again() {
    runtime().block_on(async {
        let dir = scratch();
        let (vault, mut source) = vault(&dir).await;
        source.write_some(100);
        let prepared = source.prepare();
        source.committed(&deliver(&vault, &prepared).await.unwrap());
        let volume = vault.volume(source.volume).unwrap();
        let path = dir.path().join("state/tables").join(volume.id.to_string());
        let damage = |at: u64| {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[0xA5; 16], at).unwrap();
        };
        // A leaf: the digest itself is wrong.
        volume.table_at_head().await.unwrap();
        assert!(!volume.recheck_table().await.unwrap());
        damage(0);
        assert!(volume.recheck_table().await.unwrap());
        assert!(!volume.recheck_table().await.unwrap());
        // A group: only what is computed from it is wrong.
        damage(GROUPS_AT + 5 * 16);
        source.write(0);
        let prepared = source.prepare();
        let error = deliver(&vault, &prepared).await.unwrap_err();
        assert_eq!(error.reason, Reason::Busy);
        source.committed(&deliver(&vault, &prepared).await.unwrap());
        assert!(read(&volume, 0).await.unwrap() == source.image);
    });
}

#[test]
fn a_table_that_is_wrong_after_a_replay_is_made_anew() {
    runtime().block_on(async {
        let dir = scratch();
        let (vault, mut source) = vault(&dir).await;
        source.write(7);
        source.write(8);
        let prepared = source.prepare();
        source.committed(&deliver(&vault, &prepared).await.unwrap());
        let volume = vault.volume(source.volume).unwrap();
        let at = volume.table_at_head().await.unwrap();
        source.write(8);
        let prepared = source.prepare();
        source.committed(&deliver(&vault, &prepared).await.unwrap());
        // The table is still that of the first generation. What the second changed is no longer in memory, and a
        // checksum is wrong.
        for n in 100..102 {
            volume.note_committed(
                GenerationId::new(n),
                GenerationId::new(n + 1),
                Overlay::default(),
            );
        }
        let wrong = (BlockIndex::new(7), Checksum128::from_bytes([9; 16]));
        at.table.apply([wrong]).unwrap();
        let at = volume.table_at_head().await.unwrap();
        assert_eq!(at.generation, GenerationId::new(2));
        let digest = at.table.digest().unwrap();
        assert_eq!(volume.manifest().head().unwrap().digest, digest);
    });
}

#[test]
fn a_clock_far_ahead_does_not_make_an_image_more_recent_than_now() {
    const YEAR_2099: u64 = 4_070_908_800_000;
    runtime().block_on(async {
        let dir = scratch();
        let (vault, mut source) = vault(&dir).await;
        let mut last = 0;
        for cut_time_ms in [YEAR_2099, 1_700_000_000_000, YEAR_2099 + 1] {
            source.write_some(5);
            let mut prepared = source.prepare();
            prepared.header.cut_time_ms = cut_time_ms;
            let receipt = deliver(&vault, &prepared).await.unwrap();
            source.committed(&receipt);
            let volume = vault.volume(source.volume).unwrap();
            let manifest = volume.manifest();
            let latest = now_ms() + CLOCK_AHEAD_MAX_MS;
            assert!((last..=latest).contains(&receipt.cut_time_ms));
            assert!(volume.current_through(&manifest) <= latest);
            last = receipt.cut_time_ms;
            let mark = CurrentMark {
                volume: volume.id,
                term: source.term,
                interval: prepared.header.interval,
                generation: source.base,
                image_digest: manifest.head().unwrap().digest,
                cut_time_ms: YEAR_2099,
            };
            let marked = mark_current(&volume, &mark).unwrap();
            let latest = now_ms() + CLOCK_AHEAD_MAX_MS;
            assert!(marked.cut_time_ms <= latest);
            assert!(volume.current_through(&manifest) <= latest);
        }
    });
}
