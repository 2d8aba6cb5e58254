//! PostgreSQL under pgbench. The cluster, its log and all are on the volume; recovery after a cut is recovery after a
//! power cut, so nothing need be told to PostgreSQL before one.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tidemark_integration::small_disk::may_mount;

use super::{Committer, EXT4, Filesystem, Scene, XFS};
use crate::programs::{Process, args, have, run, wait_for};

const SIZE: u64 = 384 << 20;

/// Debian's programs, which are not on the path, and the user that they run as.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    dir: PathBuf,
    user: u32,
    group: u32,
}

impl Programs {
    /// Without them a test is skipped, and fails in CI.
    pub(super) fn find() -> Option<Self> {
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
        let dir = versions
            .map(|version| version.unwrap().path().join("bin"))
            .filter(|dir| dir.join("pg_amcheck").is_file() && dir.join("postgres").is_file())
            .max();
        let Some(dir) = dir else {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "there is no PostgreSQL: integration/setup.sh installs it"
            );
            println!("skipped: there is no PostgreSQL; integration/setup.sh installs it");
            return None;
        };
        let id = |what: &str| run("id", args![what, "postgres"]).trim().parse().unwrap();
        Some(Self {
            dir,
            user: id("-u"),
            group: id("-g"),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.dir.join(program));
        command.env_clear().stdin(Stdio::null());
        command
    }

    /// Of the server, which root may not run.
    fn command_as_postgres(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.uid(self.user).gid(self.group).current_dir("/");
        command
    }

    /// A directory that the server may write to.
    pub(super) fn dir_of_theirs(&self, at: &Path) {
        fs::create_dir(at).unwrap();
        std::os::unix::fs::chown(at, Some(self.user), Some(self.group)).unwrap();
    }

    /// A cluster with page checksums, so that reading a page half of which is old fails.
    pub(super) fn initdb(&self, data: &Path, more: &[&str]) {
        self.dir_of_theirs(data);
        let mut initdb = self.command_as_postgres("initdb");
        initdb
            .args(["--username=postgres", "--auth=trust", "--data-checksums"])
            .args(["--encoding=UTF8", "--locale=C"])
            .args(more)
            .arg(data)
            .stdout(Stdio::null());
        assert!(initdb.status().unwrap().success());
    }
}

/// A running server, and how to reach it.
pub(super) struct Server {
    process: Process,
    socket: PathBuf,
    programs: Programs,
}

impl Server {
    /// Recovers what is there, and waits until it takes clients. With buffers this small and checkpoints this frequent
    /// pages of tables reach the volume all the time, and not only the log: copies of a volume that were not of one
    /// moment, read in pieces of 1 MiB over four seconds, were unsound to `pg_amcheck` then.
    pub(super) fn start(programs: &Programs, data: &Path, socket: PathBuf, more: &[&str]) -> Self {
        if !socket.exists() {
            programs.dir_of_theirs(&socket);
        }
        let mut command = programs.command_as_postgres("postgres");
        command
            .arg("-D")
            .arg(data)
            .arg("-k")
            .arg(&socket)
            .args(["-c", "listen_addresses=", "-c", "shared_buffers=4MB"])
            .args(["-c", "max_wal_size=32MB", "-c", "min_wal_size=32MB"])
            .args(more);
        let mut server = Self {
            process: Process::spawn(&mut command, "postgres"),
            socket,
            programs: programs.clone(),
        };
        wait_for("PostgreSQL", || {
            server.process.assert_runs();
            let mut ready = server.client("pg_isready");
            let ready = ready.arg("--quiet").status().unwrap();
            ready.success().then_some(())
        });
        server
    }

    pub(super) fn client(&self, program: &str) -> Command {
        let mut command = self.programs.command(program);
        command
            .env("PGHOST", &self.socket)
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres");
        command
    }

