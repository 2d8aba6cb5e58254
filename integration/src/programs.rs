//! The real programs: found, started, killed, asked.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use serde_json::Value;

/// The inode of the directory of every FUSE mount.
const FUSE_ROOT: u64 = 1;
/// Whatever takes longer than this does not happen any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the programs are: `TIDEMARK_BIN_DIR`, else beside this test, built where they are missing.
pub fn bin_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = std::env::var_os("TIDEMARK_BIN_DIR") {
            return PathBuf::from(dir);
        }
        let test = std::env::current_exe().unwrap();
        let dir = test.ancestors().nth(2).unwrap().to_owned();
        let programs = ["tidemark", "capture-svc", "vault-svc"];
        if !programs.iter().all(|program| dir.join(program).is_file()) {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
            let built = Command::new(cargo)
                .args(["build", "--workspace", "--bins"])
                .current_dir(root)
                .status()
                .unwrap();
            assert!(built.success(), "the programs could not be built");
        }
        dir
    })
}

/// One of our programs, with nothing of this machine's environment that it heeds.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(bin_dir().join(name));
    for (key, _) in std::env::vars_os() {
        let key_text = key.to_string_lossy();
        if ["TIDEMARK_", "CAPTURE_", "VAULT_", "OTEL_", "TRACE"]
            .iter()
            .any(|p| key_text.starts_with(p))
        {
            command.env_remove(&key);
        }
    }
    command
}

/// Whether these programs of other people are there; a test without them is skipped, and fails in CI.
pub fn have(programs: &[&str]) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| {
            !path
                .split(':')
                .any(|dir| Path::new(dir).join(program).is_file())
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{missing:?} not found: integration/setup.sh installs what the tests need"
    );
    println!("skipped: {missing:?} not found; integration/setup.sh installs what the tests need");
    false
}

/// One of other people's programs, wherever Debian has it; it must succeed.
pub fn run(program: &str, args: &[&OsStr]) -> String {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program)
        .args(args)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Builds an argument list out of anything that is text or a path.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$(std::ffi::OsStr::new(&$arg)),*] };
}
pub use args;

