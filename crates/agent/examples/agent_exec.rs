//! An agent that freezes and thaws by commands, for workloads that can't link the crate: it attaches again whenever the
//! service was away. The commands find the volume's name in `TIDEMARK_VOLUME`. It thaws first: what it had frozen when it was
//! killed would stay so.
//!
//! `cargo run --example agent_exec -- --volume data --freeze 'redis-cli SAVE' --thaw true`
//!
//! Where the control interface has a certificate: `--capture https://HOST:7401 --tls-ca ca.crt`, with `--tls-cert` and
//! `--tls-key`, or `--token-file`. The files are read anew for each attempt.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Result;
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process_group};
use tidemark_agent::{Dialer, DialerFiles, Workload, attach_with};
use tidemark_telemetry::Settings;

#[derive(Debug, Parser)]
struct Arguments {
    /// URL of the capture service.
    #[arg(long, default_value = "http://127.0.0.1:7401")]
    capture: String,
    /// CAs (PEM) that the service's certificate must be of; an https URL needs it.
    #[arg(long)]
    tls_ca: Option<PathBuf>,
    /// Certificate with its chain (PEM) that says who the agent is.
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM) of the certificate.
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// File with the token that says who the agent is, in place of a certificate.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// As the service names it in reasons.
    #[arg(long, default_value = "exec")]
    name: String,
    /// Name or UUID; may be given again.
    #[arg(long, required = true)]
    volume: Vec<String>,
    /// A line for the shell that returns when the workload holds still.
    #[arg(long)]
    freeze: String,
    /// A line for the shell that lets it go on. It runs at the start, too, and must do no harm where nothing is frozen.
    #[arg(long)]
    thaw: String,
    /// After attaching, say once that the moment is good, print what came of it, and go on.
    #[arg(long)]
    hint: bool,
}

struct Commands {
    freeze: String,
    thaw: String,
}

/// Kills the command, with its children, when it is no longer waited for.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // It may have ended just now.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Commands {
    async fn run(line: &str, volume: &str) -> Result<(), String> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", line])
            .env("TIDEMARK_VOLUME", volume)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut group = Group(Some(Pid::from_child(&child)));
        let ended = tokio::task::spawn_blocking(move || child.wait()).await;
        group.0 = None;
        match ended.map_err(std::io::Error::other).and_then(|ended| ended) {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Workload for Commands {
    async fn freeze(&mut self, volume: &str) -> Result<(), String> {
        Self::run(&self.freeze, volume).await
    }

    async fn thaw(&mut self, volume: &str) {
        if let Err(how) = Self::run(&self.thaw, volume).await {
            tracing::error!(volume, how, "thaw");
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let _telemetry = tidemark_telemetry::init(Settings::plain("agent", "info"))?;
    let mut commands = Commands {
        freeze: arguments.freeze,
        thaw: arguments.thaw,
    };
    for volume in &arguments.volume {
        commands.thaw(volume).await;
    }
    let dialer = Dialer {
        files: DialerFiles {
            ca: arguments.tls_ca,
            certificate: arguments.tls_cert.zip(arguments.tls_key),
            token: arguments.token_file,
        },
        allow_plain_text: false,
    };
    let mut hint = arguments.hint;
    loop {
        match attach_with(
            &dialer,
            &arguments.capture,
            &arguments.name,
            arguments.volume.clone(),
        )
        .await
        {
            Ok((session, hinter)) => {
                println!("attached");
                if std::mem::take(&mut hint) {
                    let volume = arguments.volume[0].clone();
                    tokio::spawn(async move {
                        match hinter.hint(&volume, Duration::from_secs(30)).await {
                            Ok(done) => {
                                println!("hinted {} {}", done.cut, done.coherence.as_str_name())
                            }
                            Err(error) => println!("hinted: {error}"),
                        }
                    });
                }
                let ended = session.serve(&mut commands).await;
                tracing::warn!(?ended, "attach again");
            }
            Err(error) => tracing::warn!(%error, "attach"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
