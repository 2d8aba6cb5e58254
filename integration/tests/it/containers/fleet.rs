//! The images as containers: one vault, several sources, a network of their own. Whatever a test starts ends with it.
//!
//! Nothing is published: the command runs inside the containers, as it does for whoever operates them, and the sockets
//! and files of a source are in a folder of this machine that is mounted into it.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::Value;
use testcontainers::{
    ContainerAsync, GenericImage, ImageExt,
    core::{Healthcheck, Mount, WaitFor},
    runners::AsyncRunner,
};

use crate::{
    docs::root,
    programs::{bin_dir, wait_for},
    workload::{Writer, seed},
};

pub(crate) const TAG: &str = "test";
/// The same programs under another name: what an upgrade replaces the first ones with.
pub(crate) const NEXT_TAG: &str = "test-next";
/// The user of the images.
const USER: u32 = 65532;
pub(crate) const SIZE: usize = 8 << 20;

/// The engine's own client: another one on the path may be without BuildKit.
pub(crate) fn docker() -> Command {
    let own = Path::new("/usr/bin/docker");
    Command::new(if own.is_file() {
        own
    } else {
        Path::new("docker")
    })
}

pub(crate) fn docker_does(args: &[&str]) -> String {
    let output = docker().args(args).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker {args:?}: {told}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Whether there is a Docker engine that this user may use as root; the images are built then. A test without one is
/// skipped, and fails in CI.
pub(crate) fn have_images() -> bool {
    static BUILT: OnceLock<bool> = OnceLock::new();
    *BUILT.get_or_init(|| {
        let answers = docker().arg("info").output();
        let is_root = rustix::process::getuid().is_root();
        if !is_root || !answers.is_ok_and(|output| output.status.success()) {
            let why =
                "no Docker engine answers, or this is not root: integration/setup.sh starts one";
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
            println!("skipped: {why}");
            return false;
        }
        build_images(TAG, &[]);
        true
    })
}

/// The vault's image of another release.
pub(crate) fn build_next_vault() {
    build_images(NEXT_TAG, &["vault"]);
}

/// All images, unless some are named.
fn build_images(tag: &str, images: &[&str]) {
    let output = Command::new(root().join("docker/test-images.sh"))
        .arg("--bin-dir")
        .arg(bin_dir())
        .args(["--tag", tag])
        .args(images)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker/test-images.sh: {told}");
}

/// Both services answer within a fraction of a second: the images' own period is for machines that idle.
fn healthcheck(program: &str) -> Healthcheck {
    Healthcheck::cmd([program, "health"])
        .with_interval(Duration::from_millis(300))
        .with_timeout(Duration::from_secs(10))
        .with_retries(100)
}

type Container = ContainerAsync<GenericImage>;

/// A vault and its network.
pub(crate) struct Fleet {
    name: String,
    /// None while it is down.
    vault: Option<Container>,
    vault_state: VaultState,
    // Late, so that the containers end before it goes.
    dir: tempfile::TempDir,
}

/// Where the vault keeps what it has.
enum VaultState {
    Folder,
    /// In memory, of so many bytes.
    Bounded(u64),
}

impl Fleet {
    pub(crate) async fn start() -> Self {
        Self::start_with(VaultState::Folder).await
    }

    /// The vault has a disk of so many bytes.
    pub(crate) async fn start_with_disk(bytes: u64) -> Self {
        Self::start_with(VaultState::Bounded(bytes)).await
    }

    async fn start_with(vault_state: VaultState) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Relaxed);
        let mut fleet = Self {
            name: format!("tidemark-it-{}-{count}", std::process::id()),
            vault: None,
            vault_state,
            dir: tempfile::tempdir().unwrap(),
        };
        fleet.start_vault(TAG).await;
        fleet
    }

    pub(crate) fn vault_name(&self) -> String {
        format!("{}-vault", self.name)
    }

    fn network(&self) -> String {
        format!("{}-link", self.name)
    }

    /// A folder for a container.
    fn folder(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        chown(&path, Some(USER), Some(USER)).unwrap();
        path
    }

    pub(crate) async fn start_vault(&mut self, tag: &str) {
        let request = GenericImage::new("tidemark-vault", tag)
            .with_wait_for(WaitFor::healthcheck())
            .with_network(self.network())
            .with_container_name(self.vault_name())
            .with_readonly_rootfs(true)
            .with_cap_drop("ALL")
            .with_env_var("VAULT_ALLOW_PLAIN_TEXT", "true")
            .with_env_var("VAULT_RETAIN", "64")
            .with_env_var("VAULT_RESERVE_BYTES", "4MiB")
            .with_health_check(healthcheck("vault-svc"));
        let at = "/var/lib/tidemark";
        let request = match self.vault_state {
            VaultState::Folder => {
                let folder = self.folder("vault");
                request
                    .with_mount(Mount::bind_mount(folder.to_str().unwrap(), at))
                    .with_host_config_modifier(|config| config.publish_all_ports = Some(false))
            }
            VaultState::Bounded(bytes) => request.with_host_config_modifier(move |config| {
                config.publish_all_ports = Some(false);
                let options = format!("size={bytes},uid={USER},gid={USER},mode=0700");
                config.tmpfs = Some([(at.to_owned(), options)].into());
            }),
        };
        self.vault = Some(request.start().await.unwrap());
    }

    /// SIGTERM; it must end by itself, and well.
    pub(crate) async fn stop_vault(&mut self) {
        let vault = self.vault.take().unwrap();
        vault.stop_with_timeout(Some(30)).await.unwrap();
        assert_eq!(vault.exit_code().await.unwrap(), Some(0));
        vault.rm().await.unwrap();
    }

    /// A source with the volume `data`, and a writer on it.
    pub(crate) async fn source(&self, name: &str, number: u64) -> Source {
        let dir = self.folder(name);
        let folder = |below: &str| {
            let folder = self.folder(&format!("{name}/{below}"));
            folder.to_str().unwrap().to_owned()
        };
        let vault = format!("http://{}:7402", self.vault_name());
        let container_name = format!("{}-{name}", self.name);
        let container = GenericImage::new("tidemark-capture", TAG)
            .with_wait_for(WaitFor::healthcheck())
            .with_network(self.network())
            .with_container_name(&container_name)
            .with_readonly_rootfs(true)
            .with_cap_drop("ALL")
            .with_env_var("CAPTURE_ALLOW_PLAIN_TEXT", "true")
            .with_env_var("TIDEMARK_ALLOW_PLAIN_TEXT", "true")
            .with_env_var("CAPTURE_VAULT", &vault)
            .with_env_var("TIDEMARK_VAULT", &vault)
            .with_env_var("CAPTURE_SOURCE_NAME", name)
            .with_env_var("CAPTURE_INTERVAL_MAX", "300ms")
            .with_env_var("CAPTURE_LULL_WAIT_MAX", "0s")
            .with_env_var("CAPTURE_BACKOFF_MAX", "500ms")
            .with_mount(Mount::bind_mount(folder("state"), "/var/lib/tidemark"))
            .with_mount(Mount::bind_mount(folder("run"), "/run/tidemark"))
            .with_mount(Mount::bind_mount(folder("volumes"), "/volumes"))
            .with_host_config_modifier(|config| config.publish_all_ports = Some(false))
            .with_health_check(healthcheck("capture-svc"))
            .start()
            .await
            .unwrap();
        let mut source = Source {
            name: container_name,
            volume: name.to_owned(),
            network: self.network(),
            writer: None,
            dir,
            _container: container,
        };
        source.protect();
        let socket = source.dir.join("run/nbd.sock");
        source.writer = Some(Writer::start(socket, name, SIZE, seed(number)));
        source
    }
}