/// A process that ends with the test.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    pub fn spawn(command: &mut Command, name: &str) -> Self {
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Self {
            child,
            name: name.to_owned(),
        }
    }

    /// `kill -9`; until then it must have run.
    pub fn kill(mut self) {
        self.assert_runs();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM, and waits for the end, which must be a clean one.
    pub fn terminate(mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = wait_for("the end after SIGTERM", || self.child.try_wait().unwrap());
        assert!(status.success(), "{} ended with {status}", self.name);
    }

    pub fn assert_runs(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} ended with {status}", self.name);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing is left to do about one that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again until there is an answer.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An address that nothing listens on.
pub fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

/// The `tidemark` command against one pair of services.
#[derive(Debug, Clone)]
pub struct Cli {
    pub capture: String,
    pub vault: String,
}

impl Cli {
    pub fn command(&self, args: &[&OsStr]) -> Command {
        let mut command = program("tidemark");
        command
            .args(args)
            .args(["--capture", &self.capture, "--vault", &self.vault]);
        command
    }

    pub fn output(&self, args: &[&OsStr]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Succeeds and prints JSON.
    pub fn json(&self, args: &[&OsStr]) -> Value {
        let output = self.command(args).arg("--json").output().unwrap();
        assert!(
            output.status.success(),
            "tidemark {args:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Fails with this exit code and reason; gives message and action.
    pub fn fails(&self, args: &[&OsStr], code: i32, reason: &str) -> String {
        let output = self.command(args).arg("--json").output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(code),
            "tidemark {args:?}: {told}"
        );
        let error: Value = serde_json::from_str(&told).unwrap();
        let error = &error["error"];
        assert_eq!(error["reason"], reason, "tidemark {args:?}: {told}");
        assert!(
            error["action"]
                .as_str()
                .is_some_and(|action| !action.is_empty()),
            "says what to do: {told}"
        );
        format!(
            "{} → {}",
            error["message"].as_str().unwrap(),
            error["action"].as_str().unwrap()
        )
    }

    pub fn generations(&self, volume: &str) -> Vec<Value> {
        self.json(args!["generation", "list", volume])
            .as_array()
            .unwrap()
            .clone()
    }

    /// Restores a generation into a file and gives its path.
    pub fn restore(&self, volume: &str, generation: u64, dir: &Path) -> PathBuf {
        let output = dir.join(format!("{volume}-{generation}.restored"));
        let told = self.json(args![
            "restore",
            format!("{volume}@{generation}"),
            output,
            "--force"
        ]);
        assert_eq!(told["generation"], generation);
        output
    }

    /// Waits until a whole pass of the source scrub, begun after this call, has found nothing.
    pub fn assert_scrub_is_clean(&self, volume: &str) {
        let passes = |shown: &Value| shown["scrub"]["passes"].as_u64().unwrap();
        let show = || self.json(args!["volume", "show", volume]);
        let begun = passes(&show());
        let shown = wait_for("a pass of the source scrub", || {
            let shown = show();
            // The pass under way when we began may have read blocks before.
            (passes(&shown) >= begun + 2).then_some(shown)
        });
        assert_eq!(shown["scrub"]["mismatches"], 0, "{shown}");
    }
}

/// `tidemark up` on a fresh folder.
#[derive(Debug)]
pub struct Up {
    pub process: Process,
    pub cli: Cli,
    pub socket: PathBuf,
}

impl Up {
    pub fn start(state: &Path, more: &[&str]) -> Self {
        let mut child = program("tidemark")
            .args(["up", "--json", "--log", "info"])
            .args([
                "--capture-listen",
                "127.0.0.1:0",
                "--vault-listen",
                "127.0.0.1:0",
            ])
            .arg("--state")
            .arg(state)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let told: Value = serde_json::from_str(&line)
            .unwrap_or_else(|e| panic!("tidemark up printed {line:?}: {e}"));
        let text = |key: &str| told[key].as_str().unwrap().to_owned();
        Self {
            process: Process {
                child,
                name: "tidemark up".into(),
            },
            cli: Cli {
                capture: text("capture"),
                vault: text("vault"),
            },
            socket: PathBuf::from(text("nbd").strip_prefix("unix:").unwrap()),
        }
    }
}

/// Both services as programs of their own, so that each can be killed alone.
#[derive(Debug)]
pub struct Split {
    dir: PathBuf,
    capture_addr: SocketAddr,
    vault_addr: SocketAddr,
    capture: Option<Process>,
    vault: Option<Process>,
    pub cli: Cli,
    pub socket: PathBuf,
    /// Directory of the vault's object store.
    pub store: PathBuf,
    /// Directory of the capture service's state.
    pub capture_state: PathBuf,
    /// Flags of the capture service beyond its addresses.
    pub capture_flags: Vec<String>,
    /// Flags of the vault service beyond its addresses.
    pub vault_flags: Vec<String>,
    /// A command that runs the capture service.
    pub capture_wrapper: Vec<String>,
    /// A command that runs the vault service.
    pub vault_wrapper: Vec<String>,
}

impl Split {
    /// Not started yet.
    pub fn new(dir: &Path) -> Self {
        let (capture_addr, vault_addr) = (free_addr(), free_addr());
        Self {
            dir: dir.to_owned(),
            capture_addr,
            vault_addr,
            capture: None,
            vault: None,
            cli: Cli {
                capture: format!("http://{capture_addr}"),
                vault: format!("http://{vault_addr}"),
            },
            socket: dir.join("nbd.sock"),
            store: dir.join("store"),
            capture_state: dir.join("capture"),
            capture_flags: Vec::new(),
            vault_flags: Vec::new(),
            capture_wrapper: Vec::new(),
            vault_wrapper: Vec::new(),
        }
    }

    pub fn start_vault(&mut self) {
        self.spawn_vault();
        self.vault_is_up();
    }

    /// Does not wait until it listens.
    pub fn spawn_vault(&mut self) {
        let mut command = wrapped(&self.vault_wrapper, "vault-svc");
        command
            .args(["--listen", &self.vault_addr.to_string()])
            .arg("--store-dir")
            .arg(&self.store)
            .arg("--state-dir")
            .arg(self.dir.join("vault"))
            .args(&self.vault_flags)
            .stderr(self.log("vault-svc"));
        self.vault = Some(Process::spawn(&mut command, "vault-svc"));
    }

    /// Waits until it listens.
    pub fn vault_is_up(&mut self) {
        listens(self.vault_addr, self.vault.as_mut().unwrap());
    }

    pub fn start_capture(&mut self) {
        self.spawn_capture();
        self.capture_is_up();
    }

    /// Does not wait until it listens.
    pub fn spawn_capture(&mut self) {
        let mut command = wrapped(&self.capture_wrapper, "capture-svc");
        command
            .args(["--listen", &self.capture_addr.to_string()])
            .args(["--vault", &self.cli.vault])
            .arg("--state")
            .arg(&self.capture_state)
            .arg(format!("--nbd=unix:{}", self.socket.display()))
            // Tests that want to wait for a lull say so.
            .env("CAPTURE_LULL_WAIT_MAX", "0s")
            .args(&self.capture_flags)
            .stderr(self.log("capture-svc"));
        self.capture = Some(Process::spawn(&mut command, "capture-svc"));
    }

    /// Waits until it listens, and has mounted its directory where it was given one.
    pub fn capture_is_up(&mut self) {
        let process = self.capture.as_mut().unwrap();
        let mounts = self.capture_flags.iter();
        for at in mounts.filter_map(|flag| flag.strip_prefix("--fuse-mount=")) {
            wait_for("the mounted directory", || {
                process.assert_runs();
                // What an earlier one has left there can't be looked at.
                let inode = fs::metadata(at).ok()?.ino();
                (inode == FUSE_ROOT).then_some(())
            });
        }
        listens(self.capture_addr, process);
        wait_for("the NBD server", || {
            process.assert_runs();
            UnixStream::connect(&self.socket).ok()
        });
    }

    /// Both ran until now.
    pub fn assert_both_run(&mut self) {
        self.capture.as_mut().unwrap().assert_runs();
        self.vault.as_mut().unwrap().assert_runs();
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    fn log(&self, name: &str) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.log_path(name))
            .unwrap()
    }

    /// Everything that both services have logged since they were first started.
    pub fn logged(&self) -> String {
        ["vault-svc", "capture-svc"]
            .map(|name| fs::read_to_string(self.log_path(name)).unwrap_or_default())
            .concat()
    }

    pub fn capture_pid(&self) -> u32 {
        self.capture.as_ref().unwrap().child.id()
    }

    pub fn vault_pid(&self) -> u32 {
        self.vault.as_ref().unwrap().child.id()
    }

    pub fn kill_vault(&mut self) {
        self.vault.take().unwrap().kill();
    }

    pub fn kill_capture(&mut self) {
        self.capture.take().unwrap().kill();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop_capture(&mut self) {
        self.capture.take().unwrap().terminate();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop_vault(&mut self) {
        self.vault.take().unwrap().terminate();
    }

    pub fn stop(mut self) {
        self.stop_capture();
        self.stop_vault();
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in last_lines(&self.logged(), 200) {
                eprintln!("{line}");
            }
        }
    }
}

fn last_lines(text: &str, count: usize) -> impl Iterator<Item = &str> {
    let skipped = text.lines().count().saturating_sub(count);
    text.lines().skip(skipped)
}

/// One of the services, run by another command where there is one.
fn wrapped(wrapper: &[String], name: &str) -> Command {
    let Some((first, rest)) = wrapper.split_first() else {
        return program(name);
    };
    let mut command = Command::new(first);
    command.args(rest).arg(bin_dir().join(name));
    command
}

fn listens(addr: SocketAddr, process: &mut Process) {
    wait_for(&format!("something to listen on {addr}"), || {
        process.assert_runs();
        TcpStream::connect(addr).ok()
    });
}
