//! Replays every kept input.

use std::{fs, path::Path};

use tidemark_fuzz::{TARGETS, bounded::bounded};

fn corpus() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))
}

#[test]
fn every_kept_input_keeps_its_targets_properties() {
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus().join(name)).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has a corpus");
    }
}

#[test]
fn the_corpus_and_the_programs_are_those_of_the_targets() {
    let names = |path: &Path, cut: &str| {
        let mut names: Vec<String> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| name.trim_end_matches(cut).to_owned())
            .collect();
        names.sort();
        names
    };
    let targets: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names(corpus(), ""), targets);
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("run/src/bin");
    assert_eq!(names(&programs, ".rs"), targets);
}

#[test]
fn memory_that_is_allocated_and_freed_again_counts() {
    bounded(5000, || drop(vec![1_u8; 4096]));
    let over = std::panic::catch_unwind(|| bounded(1000, || drop(vec![1_u8; 4096])));
    assert!(over.is_err());
}
