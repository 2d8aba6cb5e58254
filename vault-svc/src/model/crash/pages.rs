//! The same where a manifest has so many segments that they spill into pages: pages are put, named, replaced,
//! condemned and deleted.

use vault_core::{manifest::PAGE_RECORDS, reclaim::Policy};

use super::{
    super::POLICY,
    Act::{Pass, Ship, Stamp, StartTerm, WriteFirst},
    Fault, Seen, World, run, runtime,
};
use crate::interval::Source;

/// Segments before the first act: a few more make a page.
const SEGMENTS: u64 = PAGE_RECORDS as u64 - 2;

/// Nothing is merged: there are as many segments as there may be.
const UNMERGED: Policy = Policy {
    small_max: usize::MAX,
    depth_max: usize::MAX,
    ..POLICY
};

/// A volume of as many segments as blocks.
async fn many_segments() -> World {
    let mut source = Source::new(2, SEGMENTS);
    source.frame_blocks = 1;
    source.batch_frames = 1;
    source.compressed = Some(false);
    let mut world = World::new(source, UNMERGED, 1);
    for act in [StartTerm, WriteFirst(SEGMENTS), Ship, Stamp] {
        world.perform(act).await.unwrap();
    }
    let manifest = world.volume().await.unwrap().manifest();
    assert_eq!(
        (manifest.tail.len() as u64, manifest.pages.len()),
        (SEGMENTS, 0)
    );
    world
}

fn paged_history(fault: Fault) {
    runtime().block_on(async {
        let world = many_segments().await;
        // The commit makes a page; the pass condemns what the first blocks were, and with it the page; then both go.
        let history = [WriteFirst(3), Ship, Pass];
        let steps = run(world, &history, &[fault], false).await;
        assert!(steps > 12, "only {steps}: the test tests little");
    });
}

#[test]
fn the_end_of_the_process_while_pages_are_made_and_replaced_leaves_the_old_or_the_new_state() {
    paged_history(Fault::Crash { done: true });
}

#[test]
fn a_loss_of_power_while_pages_are_made_and_replaced_leaves_the_old_or_the_new_state() {
    paged_history(Fault::Power { seed: 1 });
}

#[test]
fn the_history_makes_and_replaces_a_page() {
    runtime().block_on(async {
        let mut world = many_segments().await;
        let mut pages = Vec::new();
        for act in [WriteFirst(3), Ship, Pass] {
            world.perform(act).await.unwrap();
            let manifest = world.volume().await.unwrap().manifest();
            pages.push(
                manifest
                    .pages
                    .iter()
                    .map(|page| page.name)
                    .collect::<Vec<_>>(),
            );
            assert_eq!(
                Seen::of(&manifest).generations.len(),
                1 + usize::from(act == Ship)
            );
        }
        assert_eq!(pages[0], []);
        assert_eq!((pages[1].len(), pages[2].len()), (1, 0), "{pages:?}");
    });
}
