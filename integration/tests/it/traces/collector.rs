//! A collector: takes traces and metrics over OTLP, and keeps them for the test.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{Span, status::StatusCode},
};
use tidemark_listen::{GREETING_MAX, Incoming};
use tidemark_tls::{Gate, GateFiles};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{Request, Response, Status, transport::Server};

use crate::{programs::wait_for, security::site::Pair};

/// A span that was received.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) resource: BTreeMap<String, String>,
    pub(super) name: String,
    pub(super) trace: String,
    pub(super) id: String,
    /// Empty for the first of a trace.
    pub(super) parent: String,
    pub(super) links: Vec<String>,
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) failed: bool,
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(is)) => is.to_string(),
        other => format!("{other:?}"),
    }
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let texts = attributes.into_iter();
    texts.map(|a| (a.key, text(a.value))).collect()
}

impl Seen {
    fn new(resource: BTreeMap<String, String>, span: Span) -> Self {
        Self {
            resource,
            name: span.name,
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            links: span.links.iter().map(|link| hex(&link.trace_id)).collect(),
            attributes: texts(span.attributes),
            failed: span
                .status
                .is_some_and(|status| status.code() == StatusCode::Error),
            start_ns: span.start_time_unix_nano,
            end_ns: span.end_time_unix_nano,
        }
    }

    pub(super) fn service(&self) -> &str {
        &self.resource["service.name"]
    }

    /// What is said of it under this key; empty where nothing is.
    pub(super) fn says(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

#[derive(Debug, Clone, Default)]
struct Sink {
    spans: Arc<Mutex<Vec<Seen>>>,
    /// Who the last ones said that they were.
    authorization: Arc<Mutex<Option<String>>>,
    /// The names of metrics, with their units.
    metrics: Arc<Mutex<BTreeMap<String, String>>>,
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let shown = request.metadata().get("authorization");
        *self.authorization.lock().unwrap() = shown.map(|it| it.to_str().unwrap().to_owned());
        let mut seen = self.spans.lock().unwrap();
        for of_process in request.into_inner().resource_spans {
            let resource = of_process
                .resource
                .map(|resource| texts(resource.attributes));
            let resource = resource.unwrap_or_default();
            let scopes = of_process.scope_spans.into_iter();
            for span in scopes.flat_map(|scope| scope.spans) {
                seen.push(Seen::new(resource.clone(), span));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let of_processes = request.into_inner().resource_metrics.into_iter();
        let scopes = of_processes.flat_map(|of_process| of_process.scope_metrics);
        let metrics = scopes.flat_map(|scope| scope.metrics);
        let named = metrics.map(|metric| (metric.name, metric.unit));
        self.metrics.lock().unwrap().extend(named);
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A collector that runs until it is dropped.
pub(super) struct Collector {
    pub(super) addr: SocketAddr,
    seen: Sink,
    _runtime: Runtime,
}

impl Collector {
    pub(super) fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap())
    }

    pub(super) fn start_at(addr: SocketAddr) -> Self {
        Self::serving(addr, None)
    }

    /// With a certificate and its key.
    pub(super) fn start_with_tls(certificate: Pair) -> Self {
        Self::serving("127.0.0.1:0".parse().unwrap(), Some(certificate))
    }

    fn serving(addr: SocketAddr, certificate: Option<Pair>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let seen = Sink::default();
        let listener = runtime.block_on(TcpListener::bind(addr)).unwrap();
        let addr = listener.local_addr().unwrap();
        let files = GateFiles {
            certificate,
            ..GateFiles::default()
        };
        let gate = Gate::open(files).unwrap();
        let incoming = Incoming::new(listener, 16, GREETING_MAX, gate);
        let server = Server::builder()
            .add_service(TraceServiceServer::new(seen.clone()))
            .add_service(MetricsServiceServer::new(seen.clone()));
        runtime.spawn(server.serve_with_incoming(incoming));
        Self {
            addr,
            seen,
            _runtime: runtime,
        }
    }

    pub(super) fn authorization(&self) -> Option<String> {
        self.seen.authorization.lock().unwrap().clone()
    }

    /// The unit of a metric, as soon as it has come.
    pub(super) fn unit(&self, metric: &str) -> String {
        wait_for(metric, || {
            self.seen.metrics.lock().unwrap().get(metric).cloned()
        })
    }

    /// The flag of both services that leads here.
    pub(super) fn flag(&self) -> String {
        format!("--otlp-endpoint=http://{}", self.addr)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.spans.lock().unwrap().clone()
    }

    /// The first span for which this holds, as soon as it has come.
    pub(super) fn span(&self, what: &str, is_it: impl Fn(&Seen) -> bool) -> Seen {
        wait_for(what, || self.seen().into_iter().find(&is_it))
    }

    /// All spans of a trace, once those of both services have come that end last.
    pub(super) fn trace(&self, interval: &Seen) -> Vec<Seen> {
        let of_trace = |seen: &Seen| seen.trace == interval.trace;
        self.span("the vault's part of the trace", |seen| {
            of_trace(seen) && seen.name.ends_with("Ingest/Ship") && !seen.failed
        });
        let mut spans = self.seen();
        spans.retain(of_trace);
        spans
    }

    /// That interval's span from which this generation has come.
    pub(super) fn interval(&self, volume: &str, generation: u64) -> Seen {
        let generation = generation.to_string();
        self.span("the interval's span", |seen| {
            seen.name == "interval"
                && seen.says("volume") == volume
                && seen.says("generation") == generation
        })
    }
}
