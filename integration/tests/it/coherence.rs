//! Workloads that are quiesced by agents, as processes: what a cut is worth then, and that none of them is ever left
//! frozen, whoever is killed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::Value;

use crate::{
    nbd::Client,
    programs::{Process, Split, args, bin_dir, wait_for},
};

const BLOCK: usize = 4096;
const SECOND: usize = 100 * BLOCK;
const NEVER_ENDS: &str = "sleep 1000";

/// The agent that freezes and thaws by commands.
pub(crate) fn agent_program() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = bin_dir().join("examples/agent_exec");
        if !path.is_file() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            let built = Command::new(cargo)
                .args(["build", "--workspace", "--example", "agent_exec"])
                .current_dir(root)
                .status()
                .unwrap();
            assert!(built.success(), "the agent could not be built");
        }
        path
    })
}

#[test]
fn an_agent_that_was_killed_while_frozen_thaws_what_it_left_before_it_attaches_again() {
    let scene = Scene::new(&[]);
    let frozen = scene.path("frozen");
    // What a killed process leaves.
    fs::write(&frozen, "").unwrap();
    let agent = scene.agent("db", "touch frozen", "rm -f frozen", &[]);
    assert!(!frozen.exists());
    agent.kill();
}

struct Scene {
    services: Split,
    dir: tempfile::TempDir,
}

impl Scene {
    /// Both services, and a volume with a generation.
    fn new(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut services = Split::new(dir.path());
        services.capture_flags = vec!["--interval-max=1h".to_owned()];
        services
            .capture_flags
            .extend(flags.iter().map(|&flag| flag.to_owned()));
        services.start_vault();
        services.start_capture();
        let file = dir.path().join("data.img");
        services.cli.json(args![
            "volume", "add", "data", "--file", file, "--size", "1MiB"
        ]);
        let scene = Self { services, dir };
        scene.ship();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> Client {
        Client::connect(&self.services.socket, "data").unwrap()
    }

    fn ship(&self) -> Value {
        self.services.cli.json(args!["ship", "data"])
    }

    /// Ships behind the test's back.
    fn ship_meanwhile(&self) -> JoinHandle<Value> {
        let cli = self.services.cli.clone();
        thread::spawn(move || cli.json(args!["ship", "data"]))
    }

    /// An attached agent. `NAME.freezing` is there once it was asked, `NAME.thawed` once it was told to go on.
    fn agent(&self, name: &str, freeze: &str, thaw: &str, more: &[&str]) -> Process {
        let out = self.path(&format!("{name}.out"));
        let freeze = format!("rm -f {name}.thawed; touch {name}.freezing; {freeze}");
        let thaw = format!("{thaw}; touch {name}.thawed");
        let mut command = Command::new(agent_program());
        command
            .current_dir(self.dir.path())
            .args(["--capture", &self.services.cli.capture, "--name", name])
            .args(["--volume", "data", "--freeze", &freeze, "--thaw", &thaw])
            .args(more)
            .stdout(File::create(&out).unwrap());
        let agent = Process::spawn(&mut command, name);
        wait_for("an attached agent", || {
            fs::read_to_string(&out)
                .unwrap()
                .contains("attached")
                .then_some(())
        });
        agent
    }

    fn wait_for_file(&self, name: &str) {
        wait_for(name, || self.path(name).exists().then_some(()));
    }
}

/// A workload that always writes two blocks, one after the other, with the same content.
struct Pairs {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl Pairs {
    /// While the file `hold` is there it holds still, and says so by the file `still`.
    fn start(scene: &Scene) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = scene.client();
        let (hold, still) = (scene.path("hold"), scene.path("still"));
        let stopped = Arc::clone(&stop);
        let pause = || thread::sleep(Duration::from_millis(1));
        let thread = thread::spawn(move || {
            let mut number = 0_u32;
            while !stopped.load(Relaxed) {
                if hold.exists() {
                    client.flush().unwrap();
                    File::create(&still).unwrap();
                    while hold.exists() {
                        pause();
                    }
                    fs::remove_file(&still).unwrap();
                }
                number += 1;
                let content: Vec<u8> = number.to_le_bytes().repeat(BLOCK / 4);
                client.write(0, &content).unwrap();
                pause();
                client.write(SECOND as u64, &content).unwrap();
            }
            number
        });
        Self { stop, thread }
    }

