//! PostgreSQL with its write-ahead log on a volume of its own. The two are a group, cut at one instant: whatever moment
//! both have an image of is one that PostgreSQL recovers.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::Stdio,
    sync::RwLockReadGuard,
};

use tidemark_integration::small_disk::may_mount;

use super::{
    Committer, EXT4, Filesystem,
    postgres::{Found, Programs, Server},
};
use crate::{
    programs::{Process, Split, args, have, wait_for},
    scene::{Disk, mounts_are_ours, unmount_where_it_failed},
};

const VOLUMES: [&str; 2] = ["data", "wal"];
const SIZE: u64 = 256 << 20;
/// Moments of which both volumes have an image, while the database was written.
const MOMENTS: usize = 10;

struct Scene {
    // First, so that they are unmounted before the services end.
    disks: Vec<Disk>,
    services: Split,
    dir: tempfile::TempDir,
    _mounts: RwLockReadGuard<'static, ()>,
}

impl Scene {
    fn new() -> Self {
        let mounts = mounts_are_ours();
        let dir = tempfile::tempdir().unwrap();
        // PostgreSQL runs as a user of its own.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut services = Split::new(dir.path());
        let files = dir.path().join("files");
        services.capture_flags = vec![
            format!("--fuse-mount={}", files.display()),
            "--interval-max=1s".to_owned(),
            "--groups=db=data,wal".to_owned(),
        ];
        services.vault_flags = vec!["--retain=200".into()];
        services.start_vault();
        services.start_capture();
        let mut disks = Vec::new();
        for name in VOLUMES {
            let file = dir.path().join(format!("{name}.img"));
            let size = SIZE.to_string();
            services
                .cli
                .json(args!["volume", "add", name, "--file", file, "--size", size]);
            let volume = files.join(format!("{name}.img"));
            Filesystem::run_on(EXT4.make, &volume);
            disks.push(Disk::mount(
                &volume,
                dir.path().join(name),
                true,
                EXT4.mount,
            ));
        }
        Self {
            disks,
            services,
            dir,
            _mounts: mounts,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The moments of which both have an image, newest first: a generation of each.
    fn moments(&self) -> Vec<[u64; 2]> {
        let listed = self
            .services
            .cli
            .json(args!["generation", "common", "data", "wal"]);
        let listed = listed.as_array().unwrap().iter();
        let number = |moment: &serde_json::Value, name| moment["generations"][name].as_u64();
        listed
            .map(|moment| VOLUMES.map(|name| number(moment, name).unwrap()))
            .collect()
    }

    /// Restores a moment, and has PostgreSQL recover it.
    fn recover(&self, programs: &Programs, moment: [u64; 2]) -> Found {
        let images = [0, 1].map(|n| {
            let cli = &self.services.cli;
            cli.restore(VOLUMES[n], moment[n], self.dir.path())
        });
        let [data, wal] = [0, 1].map(|n| {
            let at = self.path(&format!("recovered-{}", VOLUMES[n]));
            Disk::mount(&images[n], at, false, "defaults")
        });
        // It names the log of the database that goes on.
        let log = data.at.join("data/pg_wal");
        fs::remove_file(&log).unwrap();
        symlink(wal.at.join("wal"), &log).unwrap();
        let socket = self.path("socket");
        let server = Server::start(programs, &data.at.join("data"), socket, &["-F"]);
        let found = Found::by(&server);
        server.stop();
        for (disk, image) in [data, wal].into_iter().zip(&images) {
            disk.unmount();
            Filesystem::run_on(EXT4.check, image);
            fs::remove_file(image).unwrap();
        }
        found
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.disks.clear();
        unmount_where_it_failed(self.dir.path());
    }
}

#[test]
fn postgresql_with_its_log_on_another_volume_recovers_every_moment_of_the_group() {
    if !may_mount() || !have(&EXT4.programs()) {
        return;
    }
    let Some(programs) = Programs::find() else {
        return;
    };
    let mut scene = Scene::new();
    let (data, wal) = (scene.path("data/data"), scene.path("wal/wal"));
    programs.dir_of_theirs(&wal);
    programs.initdb(&data, &[&format!("--waldir={}", wal.display())]);
    let server = Server::start(&programs, &data, scene.path("socket"), &[]);
    server.succeeds("pgbench", &["--initialize", "--scale=2", "--quiet"]);
    server.sql("create extension amcheck; create table acknowledged (number bigint primary key)");
    scene.services.cli.json(args!["ship", "data"]);
    // Before this there is nothing that can be looked at.
    let first = wait_for("a first moment", || scene.moments().first().copied());

    let mut pgbench = server.client("pgbench");
    pgbench
        .args(["--client=4", "--no-vacuum", "--time=100000"])
        .stdout(Stdio::null());
    let pgbench = Process::spawn(&mut pgbench, "pgbench");
    let committer = Committer::start(server.psql(), |number| {
        format!("insert into acknowledged values ({number});\n\\echo {number}\n")
    });
    let written = |scene: &Scene| {
        let mut moments = scene.moments();
        moments.retain(|moment| moment[0] > first[0] && moment[1] > first[1]);
        moments
    };
    wait_for("moments", || {
        (written(&scene).len() >= MOMENTS).then_some(())
    });
    pgbench.kill();
    committer.end();
    server.stop();
    scene.disks.drain(..).for_each(Disk::unmount);

    let mut newer = u64::MAX;
    for moment in written(&scene) {
        let found = scene.recover(&programs, moment);
        println!("moment {moment:?}: {found:?}");
        assert!(
            found.sums.iter().all(|sum| *sum == found.sums[0]),
            "{found:?}"
        );
        assert!(found.transactions <= newer, "{found:?} before {newer}");
        newer = found.transactions;
    }
    scene.services.stop_capture();
    scene.services.stop_vault();
}
