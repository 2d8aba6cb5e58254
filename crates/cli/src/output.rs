//! Standard output: one place decides between text for people and JSON for programs.

use std::{
    io::{self, Write},
    process::Output,
};

use serde::Serialize;

use crate::failure::{Failure, Kind};

/// Prints `text`, or with `json` the object on one line.
///
/// # Errors
/// Standard output cannot be written. Where its reader has gone away that is no error: nobody wants the rest.
pub fn print(json: bool, object: &impl Serialize, text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = if json {
        serde_json::to_string(object)
            .map_err(io::Error::from)
            .and_then(|line| writeln!(out, "{line}"))
    } else {
        out.write_all(text.as_bytes())
    };
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            Kind::Failed,
            "IO_FAILED",
            format!("cannot write to standard output: {error}"),
            "",
        )),
        _ => Ok(()),
    }
}

/// Prints what another process of ours has printed, and ends as it did.
pub(crate) fn relay(output: &Output) -> Result<(), Failure> {
    // Where standard error is closed nobody is left to tell.
    let _ = io::stderr().write_all(&output.stderr);
    let mut out = io::stdout().lock();
    match out.write_all(&output.stdout).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(Failure::io("write to standard output", &error));
        }
        _ => {}
    }
    match output.status.code().map(u8::try_from) {
        Some(Ok(0)) => Ok(()),
        Some(Ok(code)) => Err(Failure::told(code)),
        // It was killed.
        _ => Err(Failure::interrupted()),
    }
}
