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

/// The engines to try, in this order.
pub(super) fn candidates(setting: EngineSetting, config: &Config) -> Vec<Candidate> {
    let front_end = !config.nbd.0.is_empty() || !config.fuse_mount.as_os_str().is_empty();
    match setting {
        EngineSetting::Intercept => vec![(EngineKind::Intercept, ASKED)],
        EngineSetting::Reflink => vec![(EngineKind::Reflink, ASKED)],
        EngineSetting::Auto if front_end => vec![(EngineKind::Intercept, FRONT_END)],
        EngineSetting::Auto => vec![(EngineKind::Reflink, CLONES)],
    }
}

/// Tries one engine after the other.
///
/// # Errors
/// Why the last one doesn't fit, or the first failure that has another reason.
pub(super) fn first_that_fits<T>(
    setting: EngineSetting,
    config: &Config,
    file: &Path,
    mut attempt: impl FnMut(Candidate) -> Result<T, RpcError>,
) -> Result<T, RpcError> {
    let mut refused = None;
    for candidate in candidates(setting, config) {
        match attempt(candidate) {
            Err(error) if error.reason == Reason::EngineUnsupported => refused = Some(error),
            other => return other,
        }
    }
    let refused = refused.unwrap_or_else(|| RpcError::internal("there is no engine to try"));
    if setting != EngineSetting::Auto {
        return Err(refused);
    }
    Err(RpcError::new(
        Reason::EngineUnsupported,
        format!(
            "no engine fits {}: no front end is configured through which it could be written, and {}",
            file.display(),
            refused.message
        ),
        format!("set nbd or fuse_mount, or {}", refused.action),
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
    fn auto_takes_what_a_front_end_writes_through_and_clones_without_one() {
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
            ] {
                assert_eq!(candidates(asked, &config(nbd, fuse)), [(kind, ASKED)]);
            }
        }
    }

    #[test]
    fn where_none_fits_it_says_why_and_what_to_do() {
        let unfit = |_| {
            Err::<(), _>(RpcError::new(
                Reason::EngineUnsupported,
                "it can't be cloned",
                "put it on XFS",
            ))
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