    /// A shell that ends at the first error.
    pub(super) fn psql(&self) -> Command {
        let mut psql = self.client("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1"]);
        psql
    }

    pub(super) fn sql(&self, text: &str) -> String {
        let output = self.psql().args(["-c", text]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}: {told}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(super) fn succeeds(&self, program: &str, arguments: &[&str]) {
        let output = self.client(program).args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    pub(super) fn stop(self) {
        self.process.terminate();
    }
}

/// What pgbench keeps equal in each of its transactions, and how many of its and of our transactions there are.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) sums: [i64; 4],
    pub(super) transactions: u64,
    acknowledged: u64,
}

const LOOK: &str = "select (select sum(abalance) from pgbench_accounts), \
    (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches), \
    (select coalesce(sum(delta), 0) from pgbench_history), (select count(*) from pgbench_history), \
    (select count(*) from acknowledged), (select coalesce(max(number), 0) from acknowledged)";

impl Found {
    /// Every table, index and page is sound.
    pub(super) fn by(server: &Server) -> Self {
        server.succeeds(
            "pg_amcheck",
            &[
                "--heapallindexed",
                "--parent-check",
                "--rootdescend",
                "postgres",
            ],
        );
        let row = server.sql(LOOK);
        let row: Vec<i64> = row.split('|').map(|field| field.parse().unwrap()).collect();
        assert_eq!(row[5], row[6], "no number is missing: {row:?}");
        Self {
            sums: [row[0], row[1], row[2], row[3]],
            transactions: row[4].try_into().unwrap(),
            acknowledged: row[5].try_into().unwrap(),
        }
    }
}

fn each_generation_is_recovered(filesystem: Filesystem) {
    if !may_mount() || !have(&filesystem.programs()) {
        return;
    }
    let Some(programs) = Programs::find() else {
        return;
    };
    let scene = Scene::new(filesystem, SIZE);
    let data = scene.at().join("data");
    programs.initdb(&data, &[]);
    let server = Server::start(&programs, &data, scene.path("socket"), &[]);
    server.succeeds("pgbench", &["--initialize", "--scale=2", "--quiet"]);
    server.sql("create extension amcheck; create table acknowledged (number bigint primary key)");
    let first = scene.ship();

    let mut pgbench = server.client("pgbench");
    pgbench
        .args(["--client=4", "--no-vacuum", "--time=100000"])
        .stdout(Stdio::null());
    let pgbench = Process::spawn(&mut pgbench, "pgbench");
    let committer = Committer::start(server.psql(), |number| {
        format!("insert into acknowledged values ({number});\n\\echo {number}\n")
    });
    let shipped = scene.ship_while_written(first, &committer);
    // Until now it went on without an error.
    pgbench.kill();
    committer.end();
    server.stop();

    let (generations, _) = scene.generations_from(first);
    let mut before = 0;
    for generation in generations {
        let found = scene.recover(generation, |at| {
            // It is thrown away: what it writes need not reach a disk.
            let (data, socket) = (at.join("data"), scene.path("socket"));
            let server = Server::start(&programs, &data, socket, &["-F"]);
            let found = Found::by(&server);
            server.stop();
            found
        });
        println!("generation {generation}: {found:?}");
        assert!(
            found.sums.iter().all(|sum| *sum == found.sums[0]),
            "{found:?}"
        );
        assert!(found.transactions >= before, "{found:?} after {before}");
        before = found.transactions;
        for shipped in shipped.iter().filter(|s| s.generation == generation) {
            shipped.assert_has(found.acknowledged);
        }
    }
    assert!(before > 0, "pgbench wrote");
    scene.end();
}

#[test]
fn postgresql_on_ext4_recovers_every_generation_that_was_cut_while_pgbench_ran() {
    each_generation_is_recovered(EXT4);
}

#[test]
fn postgresql_on_xfs_recovers_every_generation_that_was_cut_while_pgbench_ran() {
    each_generation_is_recovered(XFS);
}
