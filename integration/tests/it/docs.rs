//! What the README and the glossary say is so: commands are run word for word, words are looked for in the sources.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tidemark_integration::small_disk::may_mount;

use crate::{
    programs::{Up, bin_dir, have},
    scene::Scene,
};

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(crate) fn shell_blocks(markdown: &str) -> Vec<&str> {
    markdown
        .split("```sh\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect()
}

#[test]
fn the_readmes_commands_protect_a_file_word_for_word() {
    if !have(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let own_file = readme.split("## Protect your own file").nth(1).unwrap();
    let blocks = shell_blocks(own_file);
    let (start, rest) = blocks.split_first().unwrap();
    assert!(start.ends_with("tidemark up\n"), "{start}");

    // The default state folder, with free ports: another `tidemark up` may run on this machine.
    let home = tempfile::tempdir().unwrap();
    let up = Up::start(&home.path().join(".local/share/tidemark"), &[]);
    let path = format!("{}:{}", bin_dir().display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", &rest.concat()])
        .env("HOME", home.path())
        .env("PATH", path)
        .env("TIDEMARK_CAPTURE", &up.cli.capture)
        .env("TIDEMARK_VAULT", &up.cli.vault)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let snapshot = fs::read(home.path().join("before-upgrade.img")).unwrap();
    assert!(snapshot[64 << 20..72 << 20].iter().all(|&b| b == 0x5a));
}

#[test]
fn the_readmes_volume_gets_a_filesystem_and_is_mounted_word_for_word() {
    if !have(&["mkfs.ext4"]) || !may_mount() {
        return;
    }
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, block) = readme
        .split_once("```console\n# tidemark up --fuse-mount /mnt/tidemark\n")
        .unwrap();
    let scene = Scene::new("64MiB");
    let mut commands = block.split("```").next().unwrap().replace("# ", "");
    for (named, here) in [
        ("/mnt/tidemark", "files"),
        ("/srv", "srv"),
        ("/mnt/before", "before"),
    ] {
        assert!(commands.contains(named), "{named}");
        commands = commands.replace(named, scene.path(here).to_str().unwrap());
    }
    fs::create_dir(scene.path("srv")).unwrap();
    let path = std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin";
    let path = format!("{}:{path}", bin_dir().display());
    let output = Command::new("bash")
        .args(["-euxo", "pipefail", "-c", &commands])
        .env("PATH", path)
        .env("TIDEMARK_CAPTURE", &scene.services.cli.capture)
        .env("TIDEMARK_VAULT", &scene.services.cli.vault)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("umount"), "{told}");
}

#[test]
fn every_document_that_a_document_links_to_is_there() {
    let mut documents = vec![
        root().join("README.md"),
        root().join("crates/agent/examples/python/README.md"),
    ];
    documents.extend(
        fs::read_dir(root().join("docs"))
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    );
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        let folder = document.parent().unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = link.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                assert!(folder.join(file).exists(), "{}: {link}", document.display());
            }
        }
    }
}

/// All files below `dir` with this ending, `target` left out.
fn sources(dir: &Path, ending: &str, text: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") && !path.ends_with("integration") {
            sources(&path, ending, text);
        } else if path.extension().is_some_and(|e| e == ending) {
            text.push_str(&fs::read_to_string(&path).unwrap().to_lowercase());
        }
    }
}

#[test]
fn every_test_that_fault_model_and_coherence_name_is_there() {
    let mut text = String::new();
    for folder in ["crates", "capture-svc", "vault-svc", "integration/tests/it"] {
        sources(&root().join(folder), "rs", &mut text);
    }
    for (page, part, names_min) in [
        ("docs/FAULT-MODEL.md", "", 30),
        ("docs/COHERENCE.md", "## What proves it", 12),
    ] {
        let page = fs::read_to_string(root().join(page)).unwrap();
        let page = &page[page.find(part).unwrap()..];
        let named: Vec<&str> = page
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|name| name.contains('_') && !name.contains('/'))
            .collect();
        assert!(named.len() > names_min);
        for name in named {
            assert!(text.contains(&format!("fn {name}(")), "{name}");
        }
    }
}

/// Rows of the glossary's first table: word, and the words that are not used for it.
fn glossary() -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(root().join("docs/GLOSSARY.md")).unwrap();
    let table = text.split("Kept for what is not there yet").next().unwrap();
    table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| word"))
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            let not = cells.last().unwrap().split(", ");
            (
                cells[0].to_owned(),
                not.filter(|w| !w.is_empty()).map(str::to_owned).collect(),
            )
        })
        .collect()
}

#[test]
fn every_word_of_the_glossary_is_used_in_the_sources() {
    let mut text = String::new();
    for (folder, ending) in [
        ("crates", "rs"),
        ("capture-svc", "rs"),
        ("vault-svc", "rs"),
        ("proto", "proto"),
    ] {
        sources(&root().join(folder), ending, &mut text);
    }
    let words = glossary();
    assert!(words.len() > 20);
    for (word, _) in words {
        let spellings = [word.clone(), word.replace(' ', "_"), word.replace(' ', "")];
        assert!(
            spellings
                .iter()
                .any(|spelling| text.contains(spelling.as_str())),
            "nothing in the sources is called \"{word}\""
        );
    }
}

#[test]
fn protocol_and_manual_have_one_word_for_one_thing() {
    let mut text = String::new();
    sources(&root().join("proto"), "proto", &mut text);
    text.push_str(
        &fs::read_to_string(root().join("docs/CLI.md"))
            .unwrap()
            .to_lowercase(),
    );
    for (word, others) in glossary() {
        for other in others {
            assert!(!text.contains(&other), "\"{other}\" is used for \"{word}\"");
        }
    }
}
