//! `tidemark up`: both services in one process.

use std::{
    io,
    path::{Path, PathBuf},
};

use capture_svc::config::{Groups, NbdListen, NbdListens};
use tidemark_disk::{
    durable,
    lock::{FileLock, LockError},
};
use tidemark_telemetry::BadFilter;

use crate::{
    args::{Global, UpArgs},
    failure::{Failure, Kind},
    format, output,
    report::Endpoints,
};

pub(super) async fn run(
    global: &Global,
    args: UpArgs,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let telemetry =
        tidemark_telemetry::init(tidemark_telemetry::Settings::plain("tidemark", &args.log))
            .map_err(|error| {
                let (kind, reason) = if error.is::<BadFilter>() {
                    (Kind::Usage, "LOG_FILTER_INVALID")
                } else {
                    (Kind::Failed, "TELEMETRY_FAILED")
                };
                Failure::new(kind, reason, format!("{error:#}"), "")
            })?;
    let done = serve(global, args, stop).await;
    // It waits for what is still to be written and exported.
    let _ = tokio::task::spawn_blocking(|| telemetry.shutdown()).await;
    done
}

async fn serve(
    global: &Global,
    args: UpArgs,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    if let Err(error) = tidemark_disk::descriptors::raise_limit() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let state = state_dir(args.state.as_deref())?;
    durable::create_dir(&state)
        .map_err(|e| Failure::io(format_args!("create {}", state.display()), &e))?;
    let _lock = lock(&state)?;
    let vault = vault_svc::start(vault_config(&args, &state))
        .await
        .map_err(|error| not_started("vault", &error))?;
    let vault_url = format!("http://{}", vault.listen_addr);
    let capture = match capture_config(&args, &state, &vault_url) {
        Ok(config) => capture_svc::start(config)
            .await
            .map_err(|error| not_started("capture", &error)),
        Err(failure) => Err(failure),
    };
    let capture = match capture {
        Ok(capture) => capture,
        Err(failure) => {
            // The failure to start is what the user must hear of.
            let _ = vault.shutdown().await;
            return Err(failure);
        }
    };
    let endpoints = Endpoints {
        capture: format!("http://{}", capture.control_addr()),
        vault: vault_url,
        nbd: capture
            .nbd_endpoints()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(","),
        fuse_mount: args
            .fuse_mount
            .as_deref()
            .map(absolute)
            .transpose()?
            .map_or_else(String::new, |path| path.display().to_string()),
        state: state.display().to_string(),
    };
    let told = output::print(global.json, &endpoints, &describe(&endpoints));
    if told.is_ok() {
        stop.await;
    }
    // The source first: what it still has on its way can then be acknowledged.
    let stopped = [capture.shutdown().await, vault.shutdown().await];
    for result in stopped {
        result?;
    }
    told
}

fn describe(endpoints: &Endpoints) -> String {
    let mut fields = vec![
        ("capture", endpoints.capture.clone()),
        ("vault", endpoints.vault.clone()),
        (
            "nbd",
            format!("{} (the export name is the volume's name)", endpoints.nbd),
        ),
    ];
    if !endpoints.fuse_mount.is_empty() {
        fields.push(("files", endpoints.fuse_mount.clone()));
    }
    fields.push(("state", endpoints.state.clone()));
    let fields = format::fields(&fields);
    format!("{fields}ready; stop with Ctrl-C\n")
}

fn vault_config(args: &UpArgs, state: &Path) -> vault_svc::Config {
    vault_svc::Config {
        listen: args.vault_listen,
        store_dir: state.join("vault/store"),
        state_dir: state.join("vault/state"),
        retain: args.retain,
        ..vault_svc::Config::default()
    }
}

fn capture_config(
    args: &UpArgs,
    state: &Path,
    vault: &str,
) -> Result<capture_svc::Config, Failure> {
    let nbd = match &args.nbd {
        None => NbdListen::Unix(state.join("nbd.sock")),
        Some(text) => text.parse().map_err(|error| {
            Failure::new(
                Kind::Usage,
                "NBD_ADDRESS_INVALID",
                format!("--nbd {text}: {error}"),
                "use unix:PATH or tcp:ADDRESS:PORT",
            )
        })?,
    };
    let fuse_mount = args.fuse_mount.as_deref().map(absolute).transpose()?;
    Ok(capture_svc::Config {
        state: state.join("capture"),
        fuse_mount: fuse_mount.unwrap_or_default(),
        listen: args.capture_listen,
        nbd: NbdListens(vec![nbd]),
        vault: vault.to_owned(),
        groups: groups(&args.group)?,
        interval_max: args.interval_max.into(),
        changed_blocks_max: args.changed_blocks_max.unwrap_or(0),
        ..capture_svc::Config::default()
    })
}

