//! A machine of its own for commands that a document gives to root: with directories, network and processes that nobody
//! else sees, so that `/srv`, the default ports and the default state directory can be used as the document does.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tidemark_integration::small_disk::may_mount;

use super::postgres::Programs;
use crate::{
    programs::{bin_dir, have},
    scene::in_a_namespace,
};

/// What it begins with. Directories are bound over the machine's own; PostgreSQL's socket is where Debian has it.
const BEGIN: &str = r#"
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
ip link set lo up
mkdir --parents "$WORLD/srv" "$WORLD/mnt" "$WORLD/run" "$WORLD/home" /run/postgresql
chown postgres "$WORLD/run"
mount --bind "$WORLD/srv" /srv
mount --bind "$WORLD/mnt" /mnt
mount --bind "$WORLD/run" /run/postgresql
export HOME="$WORLD/home"
both_answer() {
    for _ in $(seq 600); do
        if tidemark status >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    echo "the services don't answer" >&2
    exit 1
}
"#;

pub(super) struct World {
    dir: tempfile::TempDir,
    script: String,
}

impl World {
    /// Without root, or without what the documents use, a test is skipped, and fails in CI.
    pub(super) fn new() -> Option<Self> {
        let needed = ["ip", "unshare", "runuser", "mkfs.ext4", "losetup"];
        if !may_mount() || !have(&needed) || Programs::find().is_none() {
            return None;
        }
        let script = BEGIN.to_owned();
        let dir = tempfile::tempdir().unwrap();
        Some(Self { dir, script })
    }

    /// Where `/srv` and the home are, seen from outside.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next commands, in the shell that the ones before ran in.
    pub(super) fn then(&mut self, commands: &str) {
        self.script.push_str(commands);
        self.script.push('\n');
    }

    /// A command in a terminal of its own, which prints to the file `name.out`. What ran there before gets a Ctrl-C
    /// first, and must end well.
    pub(super) fn in_a_terminal(&mut self, name: &str, command: &str) {
        let pid = format!("{name}_pid");
        let file = self.path(&format!("{name}.{}", self.script.matches(&pid).count()));
        fs::write(&file, format!("exec {command}")).unwrap();
        let (file, out) = (file.display(), self.path(&format!("{name}.out")));
        self.then(&format!(
            "if test -n \"${{{pid}:-}}\"; then kill -INT \"${pid}\"; wait \"${pid}\"; fi\n\
             bash -eu {file} >>{out} 2>&1 & {pid}=$!",
            out = out.display(),
        ));
    }

    /// Runs everything; it must succeed. Gives what it printed.
    pub(super) fn run(self) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = format!("{}:{}", bin_dir().display(), std::env::var("PATH").unwrap());
        let _alone = in_a_namespace();
        let output = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child"])
            .args([
                "--mount-proc",
                "bash",
                "-eEuo",
                "pipefail",
                "-c",
                &self.script,
            ])
            .env("PATH", path + ":/usr/sbin:/sbin")
            .env("WORLD", self.dir.path())
            .current_dir(root)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{told}\n{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.printed_in_terminals()
        );
        told
    }

    fn printed_in_terminals(&self) -> String {
        let files = fs::read_dir(self.dir.path()).unwrap();
        let files = files.map(|file| file.unwrap().path());
        files
            .filter(|file| file.extension().is_some_and(|ending| ending == "out"))
            .map(|file| {
                format!(
                    "{}:\n{}",
                    file.display(),
                    fs::read_to_string(&file).unwrap()
                )
            })
            .collect()
    }
}
