//! What all spans of a process have in common: which service, which version, which run of it, on which host.

use std::sync::LazyLock;

use opentelemetry::KeyValue;
use opentelemetry_sdk::{
    Resource,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
};

/// Of this run: the same for all that it exports.
static INSTANCE: LazyLock<String> = LazyLock::new(|| uuid::Uuid::new_v4().to_string());

/// Of `service`, as far as `OTEL_RESOURCE_ATTRIBUTES` says nothing else; `OTEL_SERVICE_NAME` has the last word on its name.
pub(crate) fn of(service: &'static str) -> Resource {
    let uname = rustix::system::uname();
    let named = std::env::var("OTEL_SERVICE_NAME").ok();
    let named = named.filter(|name| !name.is_empty());
    Resource::builder_empty()
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_attributes([
            KeyValue::new("service.name", service),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", INSTANCE.as_str()),
            KeyValue::new("host.name", uname.nodename().to_string_lossy().into_owned()),
        ])
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_attributes(named.map(|name| KeyValue::new("service.name", name)))
        .build()
}
