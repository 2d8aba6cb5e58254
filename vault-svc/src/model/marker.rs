//! The marker of a store whose first puts fail.

use std::sync::Arc;

use object_store::memory::InMemory;
use vault_core::manifest::StoreMarker;

use super::faults::{FaultyStore, Fuse, Volatile};
use crate::{interval::Numbers, store::Store};

fn store(objects: &Arc<InMemory>, fuse: &Arc<Fuse>, volatile: &Volatile) -> Store {
    let faulty =
        FaultyStore::with_volatile(Arc::clone(objects), Arc::clone(fuse), volatile.clone());
    let faulty = Arc::new(faulty);
    Store::settled_by(Arc::clone(&faulty) as _, faulty)
}

fn fresh(numbers: &mut Numbers) -> StoreMarker {
    StoreMarker {
        store: numbers.id(),
        created_ms: numbers.next(),
    }
}

#[test]
fn a_marker_that_was_accepted_is_never_another_one_later() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (mut failed, mut settled) = (0, 0);
        for seed in 0..400 {
            let mut numbers = Numbers(seed);
            let objects = Arc::new(InMemory::new());
            let volatile = Volatile::default();
            let mut accepted = None;
            for _ in 0..6 {
                let fuse = Arc::<Fuse>::default();
                let store = store(&objects, &fuse, &volatile);
                if accepted.is_none() {
                    fuse.arm_often(numbers.next());
                }
                match store.marker(fresh(&mut numbers)).await {
                    Ok(marker) => {
                        settled += u32::from(fuse.burnt());
                        assert_eq!(*accepted.get_or_insert(marker), marker, "seed {seed}");
                    }
                    Err(error) => {
                        assert!(fuse.burnt(), "seed {seed}: {error}");
                        failed += 1;
                    }
                }
                // The next start comes after a loss of power.
                volatile.lose_some(&objects, &mut numbers).await;
            }
        }
        assert!(
            failed > 100 && settled > 40,
            "{failed} failed, {settled} settled"
        );
    });
}
