//! The images as containers: one vault, several sources, a network of their own, and certificates between them. Whatever a
//! test starts ends with it.
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
    core::{AccessMode::ReadOnly, Healthcheck, Mount, WaitFor},
    runners::AsyncRunner,
};

use super::site::Site;
use crate::{
    docs::root,
    programs::{args, bin_dir, run, wait_for},
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
    site: Option<Site>,
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
    /// With a certificate for each of the sources.
    pub(crate) async fn start(sources: &[&str]) -> Self {
        Self::start_with(VaultState::Folder, sources).await
    }

    /// The vault has a disk of so many bytes.
    pub(crate) async fn start_with_disk(bytes: u64, sources: &[&str]) -> Self {
        Self::start_with(VaultState::Bounded(bytes), sources).await
    }

    async fn start_with(vault_state: VaultState, sources: &[&str]) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Relaxed);
        let mut fleet = Self {
            name: format!("tidemark-it-{}-{count}", std::process::id()),
            vault: None,
            vault_state,
            site: None,
            dir: tempfile::tempdir().unwrap(),
        };
        let site = Site::new(fleet.folder("site"), fleet.vault_name(), sources);
        fleet.site = Some(site);
        fleet.start_vault(TAG).await;
        fleet
    }

    pub(crate) fn vault_name(&self) -> String {
        format!("{}-vault", self.name)
    }

    pub(crate) fn site(&self) -> &Site {
        self.site.as_ref().unwrap()
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
            .with_env_var("VAULT_TLS_CERT", "/etc/tidemark/vault.crt")
            .with_env_var("VAULT_TLS_KEY", "/etc/tidemark/vault.key")
            .with_env_var("VAULT_TLS_CA", "/etc/tidemark/ca.crt")
            .with_env_var("VAULT_IDENTITIES", "/etc/tidemark/identities.toml")
            .with_env_var("VAULT_TLS_RELOAD_PERIOD", "100ms")
            .with_mount(bind(&self.site().of("vault"), "/etc/tidemark").with_access_mode(ReadOnly))
            .with_env_var("VAULT_RETAIN", "64")
            .with_env_var("VAULT_RESERVE_BYTES", "4MiB")
            .with_health_check(healthcheck("vault-svc"));
        let at = "/var/lib/tidemark";
        let request = match self.vault_state {
            VaultState::Folder => {
                let folder = self.folder("vault");
                request
                    .with_mount(bind(&folder, at))
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

    /// A source with a volume of its own name, and a writer on it.
    pub(crate) async fn source(&self, name: &str, number: u64) -> Source {
        let mut source = self.start_source(name, name).await;
        source.protect();
        let socket = source.dir.join("run/nbd.sock");
        source.writer = Some(Writer::start(socket, name, SIZE, seed(number)));
        source
    }

    /// Another source with the state, the volume and the certificate that this one has now.
    pub(crate) async fn copy_of(&self, source: &Source) -> Source {
        let copy = format!("{}-copy", source.volume);
        for below in ["state", "volumes"] {
            copy_tree(
                &source.dir.join(below),
                &self.folder(&format!("{copy}/{below}")),
            );
        }
        self.start_source(&source.volume, &copy).await
    }

    /// The capture service that is called `name`, with the folders of `place`.
    async fn start_source(&self, name: &str, place: &str) -> Source {
        let dir = self.folder(place);
        let folder = |below: &str| self.folder(&format!("{place}/{below}"));
        let vault = format!("https://{}:7402", self.vault_name());
        let container_name = format!("{}-{place}", self.name);
        let mut request = GenericImage::new("tidemark-capture", TAG)
            .with_wait_for(WaitFor::healthcheck())
            .with_network(self.network())
            .with_container_name(&container_name)
            .with_readonly_rootfs(true)
            .with_cap_drop("ALL")
            .with_env_var("CAPTURE_VAULT", &vault)
            .with_env_var("CAPTURE_SOURCE_NAME", name)
            .with_env_var("CAPTURE_INTERVAL_MAX", "300ms")
            .with_env_var("CAPTURE_LULL_WAIT_MAX", "0s")
            .with_env_var("CAPTURE_BACKOFF_MAX", "500ms")
            .with_env_var("TIDEMARK_VAULT", &vault)
            .with_mount(bind(&self.site().of(name), "/etc/tidemark").with_access_mode(ReadOnly))
            // Whoever operates it is somebody else than the source, and has rights of their own.
            .with_mount(bind(&self.site().of("me"), "/etc/me").with_access_mode(ReadOnly))
            .with_mount(bind(&folder("state"), "/var/lib/tidemark"))
            .with_mount(bind(&folder("run"), "/run/tidemark"))
            .with_mount(bind(&folder("volumes"), "/volumes"));
        for (prefix, of) in [
            ("CAPTURE_VAULT", format!("/etc/tidemark/{name}")),
            ("TIDEMARK_TLS", "/etc/me/me".to_owned()),
        ] {
            let ca = Path::new(&of).with_file_name("ca.crt");
            request = request
                .with_env_var(format!("{prefix}_CA"), ca.to_str().unwrap())
                .with_env_var(format!("{prefix}_CERT"), format!("{of}.crt"))
                .with_env_var(format!("{prefix}_KEY"), format!("{of}.key"));
        }
        let container = request
            .with_host_config_modifier(|config| config.publish_all_ports = Some(false))
            .with_health_check(healthcheck("capture-svc"))
            .start()
            .await
            .unwrap();
        Source {
            name: container_name,
            volume: name.to_owned(),
            network: self.network(),
            writer: None,
            dir,
            _container: container,
        }
    }
}

fn bind(folder: &Path, at: &str) -> Mount {
    Mount::bind_mount(folder.to_str().unwrap(), at)
}

/// With owners, and with holes.
fn copy_tree(from: &Path, to: &Path) {
    let from = from.join(".");
    run("cp", args!["--archive", from, to]);
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

    /// SIGTERM, and waits for the end.
    pub(crate) fn stop(&self) {
        docker_does(&["stop", "--time=30", &self.name]);
    }

    /// Starts what was stopped; returns when it serves.
    pub(crate) fn start(&self) {
        start(&self.name, "capture-svc");
    }

    /// When the container was started last.
    pub(crate) fn started_at(&self) -> String {
        docker_does(&["inspect", "--format={{.State.StartedAt}}", &self.name])
    }

    /// Waits until the uplink shows this error, and the service has logged it.
    pub(crate) fn tells(&self, reason: &str) {
        wait_for(reason, || {
            let told = &self.show()["uplink"]["error"];
            told.as_str().unwrap().contains(reason).then_some(())
        });
        self.logs(reason);
    }

    /// Waits until the service has logged this.
    pub(crate) fn logs(&self, what: &str) {
        wait_for_log(&self.name, what);
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
    start(container, program);
}

fn start(container: &str, program: &str) {
    docker_does(&["start", container]);
    wait_for("the restarted service", || {
        let health = docker()
            .args(["exec", container, program, "health"])
            .output()
            .unwrap();
        health.status.success().then_some(())
    });
}

/// Waits until a container has logged this.
pub(crate) fn wait_for_log(container: &str, what: &str) {
    wait_for(what, || {
        let output = docker().args(["logs", container]).output().unwrap();
        let logged = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&logged)
            .contains(what)
            .then_some(())
    });
}