/// A container with a capture service, and a writer on its volume.
pub(crate) struct Source {
    /// Of the container.
    name: String,
    volume: String,
    network: String,
    writer: Option<Writer>,
    dir: PathBuf,
    _container: Container,
}

impl Source {
    fn protect(&self) {
        let (file, size) = (format!("/volumes/{}.img", self.volume), SIZE.to_string());
        let volume = &self.volume;
        let add = ["volume", "add", volume, "--file", &file, "--size", &size];
        self.json(&[&add[..], &["--if-missing"]].concat());
    }

    pub(crate) fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    /// The command, inside the container.
    pub(crate) fn tidemark(&self, args: &[&str]) -> Output {
        docker()
            .args(["exec", &self.name, "tidemark", "--json"])
            .args(args)
            .output()
            .unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.tidemark(args);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {args:?}: {told}", self.name);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn show(&self) -> Value {
        self.json(&["volume", "show", &self.volume])
    }

    /// The generation that the next interval builds on.
    pub(crate) fn generation(&self) -> u64 {
        self.show()["generation"].as_u64().unwrap()
    }

    /// Waits until another interval has been committed.
    pub(crate) fn goes_on(&self) {
        let before = self.generation();
        wait_for("another interval", || {
            (self.generation() > before).then_some(())
        });
    }

    /// Takes the container off the network.
    pub(crate) fn cut_off(&self) {
        docker_does(&["network", "disconnect", &self.network, &self.name]);
    }

    pub(crate) fn connect(&self) {
        docker_does(&["network", "connect", &self.network, &self.name]);
    }

    /// `kill -9`, and another start.
    pub(crate) fn kill_and_restart(&self) {
        kill_and_restart(&self.name, "capture-svc");
    }

    /// Restores a generation; gives the file, on this machine.
    pub(crate) fn restore(&self, generation: u64) -> PathBuf {
        let which = format!("{}@{generation}", self.volume);
        let told = self.json(&["restore", &which, "/volumes/restored.img", "--force"]);
        assert_eq!(told["generation"], generation);
        self.dir.join("volumes/restored.img")
    }

    /// Ends the writing, ships the rest, and holds volume and newest generation to what was written.
    pub(crate) fn settle_and_check(&mut self) {
        self.writer().stop();
        let receipt = wait_for("the last interval", || {
            let output = self.tidemark(&["ship", &self.volume]);
            let shipped = output.status.success();
            shipped.then(|| serde_json::from_slice::<Value>(&output.stdout).unwrap())
        });
        let restored = self.restore(receipt["generation"].as_u64().unwrap());
        let all = self.writer().done();
        self.writer().assert_within(&restored, all..=all);
        let volume = self.dir.join(format!("volumes/{}.img", self.volume));
        assert!(fs::read(volume).unwrap() == fs::read(restored).unwrap());
    }
}

/// `kill -9` of a service in its container, and another start; returns when it serves.
pub(crate) fn kill_and_restart(container: &str, program: &str) {
    docker_does(&["kill", container]);
    docker_does(&["start", container]);
    wait_for("the restarted service", || {
        let health = docker()
            .args(["exec", container, program, "health"])
            .output()
            .unwrap();
        health.status.success().then_some(())
    });
}
