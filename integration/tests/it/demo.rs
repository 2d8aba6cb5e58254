//! The demo, small, with the programs under test.

use std::process::Command;

use crate::programs::{bin_dir, have};

#[test]
fn the_demo_runs_to_its_report() {
    if !have(&["mkfs.ext4", "e2fsck", "debugfs", "nbdcopy", "fio", "cmp"]) {
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/demo.sh");
    let output = Command::new(script)
        .arg("--small")
        .arg("--bin-dir")
        .arg(bin_dir())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{told}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for line in ["byte for byte", "e2fsck", "killed", "generation"] {
        assert!(told.contains(line), "{line} is missing:\n{told}");
    }
    // Whichever of the two ships what was written, the one who asks or the interval that was due.
    assert!(!told.contains(" 0 blocks changed"), "{told}");
}
