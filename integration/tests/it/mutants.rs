//! The planted bugs of `integration/mutants` can still be planted, and the tests that they name are there. Whether
//! these catch them is shown by `make mutants`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A patch: its header's fields, and what it replaces by what in which file.
struct Mutant {
    name: String,
    fields: BTreeMap<String, String>,
    hunks: Vec<Hunk>,
}

struct Hunk {
    file: String,
    old: String,
    new: String,
}

impl Mutant {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let (header, patch) = text.split_once("\n\n").unwrap();
        let field = |line: &str| {
            let (key, value) = line.split_once(": ").unwrap();
            (key.to_owned(), value.to_owned())
        };
        Self {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            fields: header.lines().map(field).collect(),
            hunks: hunks(patch),
        }
    }

    fn field(&self, key: &str) -> &str {
        let value = self.fields.get(key);
        value.unwrap_or_else(|| panic!("{}: its header has no {key}", self.name))
    }
}

fn hunks(patch: &str) -> Vec<Hunk> {
    let (mut file, mut found) = (String::new(), Vec::new());
    let mut lines = patch.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("+++ b/") {
            file = name.to_owned();
        } else if let Some(counts) = line.strip_prefix("@@ -") {
            let count = |from: &str| from.split(',').nth(1).unwrap_or("1").parse().unwrap();
            let mut counts = counts.split(" +").map(|n| n.split(' ').next().unwrap());
            let mut left: [usize; 2] = std::array::from_fn(|_| count(counts.next().unwrap()));
            let (mut old, mut new) = (String::new(), String::new());
            while left != [0, 0] {
                let line = lines.next().unwrap();
                let (sign, rest) = line.split_at(1);
                if sign != "+" {
                    old.push_str(rest);
                    old.push('\n');
                    left[0] -= 1;
                }
                if sign != "-" {
                    new.push_str(rest);
                    new.push('\n');
                    left[1] -= 1;
                }
            }
            let file = file.clone();
            found.push(Hunk { file, old, new });
        }
    }
    found
}

fn mutants() -> Vec<Mutant> {
    let folder = fs::read_dir(root().join("integration/mutants")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let patches = paths.filter(|path| path.extension().is_some_and(|end| end == "patch"));
    let mut found: Vec<_> = patches.map(|path| Mutant::read(&path)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(found.len() > 30, "only {}", found.len());
    found
}

#[test]
fn every_planted_bug_can_still_be_planted() {
    for mutant in mutants() {
        let mut changed = false;
        for Hunk { file, old, new } in &mutant.hunks {
            let text = fs::read_to_string(root().join(file)).unwrap();
            let places = text.matches(old.as_str()).count();
            assert_eq!(places, 1, "{}: places in {file} for\n{old}", mutant.name);
            changed |= old != new;
        }
        assert!(changed, "{}: it plants nothing", mutant.name);
    }
}

/// The folder of a package of the workspace.
fn package(name: &str) -> PathBuf {
    let workspace = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let start = format!("{name} = {{ path = \"");
    let mut lines = workspace.lines();
    let path = lines.find_map(|line| line.strip_prefix(&start)?.split('"').next());
    root().join(path.unwrap_or_else(|| panic!("{name} is no package of the workspace")))
}

/// Whether a file below `dir` has the test with this path: modules are files, folders or parts of a file.
fn has_test(dir: &Path, test: &str) -> bool {
    let (modules, name) = test.rsplit_once("::").unwrap();
    fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return has_test(&path, test);
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        let Some((above, _)) = text.split_once(&format!("fn {name}(")) else {
            return false;
        };
        let above = above.trim_end().trim_end_matches("async").trim_end();
        let attribute = above.lines().next_back().unwrap_or_default().trim_start();
        let is_test = attribute.starts_with("#[") && attribute.contains("test");
        let stem = path.with_extension("");
        let is_in = |module: &str| {
            stem.iter().any(|part| part == module) || text.contains(&format!("mod {module} {{"))
        };
        is_test && modules.split("::").all(is_in)
    })
}

#[test]
fn every_test_that_has_to_catch_a_planted_bug_is_there() {
    for mutant in mutants() {
        let package = package(mutant.field("Package"));
        let sources = match mutant.field("Binary") {
            "lib" => package.join("src"),
            binary => package.join("tests").join(binary),
        };
        let test = mutant.field("Test");
        assert!(has_test(&sources, test), "{}: {test}", mutant.name);
        assert!(!mutant.field("Plants").is_empty());
    }
}

#[test]
fn the_fault_model_lists_each_planted_bug_beside_what_it_breaks() {
    let page = fs::read_to_string(root().join("docs/FAULT-MODEL.md")).unwrap();
    let section = page.split("## Planted bugs").nth(1).unwrap();
    let rows: BTreeMap<&str, Vec<&str>> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "))
        .map(|(breaks, names)| (breaks, names.split('`').skip(1).step_by(2).collect()))
        .collect();
    let mut listed = 0;
    for mutant in mutants() {
        for breaks in mutant.field("Breaks").split(", ") {
            let row = rows
                .get(breaks)
                .unwrap_or_else(|| panic!("no row {breaks}"));
            let name = mutant.name.as_str();
            assert!(row.contains(&name), "{name} is not beside {breaks}");
            listed += 1;
        }
    }
    let names: usize = rows.values().map(Vec::len).sum();
    assert_eq!(names, listed, "what is listed is there");
}
