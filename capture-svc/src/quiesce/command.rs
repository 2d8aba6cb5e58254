//! One run of a command that freezes or thaws.
//!
//! It leads a process group of its own. When it takes too long, or whoever waits for it leaves off, the group is killed
//! as a whole: a shell's children go with it. What it prints goes to the service's standard error.

use std::{
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use capture_core::coherence::Failure;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tidemark_block::Epoch;
use tokio::time::timeout;

use crate::config::CommandLine;

/// What the command is told, in its environment.
#[derive(Debug, Clone)]
pub(super) struct Call {
    /// `TIDEMARK_VOLUME`
    pub(super) volume: String,
    /// `TIDEMARK_EPOCH`: the one that the cut closes; 0 where that is not known any more.
    pub(super) epoch: Epoch,
    /// `TIDEMARK_PHASE`: `freeze` or `thaw`.
    pub(super) phase: &'static str,
}

/// Until it is reaped its number, and that of its group, belong to nobody else.
#[derive(Debug)]
struct Running(Option<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended just now.
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            std::thread::spawn(move || child.wait());
        }
    }
}

/// Runs it to its end, for at most `limit`.
pub(super) async fn run(line: &CommandLine, call: &Call, limit: Duration) -> Result<(), Failure> {
    let words = line.words();
    let Some((program, arguments)) = words.split_first() else {
        return Ok(());
    };
    let failed = |error: std::io::Error| Failure::Failed(format!("{program}: {error}"));
    let child = Command::new(program)
        .args(arguments)
        .env("TIDEMARK_VOLUME", &call.volume)
        .env("TIDEMARK_EPOCH", call.epoch.to_string())
        .env("TIDEMARK_PHASE", call.phase)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let pid = Pid::from_child(&child);
    let mut running = Running(Some(child));
    // It is not reaped before it is known whether it must be killed.
    let ended = tokio::task::spawn_blocking(move || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), options) {}
    });
    if timeout(limit, ended).await.is_err() {
        return Err(Failure::Late(limit));
    }
    let status = running.0.take().map(|mut child| child.wait());
    match status {
        Some(Ok(status)) if !status.success() => Err(Failure::Failed(status.to_string())),
        Some(Err(error)) => Err(failed(error)),
        Some(Ok(_)) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call {
            volume: "data".to_owned(),
            epoch: Epoch::new(7),
            phase: "freeze",
        }
    }

    async fn run_line(line: &str, limit: Duration) -> Result<(), Failure> {
        run(&line.into(), &call(), limit).await
    }

    #[tokio::test]
    async fn a_command_is_told_what_it_is_for_and_its_failure_is_told_back() {
        let told = r#"test "$TIDEMARK_VOLUME/$TIDEMARK_EPOCH/$TIDEMARK_PHASE" = data/7/freeze"#;
        assert_eq!(run_line(told, Duration::MAX).await, Ok(()));
        let failed = run_line("exit 3", Duration::MAX).await;
        assert_eq!(failed, Err(Failure::Failed("exit status: 3".to_owned())));
        let missing = run(&toml_list("/no/such/program"), &call(), Duration::MAX).await;
        assert!(matches!(missing, Err(Failure::Failed(how)) if how.contains("/no/such/program")));
    }

    fn toml_list(program: &str) -> CommandLine {
        serde::Deserialize::deserialize(serde::de::value::SeqDeserializer::<
            _,
            serde::de::value::Error,
        >::new([program].into_iter()))
        .unwrap()
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let line = format!(
            "sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait",
            pids.display()
        );
        let running = tokio::spawn(async move { run_line(&line, Duration::MAX).await });
        let child = loop {
            match std::fs::read_to_string(&pids) {
                Ok(text) => break text.trim().to_owned(),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        running.abort();
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat"));
            // A zombie that nobody has reaped yet is dead.
            stat.is_ok_and(|stat| !stat.contains(") Z"))
        };
        while alive() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let limit = Duration::from_millis(20);
        assert_eq!(
            run_line("sleep 1000", limit).await,
            Err(Failure::Late(limit))
        );
    }
}
