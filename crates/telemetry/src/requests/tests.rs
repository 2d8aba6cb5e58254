use std::convert::Infallible;

use tidemark_proto::Reason;
use tonic::metadata::MetadataMap;

use super::*;
use crate::traces::tests::{Traces, attribute};

const SHIP: &str = "/tidemark.vault.v1.Ingest/Ship";
const STATUS: &str = "/tidemark.vault.v1.Vault/GetStatus";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// Calls a service that answers with the id that it has seen, and ends with `end`.
async fn called(
    path: &str,
    headers: &[(&'static str, &[u8])],
    end: Result<(), RpcError>,
) -> Response<Body> {
    let inner = tower::service_fn(move |request: Request<Body>| {
        let end = end.clone();
        async move {
            about_volume("data");
            let mut answer = match end {
                Ok(()) => Response::new(Body::empty()),
                Err(error) => Status::from(error).into_http(),
            };
            let seen = request.headers().get(&REQUEST_ID).unwrap().clone();
            answer.headers_mut().insert("seen", seen);
            Ok::<_, Infallible>(answer)
        }
    });
    let mut service = RequestLayer.layer(CallLayer.layer(inner));
    let mut request = Request::post(path).body(Body::empty()).unwrap();
    for (name, value) in headers {
        let value = HeaderValue::from_bytes(value).unwrap();
        request.headers_mut().append(*name, value);
    }
    service.call(request).await.unwrap()
}

fn told(answer: &Response<Body>, header: &str) -> String {
    answer.headers()[header].to_str().unwrap().to_owned()
}

#[tokio::test]
async fn each_call_has_an_id_its_clients_own_where_that_can_be_logged_as_it_is() {
    let own = called(SHIP, &[("x-request-id", b"job-7_a.1")], Ok(())).await;
    assert_eq!(told(&own, "seen"), "job-7_a.1");
    assert_eq!(told(&own, "x-request-id"), "job-7_a.1");
    let long = [b'x'; REQUEST_ID_LEN_MAX + 1];
    let hostile: [&[u8]; 6] = [
        b"",
        b"a b",
        b"\xff\xfe",
        b"a\tb",
        "\u{fc}".as_bytes(),
        &long,
    ];
    for id in hostile {
        let answer = called(SHIP, &[("x-request-id", id)], Ok(())).await;
        let given = told(&answer, "x-request-id");
        assert!(uuid::Uuid::parse_str(&given).is_ok(), "{given}");
        assert_eq!(told(&answer, "seen"), given);
    }
    let twice = called(
        SHIP,
        &[("x-request-id", b"a"), ("x-request-id", b"b")],
        Ok(()),
    )
    .await;
    assert!(uuid::Uuid::parse_str(&told(&twice, "x-request-id")).is_ok());
    let one = called(SHIP, &[], Ok(())).await;
    let other = called(SHIP, &[], Ok(())).await;
    assert_ne!(told(&one, "x-request-id"), told(&other, "x-request-id"));
}

#[tokio::test]
async fn a_call_is_a_span_of_its_clients_trace_with_what_is_known_of_it() {
    let traces = Traces::start();
    let headers: [(&str, &[u8]); 2] = [("traceparent", PARENT.as_bytes()), ("x-request-id", b"a1")];
    drop(called(SHIP, &headers, Ok(())).await);
    let failed = RpcError::new(Reason::StoreFull, "the store is full", "make room");
    drop(called(SHIP, &[], Err(failed)).await);
    let [good, bad] = &traces.ended()[..] else {
        panic!("two spans")
    };
    assert_eq!(good.name, "tidemark.vault.v1.Ingest/Ship");
    assert_eq!(good.span_kind, opentelemetry::trace::SpanKind::Server);
    let trace = good.span_context.trace_id().to_string();
    assert_eq!(trace, "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(good.parent_span_id.to_string(), "b7ad6b7169203331");
    for (key, value) in [
        ("rpc.system", "grpc"),
        ("rpc.service", "tidemark.vault.v1.Ingest"),
        ("rpc.method", "Ship"),
        ("volume", "data"),
        ("request_id", "a1"),
    ] {
        assert_eq!(attribute(good, key).as_deref(), Some(value), "{key}");
    }
    assert_ne!(bad.span_context.trace_id(), good.span_context.trace_id());
    let full = opentelemetry::trace::Status::error("the store is full");
    assert_eq!(bad.status, full);
    assert_eq!(attribute(bad, "error.type").as_deref(), Some("STORE_FULL"));
    assert_eq!(attribute(bad, "rpc.grpc.status_code").as_deref(), Some("8"));
}

#[tokio::test]
async fn what_comes_often_is_a_span_only_where_a_trace_asks_for_it() {
    let traces = Traces::start();
    for (path, parent, spans) in [
        (STATUS, None, 0),
        (STATUS, Some(UNSAMPLED), 0),
        (STATUS, Some("garbage"), 0),
        (STATUS, Some(PARENT), 1),
        (SHIP, None, 1),
        (SHIP, Some("garbage"), 1),
        (SHIP, Some(UNSAMPLED), 0),
        ("/grpc.health.v1.Health/Check", Some(PARENT), 0),
        ("/tidemark.capture.v1.Coherence/Attach", Some(PARENT), 0),
        ("/nobody.knows/This", Some(PARENT), 0),
    ] {
        let header = parent.map(|parent| ("traceparent", parent.as_bytes()));
        drop(called(path, header.as_slice(), Ok(())).await);
        assert_eq!(traces.take().len(), spans, "{path} {parent:?}");
    }
}

#[test]
fn a_status_in_trailers_ends_the_span_of_a_stream() {
    let traces = Traces::start();
    let span = crate::traced!("call");
    let error = RpcError::new(Reason::Fenced, "another writer", "");
    let mut trailers = MetadataMap::new().into_headers();
    Status::from(error).add_header(&mut trailers).unwrap();
    note_status(&span, &trailers);
    drop(span);
    let reason = attribute(&traces.take()[0], "error.type");
    assert_eq!(reason.as_deref(), Some("FENCED"));
}