fn groups(given: &[String]) -> Result<Groups, Failure> {
    given.join(";").parse().map_err(|error: String| {
        Failure::new(
            Kind::Usage,
            "GROUP_INVALID",
            format!("--group: {error}"),
            "give each group once, as NAME=VOLUME,VOLUME",
        )
    })
}

/// The folder of all state, absolute.
fn state_dir(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => default_state_dir(
            std::env::var_os("XDG_DATA_HOME").map(PathBuf::from),
            std::env::var_os("HOME").map(PathBuf::from),
        )?,
    };
    absolute(&path)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|e| Failure::io(format_args!("make {} absolute", path.display()), &e))
}

fn default_state_dir(
    data_home: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Result<PathBuf, Failure> {
    data_home
        // The standard says that a relative one must be ignored.
        .filter(|path| path.is_absolute())
        .or_else(|| {
            home.filter(|path| path.is_absolute())
                .map(|h| h.join(".local/share"))
        })
        .map(|path| path.join("tidemark"))
        .ok_or_else(|| {
            Failure::new(
                Kind::Usage,
                "STATE_MISSING",
                "there is no home folder to keep state in",
                "name a folder with --state",
            )
        })
}

fn lock(state: &Path) -> Result<FileLock, Failure> {
    FileLock::of_dir(state).map_err(|error| match error {
        LockError::Owned { .. } => Failure::new(
            Kind::Conflict,
            "STATE_IN_USE",
            error.to_string(),
            "stop that one first, or name another folder with --state",
        ),
        error => Failure::new(Kind::Failed, "IO_FAILED", error.to_string(), ""),
    })
}

/// Why a service did not start, with what to do for the usual reasons.
fn not_started(service: &str, error: &anyhow::Error) -> Failure {
    let message = format!("the {service} service did not start: {error:#}");
    let io_kind = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    match io_kind {
        Some(io::ErrorKind::AddrInUse) => Failure::new(
            Kind::Conflict,
            "ADDRESS_IN_USE",
            message,
            format!("stop what listens there, or choose another address with --{service}-listen"),
        ),
        Some(_) => Failure::new(Kind::Failed, "IO_FAILED", message, ""),
        None => Failure::new(Kind::Failed, "NOT_STARTED", message, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_lies_where_the_desktop_standard_says() {
        let path = |text: &str| Some(PathBuf::from(text));
        for (data_home, home, expected) in [
            (path("/x"), path("/home/a"), "/x/tidemark"),
            (None, path("/home/a"), "/home/a/.local/share/tidemark"),
            (
                path("relative"),
                path("/home/a"),
                "/home/a/.local/share/tidemark",
            ),
            (path(""), path("/home/a"), "/home/a/.local/share/tidemark"),
        ] {
            assert_eq!(
                default_state_dir(data_home, home).unwrap(),
                Path::new(expected)
            );
        }
        assert_eq!(
            default_state_dir(None, None).unwrap_err().kind(),
            Kind::Usage
        );
    }

    #[test]
    fn one_state_folder_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let failure = lock(dir.path()).unwrap_err();
        assert_eq!(failure.reason(), "STATE_IN_USE");
        assert_eq!(failure.kind().exit_code(), 4);
        drop(first);
        lock(dir.path()).unwrap();
    }

    #[test]
    fn an_address_that_is_taken_names_the_flag_that_chooses_another() {
        let error = anyhow::Error::new(io::Error::from(io::ErrorKind::AddrInUse))
            .context("listen on 127.0.0.1:7402");
        let failure = not_started("vault", &error);
        assert_eq!(failure.kind(), Kind::Conflict);
        assert!(failure.to_string().contains("--vault-listen"), "{failure}");
    }
}
