//! The command that says whether an image is coherent.

use std::{
    ffi::OsString,
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};

use super::super::restore::blocking;
use crate::failure::{Failure, Kind};

/// Where the path of the image goes.
pub(super) const PLACE: &str = "{image}";
/// How often it is looked whether the command has ended.
const POLL: Duration = Duration::from_millis(20);
/// What a shell ends with where it could not run a command.
const NOT_RUN: [i32; 2] = [126, 127];

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It ended with 0.
    Passed,
    /// It ended with another code, or by a signal.
    Failed,
    /// It was ended: it took too long.
    TimedOut,
}

/// Runs `command` by the shell over an image; what it prints goes to standard error, if anybody is to see it.
///
/// # Errors
/// It can't be run at all: that says nothing of the image.
pub(super) async fn check(
    command: &str,
    image: &Path,
    name: &str,
    time_max: Duration,
    shown: bool,
) -> Result<Verdict, Failure> {
    let mut script = Command::new("/bin/sh");
    script
        .arg("-c")
        .arg(command.replace(PLACE, "\"$TIDEMARK_IMAGE\""))
        .env("TIDEMARK_IMAGE", image)
        .env("TIDEMARK_CANDIDATE", OsString::from(name))
        .stdin(Stdio::null())
        .process_group(0);
    if shown {
        script.stdout(standard_error()?);
    } else {
        script.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let stop = Stop(Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop.0);
    let ended = blocking(move || {
        let child = script
            .spawn()
            .map_err(|e| Failure::io("run the check by /bin/sh", &e))?;
        wait(child, time_max, &stopped)
    });
    let ended = ended.await?;
    drop(stop);
    match ended {
        None => Ok(Verdict::TimedOut),
        Some(status) if status.success() => Ok(Verdict::Passed),
        Some(status) => match status.code() {
            Some(code) if NOT_RUN.contains(&code) => Err(Failure::new(
                Kind::Usage,
                "CHECK_NOT_RUN",
                format!("the check ended with {code}: the shell could not run it"),
                "try the command by hand on an image that `tidemark restore` wrote",
            )),
            _ => Ok(Verdict::Failed),
        },
    }
}

/// Ends the command when the search is given up.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn standard_error() -> Result<Stdio, Failure> {
    let ours = std::io::stderr().as_fd().try_clone_to_owned();
    Ok(ours
        .map_err(|e| Failure::io("use standard error", &e))?
        .into())
}

/// Waits for the end; none where the command, and all that it started, had to be killed.
fn wait(
    mut child: Child,
    time_max: Duration,
    stopped: &AtomicBool,
) -> Result<Option<ExitStatus>, Failure> {
    let begun = Instant::now();
    let failed = |e| Failure::io("wait for the check", &e);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(Some(status));
        }
        if begun.elapsed() >= time_max || stopped.load(Relaxed) {
            if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                // It may have ended just now.
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait().map_err(failed)?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn verdict(command: &str) -> Result<Verdict, Failure> {
        let image = Path::new("/tmp/it's an image");
        check(command, image, "data@3", Duration::from_millis(300), false).await
    }

    #[tokio::test]
    async fn the_exit_code_decides_and_a_hanging_check_is_killed_with_its_children() {
        assert_eq!(verdict("true").await.unwrap(), Verdict::Passed);
        assert_eq!(verdict("exit 3").await.unwrap(), Verdict::Failed);
        assert_eq!(verdict("kill -9 $$").await.unwrap(), Verdict::Failed);
        assert_eq!(
            verdict("sleep 600 & wait").await.unwrap(),
            Verdict::TimedOut
        );
        let failure = verdict("/no/such/program {image}").await.unwrap_err();
        assert_eq!(failure.reason(), "CHECK_NOT_RUN");
    }

    #[tokio::test]
    async fn the_command_gets_the_image_as_one_word_and_the_name_of_the_candidate() {
        let command = "test {image} = \"/tmp/it's an image\" -a \"$TIDEMARK_CANDIDATE\" = data@3";
        assert_eq!(verdict(command).await.unwrap(), Verdict::Passed);
    }
}
