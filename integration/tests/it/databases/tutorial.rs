//! The tutorial, followed to the letter.

use std::fs;

use super::world::World;
use crate::docs::{root, shell_blocks};

#[test]
fn the_tutorials_commands_protect_break_and_bring_back_a_database_word_for_word() {
    let Some(mut world) = World::new() else {
        return;
    };
    let page = fs::read_to_string(root().join("docs/PROTECT-YOUR-DATABASE.md")).unwrap();
    let blocks = shell_blocks(&page);
    assert!(blocks.len() > 10);
    for block in blocks {
        if block.starts_with("tidemark up") {
            world.in_a_terminal("services", block);
            world.then("both_answer");
        } else {
            world.then(block);
        }
    }
    let told = world.run();
    assert!(told.contains("\nfound:          db@"), "{told}");
    // All the orders, twice: those that were deleted, with the new one; and after the disk was lost, with their sum.
    assert!(told.contains("\n 10001\n"), "{told}");
    assert!(told.contains("\n 10001 | 500050990\n"), "{told}");
}
