//! Each role and each call: what it may, it can, and nothing else.

use bytes::Bytes;
use tidemark_identity::{
    Role,
    rules::{RULES, Rule, Who},
};
use tidemark_proto::{Reason, RpcError};
use tidemark_tls::Dialer;

use super::site::{Site, call, dial, url_of};

const EVERYBODY: &[(&str, &[Role], &[&str])] = &[
    ("a-source", &[Role::Source], &["*"]),
    ("a-restorer", &[Role::Restorer], &["*"]),
    ("an-operator", &[Role::Operator], &["*"]),
    ("a-viewer", &[Role::Viewer], &["*"]),
];

/// Whether a call was let through: whatever became of it then, as its message is empty.
fn was_let_in(answer: &Result<Option<Bytes>, RpcError>) -> bool {
    match answer {
        Ok(_) => true,
        Err(error) => !matches!(
            error.reason,
            Reason::PermissionDenied | Reason::Unauthenticated
        ),
    }
}

fn rules_of(package: &str) -> impl Iterator<Item = &'static Rule> {
    let of_package = format!("/{package}.");
    RULES
        .iter()
        .filter(move |rule| rule.path.starts_with(&of_package))
}

async fn each_call_is_for_its_roles(url: &str, package: &str, dialer_of: impl Fn(&str) -> Dialer) {
    for (name, roles, _) in EVERYBODY {
        let line = dial(&dialer_of(name), url).await.unwrap();
        for rule in rules_of(package) {
            let Who::Having(takes) = rule.who else {
                panic!("{rule:?} takes no role");
            };
            let answer = call(&line, rule.path, Bytes::new()).await;
            let may = takes.has(roles[0]);
            assert_eq!(was_let_in(&answer), may, "{name} {}: {answer:?}", rule.path);
            if let (false, Err(error)) = (may, answer) {
                assert_eq!(error.reason, Reason::PermissionDenied);
                assert!(error.message.contains(name), "{}", error.message);
                assert!(
                    error.action.contains(&takes.to_string()),
                    "{}",
                    error.action
                );
            }
        }
    }
}

async fn nobody_is_let_in(url: &str, package: &str, dialer: Dialer) {
    let line = dial(&dialer, url).await.unwrap();
    for rule in rules_of(package) {
        let error = call(&line, rule.path, Bytes::new()).await.unwrap_err();
        assert_eq!(error.reason, Reason::Unauthenticated, "{}", rule.path);
        assert!(!error.action.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_call_of_the_vault_is_for_its_roles_and_nobody_else() {
    let site = Site::new();
    site.knows_tokens_of(EVERYBODY);
    for (name, _, _) in EVERYBODY {
        site.certificate(name, &[]);
    }
    let vault = site.vault().await;
    let (url, package) = (url_of(&vault), "tidemark.vault.v1");
    each_call_is_for_its_roles(&url, package, |name| site.dialer(name)).await;
    each_call_is_for_its_roles(&url, package, |name| site.dialer_with_token(name)).await;
    nobody_is_let_in(&url, package, site.dialer_with(None)).await;
    nobody_is_let_in(&url, package, site.dialer_with_token("a-stranger")).await;
    let stranger = site.certificate("a-stranger", &[]);
    nobody_is_let_in(&url, package, site.dialer_with(Some(stranger))).await;
    vault.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_call_of_the_capture_service_is_for_its_roles_and_nobody_else() {
    let site = Site::new();
    site.knows(EVERYBODY);
    for (name, _, _) in EVERYBODY {
        site.certificate(name, &[]);
    }
    let config = site.capture_config("https://127.0.0.1:1", "a-source");
    let config = capture_svc::Config {
        vault_ca: site.ca(),
        ..config
    };
    let capture = capture_svc::start(config).await.unwrap();
    let url = format!("https://{}", capture.control_addr());
    let package = "tidemark.capture.v1";
    each_call_is_for_its_roles(&url, package, |name| site.dialer(name)).await;
    nobody_is_let_in(&url, package, site.dialer_with(None)).await;
    capture.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_for_everybody_and_reflection_for_whoever_is_known() {
    let site = Site::new();
    site.knows(EVERYBODY);
    site.certificate("a-viewer", &[]);
    let vault = site.vault().await;
    let url = url_of(&vault);
    let (health, reflection) = (
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    );
    let nobody = dial(&site.dialer_with(None), &url).await.unwrap();
    call(&nobody, health, Bytes::new()).await.unwrap();
    let error = call(&nobody, reflection, Bytes::new()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unauthenticated);
    let viewer = dial(&site.dialer("a-viewer"), &url).await.unwrap();
    assert!(was_let_in(&call(&viewer, reflection, Bytes::new()).await));
    // What has no rule isn't there, whoever asks.
    let made_up = "/tidemark.vault.v1.Vault/Forget";
    let error = call(&viewer, made_up, Bytes::new()).await.unwrap_err();
    assert!(
        error.message.contains("there is no call"),
        "{}",
        error.message
    );
    vault.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_plain_text_on_this_machine_tokens_hold_where_there_are_identities() {
    let site = Site::new();
    site.knows_tokens_of(EVERYBODY);
    let config = vault_svc::Config {
        tls_cert: "".into(),
        tls_key: "".into(),
        tls_ca: "".into(),
        ..site.vault_config()
    };
    let vault = vault_svc::start(config).await.unwrap();
    let url = format!("http://{}", vault.listen_addr);
    let package = "tidemark.vault.v1";
    each_call_is_for_its_roles(&url, package, |name| site.dialer_with_token(name)).await;
    nobody_is_let_in(&url, package, Dialer::default()).await;
    vault.shutdown().await.unwrap();
}