    fn end(self) -> u32 {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn each_generation_of_a_workload_that_an_agent_quiesces_has_both_blocks_of_a_pair_or_neither() {
    let scene = Scene::new(&[]);
    let _agent = scene.agent(
        "pairs",
        "touch hold; until test -e still; do sleep 0.01; done",
        "rm -f hold; while test -e still; do sleep 0.01; done",
        &[],
    );
    let pairs = Pairs::start(&scene);
    let mut last = Vec::new();
    for _ in 0..10 {
        let receipt = scene.ship();
        assert_eq!(receipt["coherence"], "quiesced", "{receipt}");
        assert_eq!(receipt["coherence_reason"], "");
        let generation = receipt["generation"].as_u64().unwrap();
        let restored = scene
            .services
            .cli
            .restore("data", generation, scene.dir.path());
        let image = fs::read(restored).unwrap();
        let (first, second) = (&image[..BLOCK], &image[SECOND..SECOND + BLOCK]);
        assert!(first == second, "generation {generation} has half a pair");
        assert!(first != last, "the workload went on");
        last = first.to_vec();
    }
    assert!(pairs.end() > 10);
    scene.services.stop();
}

#[test]
fn an_agent_that_is_killed_while_frozen_is_forgotten_and_the_others_go_on() {
    let scene = Scene::new(&["--quiesce-timeout=1h"]);
    let first = scene.agent("first", "true", "true", &[]);
    let _second = scene.agent("second", NEVER_ENDS, "true", &[]);
    scene.client().write(0, &[1; BLOCK]).unwrap();
    let shipped = scene.ship_meanwhile();
    scene.wait_for_file("first.freezing");
    // It is asked once the first one holds still.
    scene.wait_for_file("second.freezing");
    first.kill();
    let receipt = shipped.join().unwrap();
    assert_ne!(receipt["coherence"], "quiesced");
    let reason = receipt["coherence_reason"].as_str().unwrap();
    assert!(reason.starts_with("agent first went away; "), "{reason}");
    scene.wait_for_file("second.thawed");
    let listed = scene.services.cli.generations("data");
    assert_eq!(listed.last().unwrap()["coherence_reason"], reason);
    scene.services.stop();
}

#[test]
fn a_freeze_that_is_longer_than_its_deadline_costs_the_grade_and_is_left_off() {
    let scene = Scene::new(&["--quiesce-timeout=200ms"]);
    let _agent = scene.agent("slow", NEVER_ENDS, "true", &[]);
    let mut client = scene.client();
    client.write(0, &[1; BLOCK]).unwrap();
    client.flush().unwrap();
    let receipt = scene.ship();
    assert_eq!(receipt["coherence"], "flushed");
    let reason = receipt["coherence_reason"].as_str().unwrap();
    let told = [
        "agent slow did not answer within 200ms",
        "agent slow refused to freeze: it took too long",
    ];
    assert!(told.contains(&reason), "{reason}");
    scene.wait_for_file("slow.thawed");
    scene.services.stop();
}

#[test]
fn an_agent_goes_on_by_itself_when_the_service_is_killed_while_it_is_frozen() {
    let mut scene = Scene::new(&["--quiesce-timeout=1h"]);
    let _first = scene.agent("first", "true", "true", &[]);
    let _second = scene.agent("second", NEVER_ENDS, "true", &[]);
    scene.client().write(0, &[1; BLOCK]).unwrap();
    let cli = scene.services.cli.clone();
    let shipped = thread::spawn(move || cli.output(args!["ship", "data"]));
    scene.wait_for_file("second.freezing");
    scene.services.kill_capture();
    assert!(!shipped.join().unwrap().status.success());
    scene.wait_for_file("first.thawed");
    scene.wait_for_file("second.thawed");
}

#[test]
fn a_hint_of_an_agent_that_holds_still_gives_a_quiesced_cut() {
    let scene = Scene::new(&[]);
    scene.client().write(0, &[1; BLOCK]).unwrap();
    let _agent = scene.agent("hinting", "true", "true", &["--hint"]);
    wait_for("an answer to the hint", || {
        let told = fs::read_to_string(scene.path("hinting.out")).unwrap();
        told.contains("hinted true COHERENCE_QUIESCED")
            .then_some(())
    });
    let newest = wait_for("the generation of the hint", || {
        let newest = scene.services.cli.generations("data").pop()?;
        (newest["trigger"] == "hint").then_some(newest)
    });
    assert_eq!(newest["coherence"], "quiesced");
    scene.services.stop();
}
