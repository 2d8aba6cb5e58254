//! Which engine a volume gets.

use std::path::Path;

use tidemark_proto::{Reason, RpcError};

use crate::{
    config::{Config, EngineSetting},
    engine::EngineKind,
};

/// An engine that may fit, and why it is taken where it does.
pub(super) type Candidate = (EngineKind, &'static str);

const ASKED: &str = "it was asked for";
const FRONT_END: &str = "auto: a front end, NBD or FUSE, is configured";
const CLONES: &str = "auto: no front end is configured, and the file's filesystem clones files";
const READS: &str =
    "auto: no front end is configured, and the file can't be cloned, or not in time";

/// The engines to try, in this order.
pub(super) fn candidates(setting: EngineSetting, config: &Config) -> Vec<Candidate> {
    let front_end = !config.nbd.0.is_empty() || !config.fuse_mount.as_os_str().is_empty();
    match setting {
        EngineSetting::Intercept => vec![(EngineKind::Intercept, ASKED)],
        EngineSetting::Reflink => vec![(EngineKind::Reflink, ASKED)],
        EngineSetting::Scan => vec![(EngineKind::Scan, ASKED)],
        EngineSetting::Auto if front_end => vec![(EngineKind::Intercept, FRONT_END)],
        EngineSetting::Auto => vec![(EngineKind::Reflink, CLONES), (EngineKind::Scan, READS)],
    }
}

/// Tries one engine after the other.
///
/// # Errors
/// Why none of them fits, or the first failure that has another reason.
pub(super) fn first_that_fits<T>(
    setting: EngineSetting,
    config: &Config,
    file: &Path,
    mut attempt: impl FnMut(Candidate) -> Result<T, RpcError>,
) -> Result<T, RpcError> {
    let mut refused = Vec::new();
    for candidate in candidates(setting, config) {
        match attempt(candidate) {
            Err(error) if error.reason == Reason::EngineUnsupported => refused.push(error),
            other => return other,
        }
    }
    if refused.len() == 1 {
        return Err(refused.remove(0));
    }
    let messages: Vec<_> = refused.iter().map(|error| &*error.message).collect();
    Err(RpcError::new(
        Reason::EngineUnsupported,
        format!(
            "no engine fits {}: no front end is configured through which it could be written; {}",
            file.display(),
            messages.join("; ")
        ),
        "set nbd or fuse_mount, or put the file on XFS, btrfs or ext4 of this machine",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NbdListen, NbdListens};

    fn config(nbd: bool, fuse: bool) -> Config {
        let listen = NbdListen::Unix("/run/nbd.sock".into());
        Config {
            nbd: NbdListens(nbd.then_some(listen).into_iter().collect()),
            fuse_mount: if fuse { "/mnt/volumes" } else { "" }.into(),
            ..Config::default()
        }
    }

    #[test]
    fn auto_takes_what_a_front_end_writes_through_and_without_one_clones_before_scans() {
        for (nbd, fuse, kind) in [
            (true, false, EngineKind::Intercept),
            (false, true, EngineKind::Intercept),
            (false, false, EngineKind::Reflink),
        ] {
            let found = candidates(EngineSetting::Auto, &config(nbd, fuse));
            assert_eq!(found[0].0, kind, "{nbd} {fuse}");
            assert!(found[0].1.starts_with("auto: "));
            for (asked, kind) in [
                (EngineSetting::Intercept, EngineKind::Intercept),
                (EngineSetting::Reflink, EngineKind::Reflink),
                (EngineSetting::Scan, EngineKind::Scan),
            ] {
                assert_eq!(candidates(asked, &config(nbd, fuse)), [(kind, ASKED)]);
            }
        }
        let both = candidates(EngineSetting::Auto, &config(false, false));
        let kinds: Vec<_> = both.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [EngineKind::Reflink, EngineKind::Scan]);
    }

    #[test]
    fn where_none_fits_it_says_why_and_what_to_do() {
        let unfit = |(kind, _): Candidate| {
            let what = match kind {
                EngineKind::Scan => "it can't be scanned",
                _ => "it can't be cloned",
            };
            let action = "put it on XFS";
            Err::<(), _>(RpcError::new(Reason::EngineUnsupported, what, action))
        };
        let path = Path::new("/srv/data.img");
        let config = config(false, false);
        let told = first_that_fits(EngineSetting::Auto, &config, path, unfit).unwrap_err();
        assert_eq!(told.reason, Reason::EngineUnsupported);
        insta::assert_snapshot!(format!("{}: {}", told.message, told.action));
        let told = first_that_fits(EngineSetting::Reflink, &config, path, unfit).unwrap_err();
        assert_eq!(told.message, "it can't be cloned");
        let full = |_| Err::<(), _>(RpcError::new(Reason::StoreFull, "full", "make room"));
        let told = first_that_fits(EngineSetting::Auto, &config, path, full).unwrap_err();
        assert_eq!(told.reason, Reason::StoreFull);
    }
}
