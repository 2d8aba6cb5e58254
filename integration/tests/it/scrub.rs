//! A disk that forgets: the vault's scrub finds it before anybody restores.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use tidemark_integration::scrape::scrape;

use crate::programs::{Split, args, free_addr, wait_for};

fn segments(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            segments(&path, found);
        } else if path.components().any(|part| part.as_os_str() == "segments") {
            found.push(path);
        }
    }
}

fn scrubbed(services: &Split) -> Value {
    services.cli.json(args!["status"])["vault"]["volumes"][0]["scrub"].clone()
}

#[test]
fn a_flipped_bit_on_the_vaults_disk_is_found_by_itself_named_and_never_restored() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.img");
    let content: Vec<u8> = (0..8_u32 << 18)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    fs::write(&file, content).unwrap();
    let mut services = Split::new(dir.path());
    let metrics = free_addr();
    services.vault_flags = vec![
        "--scrub-period=300ms".to_owned(),
        format!("--metrics-listen={metrics}"),
    ];
    let measured = |name: &str| {
        scrape(metrics).value(&format!("tidemark_vault_{name}"), &[("volume", "data")])
    };
    services.start_vault();
    services.start_capture();
    services
        .cli
        .json(args!["volume", "add", "data", "--file", file]);
    services.cli.json(args!["ship", "data"]);
    wait_for("a pass of the scrub", || {
        (scrubbed(&services)["passes"].as_u64().unwrap() > 0).then_some(())
    });
    let sound = services.cli.json(args!["scrub", "data", "--stored"]);
    assert_eq!(sound["damaged_objects"], 0, "{sound}");
    assert!(sound["bytes"].as_u64().unwrap() > 1 << 20, "{sound}");

    let mut found = Vec::new();
    segments(&services.store, &mut found);
    let segment = &found[0];
    let mut bytes = fs::read(segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(segment, &bytes).unwrap();
    wait_for("the scrub to find it", || {
        (scrubbed(&services)["damaged_objects"] == 1).then_some(())
    });
    assert_eq!(services.cli.generations("data")[0]["damaged"], true);
    assert_eq!(measured("damaged_objects"), 1.0);
    assert_eq!(measured("damaged_generations"), 1.0);
    let name = segment.strip_prefix(&services.store).unwrap();
    assert!(services.logged().contains(name.to_str().unwrap()));
    let told = services
        .cli
        .fails(args!["scrub", "data", "--stored"], 6, "STORE_CORRUPT");
    assert!(told.contains("generations 1 can't be read whole"), "{told}");
    let output = dir.path().join("restored.img");
    services
        .cli
        .fails(args!["restore", "data", output], 6, "STORE_CORRUPT");
    assert!(!output.exists());

    bytes[middle] ^= 1;
    fs::write(segment, &bytes).unwrap();
    wait_for("the scrub to find it sound again", || {
        (scrubbed(&services)["damaged_objects"] == 0).then_some(())
    });
    assert_eq!(measured("damaged_objects"), 0.0);
    assert!(measured("scrub_passes_total") >= 3.0);
    assert!(measured("scrub_bytes_total") > sound["bytes"].as_f64().unwrap());
    let restored = services.cli.restore("data", 1, dir.path());
    assert!(fs::read(restored).unwrap() == fs::read(&file).unwrap());
    services.stop();
}
