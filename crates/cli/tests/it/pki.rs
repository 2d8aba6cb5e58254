//! The CA of a small site: what it writes, and what it refuses to write.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Output};

use serde_json::Value;
use tidemark_identity::{Identities, Role, token::TokenHash};

use crate::{names, stderr, stdout, tidemark};

fn pki(dir: &Path, args: &[&str]) -> Output {
    tidemark()
        .arg("pki")
        .args(args)
        .arg("--json")
        .current_dir(dir)
        .output()
        .unwrap()
}

fn done(dir: &Path, args: &[&str]) -> Value {
    let output = pki(dir, args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    serde_json::from_str(&stdout(&output)).unwrap()
}

/// Fails with this exit code and reason, and changes nothing.
fn refused(dir: &Path, args: &[&str], code: i32, reason: &str) {
    let before = contents(dir);
    refused_in(dir, args, code, reason);
    assert_eq!(contents(dir), before, "{args:?}");
}

fn refused_in(dir: &Path, args: &[&str], code: i32, reason: &str) {
    let output = pki(dir, args);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{args:?}: {}",
        stderr(&output)
    );
    let told: Value = serde_json::from_str(&stderr(&output)).unwrap();
    assert_eq!(told["error"]["reason"], reason, "{told}");
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| {
        let bytes = fs::read(dir.join(&name)).unwrap();
        (name, bytes)
    };
    let is_file = |name: &String| dir.join(name).is_file();
    names(dir).into_iter().filter(is_file).map(read).collect()
}

fn identities(dir: &Path) -> Identities {
    Identities::parse(&fs::read_to_string(dir.join("identities.toml")).unwrap()).unwrap()
}

#[test]
fn a_ca_gives_certificates_and_says_who_may_do_what() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let ca = done(at, &["init", "."]);
    assert_eq!(ca["key"], "./ca.key");
    done(
        at,
        &[
            "issue",
            "vault",
            "--host",
            "vault.example.com",
            "--host",
            "10.0.0.5",
        ],
    );
    // A service that is nobody's client is in no file.
    assert_eq!(names(at), ["ca.crt", "ca.key", "vault.crt", "vault.key"]);
    let edge = done(
        at,
        &["issue", "edge-7", "--role", "source", "--volume", "*"],
    );
    assert_eq!(edge["roles"], serde_json::json!(["source"]));
    assert_eq!(edge["identities"], "./identities.toml");
    assert!(
        edge["valid_until"]
            .as_str()
            .unwrap()
            .ends_with("T00:00:00.000Z")
    );
    assert!(
        identities(at)
            .named("edge-7")
            .unwrap()
            .roles()
            .has(Role::Source)
    );
    for (name, mode) in [
        ("ca.key", 0o600),
        ("vault.key", 0o600),
        ("edge-7.key", 0o600),
        ("ca.crt", 0o644),
        ("edge-7.crt", 0o644),
    ] {
        let found = fs::metadata(at.join(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}");
    }
}

#[test]
fn nothing_is_overwritten_and_a_renewed_certificate_has_the_same_key() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let issue = ["issue", "edge-7", "--role", "source", "--volume", "*"];
    refused(at, &issue, 3, "PKI_NOT_FOUND");
    done(at, &["init", "."]);
    refused(at, &["init", "."], 4, "OUTPUT_EXISTS");
    refused(
        at,
        &[
            "issue", "edge-7", "--role", "source", "--volume", "*", "--renew",
        ],
        3,
        "PKI_NOT_FOUND",
    );
    done(at, &issue);
    refused(at, &issue, 4, "OUTPUT_EXISTS");
    let before = contents(at);
    done(
        at,
        &["issue", "edge-7", "--host", "edge-7.example.com", "--renew"],
    );
    let changed: Vec<_> = before
        .iter()
        .zip(&contents(at))
        .filter(|(before, after)| before != after)
        .map(|(before, _)| before.0.clone())
        .collect();
    assert_eq!(changed, ["edge-7.crt"]);
}

