//! `tidemark health`.

use tidemark_listen::health::check;

use crate::{
    args::{Global, HealthArgs, ServiceName},
    failure::{Failure, Kind},
    format, output,
    report::{Health, ServiceHealth},
};

pub(super) async fn run(global: &Global, args: HealthArgs) -> Result<(), Failure> {
    let asked = |service| args.services.is_empty() || args.services.contains(&service);
    let health = Health {
        capture: match asked(ServiceName::Capture) {
            true => Some(ask(global, &global.capture, &args).await),
            false => None,
        },
        vault: match asked(ServiceName::Vault) {
            true => Some(ask(global, &global.vault, &args).await),
            false => None,
        },
    };
    output::print(global.json, &health, &describe(&health))?;
    let problems: Vec<_> = each(&health)
        .filter(|(_, service)| !service.serving)
        .map(|(name, service)| format!("{name} service at {}: {}", service.url, service.problem))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Unavailable,
        "NOT_SERVING",
        problems.join("; "),
        "start it, wait until it is up, or say where it is with --capture and --vault",
    ))
}

async fn ask(global: &Global, url: &str, args: &HealthArgs) -> ServiceHealth {
    let problem = match check(&global.dialer(), url, args.timeout).await {
        Ok(()) => String::new(),
        Err(unhealthy) => unhealthy.to_string(),
    };
    ServiceHealth {
        url: url.to_owned(),
        serving: problem.is_empty(),
        problem,
    }
}

fn each(health: &Health) -> impl Iterator<Item = (&'static str, &ServiceHealth)> {
    let capture = health.capture.iter().map(|service| ("capture", service));
    capture.chain(health.vault.iter().map(|service| ("vault", service)))
}

fn describe(health: &Health) -> String {
    let fields: Vec<_> = each(health)
        .map(|(name, service)| {
            let told = match service.serving {
                true => format!("serves at {}", service.url),
                false => format!("does not serve at {}", service.url),
            };
            (name, told)
        })
        .collect();
    format::fields(&fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_health_of_a_service_is_printed_for_people_and_for_programs() {
        let health = Health {
            capture: Some(ServiceHealth {
                url: "http://127.0.0.1:7401".into(),
                serving: true,
                problem: String::new(),
            }),
            vault: Some(ServiceHealth {
                url: "http://vault:7402".into(),
                serving: false,
                problem: "it can't be reached: connection refused".into(),
            }),
        };
        insta::assert_snapshot!(describe(&health), @r"
        capture:  serves at http://127.0.0.1:7401
        vault:    does not serve at http://vault:7402
        ");
        assert_eq!(
            serde_json::to_string(&health.vault).unwrap(),
            r#"{"url":"http://vault:7402","serving":false,"problem":"it can't be reached: connection refused"}"#
        );
        let only_capture = Health {
            vault: None,
            ..health
        };
        let printed = serde_json::to_string(&only_capture).unwrap();
        assert!(!printed.contains("vault"), "{printed}");
    }
}
