//! Work in the kernel that waits for the capture service, done by a process that may be left behind.
//!
//! A service that is stopped (by SIGSTOP, a debugger, a frozen container) answers nothing. Whoever waits then for a device
//! that it serves can't be killed, and a process with such a thread doesn't end, until the service goes on or ends. So
//! the program runs once more, as a process that does the work, and is watched: where the service doesn't answer for
//! [`ANSWER_MAX`] the command ends without it. The process ends with the command at the latest, or as soon as the kernel
//! lets it; what it has begun is undone then, as after any kill.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::sync::oneshot;

use super::loop_device::answers;
use crate::failure::Failure;

/// How long the service has to answer.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long work goes on before, and between two times that, it is asked whether the service answers.
const ASK_PERIOD: Duration = Duration::from_secs(2);
/// Whose work a process does: the process id of its parent.
const PARENT: &str = "TIDEMARK_ASIDE_OF";
/// The device that it is to read, where that is all.
const DEVICE: &str = "TIDEMARK_ASIDE_DEVICE";

/// What is behind a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is served.
    Served,
    /// The service that served it has ended.
    Dead,
    /// No answer came in time.
    None,
}

/// Whether this process does another one's work. It ends with it from now on.
pub(crate) fn is_aside() -> bool {
    let parent = std::env::var(PARENT).ok().and_then(|pid| pid.parse().ok());
    let Some(parent) = parent.and_then(Pid::from_raw) else {
        return false;
    };
    let set = set_parent_process_death_signal(Some(Signal::KILL));
    if set.is_err() || getppid() != Some(parent) {
        // It has ended already.
        std::process::exit(1);
    }
    true
}

/// What a process that is to read a device does, first of all; none in any other.
#[must_use]
pub fn read_device() -> Option<ExitCode> {
    let device = PathBuf::from(std::env::var_os(DEVICE)?);
    let served = is_aside() && answers(&device);
    Some(ExitCode::from(u8::from(!served)))
}

/// This program, once more.
fn again() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .env(PARENT, std::process::id().to_string())
        .stdin(Stdio::null());
    command
}

fn start(mut command: Command) -> oneshot::Receiver<io::Result<Output>> {
    let (tell, told) = oneshot::channel();
    // A thread of its own, which nobody waits for: the process ends with the thread that started it.
    thread::spawn(move || {
        // Whoever asked may have ended.
        let _ = tell.send(command.output());
    });
    told
}

/// What is behind a loop device.
pub(crate) async fn ask(device: &Path) -> Answer {
    let mut reading = again();
    reading.env(DEVICE, device);
    match tokio::time::timeout(ANSWER_MAX, start(reading)).await {
        Ok(Ok(Ok(output))) if output.status.success() => Answer::Served,
        Ok(_) => Answer::Dead,
        Err(_) => Answer::None,
    }
}

/// Does what this command was called for in a process of its own, for as long as `answers` says that the service does.
/// Gives what it has printed and its end; none where the service doesn't answer.
pub(crate) async fn run(answers: impl AsyncFn() -> bool) -> Result<Option<Output>, Failure> {
    let mut work = again();
    work.args(std::env::args_os().skip(1));
    let work = start(work);
    let silence = async {
        loop {
            tokio::time::sleep(ASK_PERIOD).await;
            if !answers().await {
                return;
            }
        }
    };
    let output = tokio::select! {
        output = work => output,
        () = silence => return Ok(None),
    };
    match output {
        Ok(output) => output.map(Some),
        Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
    }
    .map_err(|error| Failure::io("run this program", &error))
}