#[test]
fn what_may_be_run_at_each_start_keeps_what_is_there_and_ends_what_was_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let init = ["init", ".", "--if-missing"];
    let vault = ["issue", "vault", "--host", "vault", "--if-missing"];
    let vault = [&vault[..], &["--copy-to", "to/vault"]].concat();
    let edge = ["issue", "edge-7", "--role", "source", "--volume", "*"];
    let edge = [&edge[..], &["--if-missing", "--copy-to", "to/edge-7"]].concat();
    let all = [&init[..], &edge, &vault];
    let whole = || {
        let folders = [at.to_owned(), at.join("to/vault"), at.join("to/edge-7")];
        folders
            .iter()
            .flat_map(|of| contents(of))
            .collect::<Vec<_>>()
    };
    for args in all {
        assert!(!done(at, args)["valid_until"].is_null(), "{args:?}");
    }
    // A service has the identities too; the CA's key has nobody.
    let own = ["ca.crt", "edge-7.crt", "edge-7.key"];
    assert_eq!(names(&at.join("to/edge-7")), own);
    let service = ["ca.crt", "identities.toml", "vault.crt", "vault.key"];
    assert_eq!(names(&at.join("to/vault")), service);
    let key = fs::metadata(at.join("to/vault/vault.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    let before = whole();
    for args in all {
        assert!(done(at, args)["valid_until"].is_null(), "{args:?}");
    }
    assert_eq!(whole(), before);

    // Keys are written first: certificates of them follow, and copies that are lost are made again.
    let keys = |of: &[(String, Vec<u8>)]| {
        let keys = of.iter().filter(|(name, _)| name.ends_with(".key"));
        keys.cloned().collect::<Vec<_>>()
    };
    for name in ["ca.crt", "edge-7.crt", "to/vault/vault.key"] {
        fs::remove_file(at.join(name)).unwrap();
    }
    for args in all {
        done(at, args);
    }
    assert_eq!(keys(&whole()), keys(&before));
    fs::remove_file(at.join("edge-7.key")).unwrap();
    refused_in(at, &edge, 3, "PKI_NOT_FOUND");
    fs::remove_file(at.join("ca.key")).unwrap();
    refused_in(at, &init, 4, "OUTPUT_EXISTS");
    let both = pki(at, &[&vault[..], &["--renew"]].concat());
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_token_is_written_once_and_only_its_hash_is_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let grant = ["--role", "viewer", "--volume", "edge-*/data"];
    let token = [&["token", "dashboard"][..], &grant].concat();
    done(at, &token);
    refused(at, &token, 4, "OUTPUT_EXISTS");
    let text = fs::read_to_string(at.join("dashboard.token")).unwrap();
    assert_eq!(text.trim().len(), 64);
    let known = identities(at);
    assert_eq!(known.with_token(text.trim()).unwrap().name, "dashboard");
    assert!(!known.to_toml().contains(text.trim()));
    // A certificate beside it leaves the token as it is.
    done(at, &["init", "."]);
    done(
        at,
        &["issue", "dashboard", "--role", "restorer", "--volume", "*"],
    );
    let known = identities(at);
    let dashboard = known.named("dashboard").unwrap();
    assert_eq!(dashboard.token_sha256, Some(TokenHash::of(text.trim())));
    assert!(dashboard.roles().has(Role::Restorer) && !dashboard.roles().has(Role::Viewer));
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    done(at, &["init", "."]);
    refused(at, &["issue", "edge-7"], 2, "ROLE_MISSING");
    refused(at, &["token", "edge-7"], 2, "ROLE_MISSING");
    refused(
        at,
        &["issue", "edge-7", "--role", "source"],
        2,
        "VOLUMES_MISSING",
    );
    refused(
        at,
        &["token", "a/b", "--role", "viewer", "--volume", "*"],
        2,
        "NAME_INVALID",
    );
    refused(
        at,
        &["issue", "ca", "--host", "x", "--renew"],
        2,
        "NAME_INVALID",
    );
    let good = ["--role", "viewer", "--volume", "*"];
    refused(
        at,
        &[&["issue", "../x"][..], &good].concat(),
        2,
        "CERTIFICATE_INVALID",
    );
    refused(
        at,
        &[&["issue", "Edge"][..], &good].concat(),
        2,
        "CERTIFICATE_INVALID",
    );
    refused(
        at,
        &[&["issue", "edge-7", "--host", "a b"][..], &good].concat(),
        2,
        "CERTIFICATE_INVALID",
    );
    fs::write(at.join("identities.toml"), "[[identity]]\n").unwrap();
    refused(
        at,
        &[&["token", "edge-7"][..], &good].concat(),
        4,
        "IDENTITIES_INVALID",
    );
    refused(
        at,
        &[&["issue", "edge-7"][..], &good].concat(),
        4,
        "IDENTITIES_INVALID",
    );
    for args in [
        &["issue", "a", "--role", "root"][..],
        &["issue", "a", "--volume", "/"],
    ] {
        assert_eq!(pki(at, args).status.code(), Some(2), "{args:?}");
    }
}
