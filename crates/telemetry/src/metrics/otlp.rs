//! A reading on its way to the collector, by OTLP over gRPC.
//!
//! Pushes are tasks of the service with a bound on their time: a collector that is slow, silent or gone holds up nobody.
//! The log says once when that begins, and once when it ends.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use opentelemetry_proto::{
    tonic::{
        collector::metrics::v1::{
            ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient,
        },
        common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
        metrics::v1::{
            AggregationTemporality, Exemplar as PbExemplar, Gauge, Histogram, HistogramDataPoint,
            Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, exemplar, metric::Data,
            number_data_point::Value as PbNumber,
        },
        resource::v1::Resource,
    },
    transform::common::tonic::ResourceAttributesWithSchema,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::{Request, Status, metadata::MetadataMap, transport::Channel};

use super::{Family, HistogramCounts, Kind, Number, Point, Read, Reading, Unit, Value};
use crate::{
    Settings,
    traces::{Headers, resource, standard_headers},
};

/// How often a reading is sent.
const PERIOD: Duration = Duration::from_secs(15);
/// Series of one message: with their names about a megabyte.
const SERIES_PER_MESSAGE_MAX: usize = 4096;
/// How long a push may take, all of its messages together.
const PUSH_MAX: Duration = Duration::from_secs(5);
/// How long the last one may take, when the service stops.
const LAST_PUSH_MAX: Duration = Duration::from_secs(1);

/// Sends readings to the collector that traces go to.
#[derive(Debug)]
pub(super) struct Push {
    channel: Channel,
    /// What is shown to it, as standard variables have it; `headers` win.
    standard: MetadataMap,
    headers: Headers,
    /// What all metrics of this process have in common.
    resource: Resource,
    /// Of the collector, for the log.
    endpoint: String,
    period: Duration,
    /// [`LAST_PUSH_MAX`], save in tests.
    last_push_max: Duration,
}

impl Push {
    /// To the collector of these settings; none where there is none. It connects when there is something to send; to be
    /// called within a runtime.
    ///
    /// # Errors
    /// A file that the settings name can't be used.
    pub(super) fn to(settings: &Settings<'_>) -> Result<Option<Self>> {
        let Some(collector) = &settings.traces.collector else {
            return Ok(None);
        };
        let (channel, headers) = collector.dial()?;
        let resource = resource::of(settings.service);
        Ok(Some(Self {
            channel,
            standard: standard_headers(),
            headers,
            resource: Resource {
                attributes: ResourceAttributesWithSchema::from(&resource).attributes.0,
                ..Resource::default()
            },
            endpoint: collector.endpoint.clone(),
            period: PERIOD,
            last_push_max: LAST_PUSH_MAX,
        }))
    }

    /// Sends a reading in each period until told to stop, and then once more.
    pub(super) async fn run(self, read: Read, mut stop: watch::Receiver<bool>) {
        let started = SystemTime::now();
        let mut fails = false;
        loop {
            let stops = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => true,
                () = sleep(self.period) => false,
            };
            let push = self.push(&read, started);
            let pushed = if stops {
                timeout(self.last_push_max, push).await
            } else {
                tokio::select! {
                    // What this one would have told, the last one does.
                    _ = stop.wait_for(|stop| *stop) => continue,
                    pushed = timeout(PUSH_MAX, push) => pushed,
                }
            };
            let pushed = pushed.unwrap_or_else(|_| Err(Status::deadline_exceeded("too slow")));
            let (failed, endpoint) = (pushed.is_err(), &self.endpoint);
            match pushed {
                Err(error) if !fails => {
                    tracing::warn!(%endpoint, %error, "metrics can't be pushed; nothing else waits for that");
                }
                Ok(()) if fails => tracing::info!(%endpoint, "metrics are pushed again"),
                _ => {}
            }
            fails = failed;
            if stops {
                return;
            }
        }
    }

    async fn push(&self, read: &Read, started: SystemTime) -> Result<(), Status> {
        let (read, resource) = (Arc::clone(read), self.resource.clone());
        let messages = tokio::task::spawn_blocking(move || {
            messages(&read(), &resource, started, SystemTime::now())
        });
        let messages = messages
            .await
            .map_err(|_| Status::internal("the metrics can't be read"))?;
        self.headers.renew().await;
        let mut client = MetricsServiceClient::new(self.channel.clone());
        for message in messages {
            let mut request = Request::new(message);
            *request.metadata_mut() = self.standard.clone();
            self.headers.put(request.metadata_mut());
            client.export(request).await?;
        }
        Ok(())
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A reading as messages of bounded length.
fn messages(
    reading: &Reading,
    resource: &Resource,
    started: SystemTime,
    now: SystemTime,
) -> Vec<ExportMetricsServiceRequest> {
    let times = (nanos(started), nanos(now));
    let mut messages = Vec::new();
    let (mut metrics, mut series) = (Vec::new(), 0);
    for (family, points) in reading.families() {
        for points in points.chunks(SERIES_PER_MESSAGE_MAX) {
            if series + points.len() > SERIES_PER_MESSAGE_MAX {
                messages.push(message(resource, std::mem::take(&mut metrics)));
                series = 0;
            }
            series += points.len();
            metrics.push(metric(family, points, times));
        }
    }
    if !metrics.is_empty() {
        messages.push(message(resource, metrics));
    }
    messages
}

fn message(resource: &Resource, metrics: Vec<Metric>) -> ExportMetricsServiceRequest {
    let scope = InstrumentationScope {
        name: "tidemark".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource.clone()),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(scope),
                metrics,
                ..ScopeMetrics::default()
            }],
            ..ResourceMetrics::default()
        }],
    }
}

/// Named as at the Prometheus endpoint, save for `_total`, which a collector adds for Prometheus.
fn metric(family: &Family, points: &[Point], times: (u64, u64)) -> Metric {
    let numbers = || {
        points
            .iter()
            .filter_map(|point| number(family, point, times))
    };
    let cumulative = AggregationTemporality::Cumulative.into();
    let data = match family.kind {
        Kind::Gauge => Data::Gauge(Gauge {
            data_points: numbers().collect(),
        }),
        Kind::Counter => Data::Sum(Sum {
            data_points: numbers().collect(),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: points
                .iter()
                .filter_map(|point| histogram(family, point, times))
                .collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name.trim_end_matches("_total").to_owned(),
        description: family.help.trim().to_owned(),
        unit: match family.unit {
            // Not "1": for Prometheus a gauge would be a ratio then, and be named so.
            Unit::None => "",
            Unit::Seconds => "s",
            Unit::Bytes => "By",
        }
        .to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn attributes(family: &Family, point: &Point) -> Vec<KeyValue> {
    let pairs = family.labels.iter().zip(&point.labels);
    let pairs = pairs.map(|(name, value)| KeyValue {
        key: (*name).to_owned(),
        value: Some(AnyValue {
            value: Some(any_value::Value::StringValue(value.clone())),
        }),
        ..KeyValue::default()
    });
    pairs.collect()
}

fn number(family: &Family, point: &Point, (started, now): (u64, u64)) -> Option<NumberDataPoint> {
    let Value::Number(number) = &point.value else {
        return None;
    };
    Some(NumberDataPoint {
        attributes: attributes(family, point),
        start_time_unix_nano: started,
        time_unix_nano: now,
        value: Some(match *number {
            Number::Count(count) => PbNumber::AsInt(i64::try_from(count).unwrap_or(i64::MAX)),
            Number::Measure(measure) => PbNumber::AsDouble(measure),
        }),
        ..NumberDataPoint::default()
    })
}

fn histogram(
    family: &Family,
    point: &Point,
    (started, now): (u64, u64),
) -> Option<HistogramDataPoint> {
    let Value::Histogram(counts) = &point.value else {
        return None;
    };
    Some(HistogramDataPoint {
        attributes: attributes(family, point),
        start_time_unix_nano: started,
        time_unix_nano: now,
        count: counts.count(),
        sum: Some(counts.sum),
        bucket_counts: counts.buckets.clone(),
        explicit_bounds: counts.bounds.to_vec(),
        exemplars: exemplars(counts),
        ..HistogramDataPoint::default()
    })
}

fn exemplars(counts: &HistogramCounts) -> Vec<PbExemplar> {
    let exemplars = counts.exemplars.iter().flatten();
    let exemplars = exemplars.map(|exemplar| PbExemplar {
        time_unix_nano: nanos(exemplar.at),
        trace_id: exemplar.trace.to_bytes().to_vec(),
        span_id: exemplar.span.to_bytes().to_vec(),
        value: Some(exemplar::Value::AsDouble(exemplar.value)),
        ..PbExemplar::default()
    });
    exemplars.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use opentelemetry::trace::{SpanId, TraceId};
    use opentelemetry_proto::tonic::collector::metrics::v1::{
        ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    };
    use tokio::{net::TcpListener, task::JoinHandle};
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Response, transport::Endpoint};

    use super::*;
    use crate::metrics::histogram::Exemplar;

    crate::families! {
        /// Of the tests.
        LIST:
        /// Bytes.
        SENT = "test_sent_bytes_total", Counter, Bytes, [volume];
        /// How long it took.
        TOOK = "test_took_seconds", Histogram, Seconds, [];
        /// How many there are.
        THERE = "test_there", Gauge, None, [];
    }

    fn read() -> Read {
        Arc::new(|| {
            let mut reading = Reading::of(&[LIST]);
            reading.add(&SENT, &["data"], 7);
            reading.add(&THERE, &[], 0.5);
            let mut counts = super::super::Histogram::new(&[1.0]).counts();
            counts.buckets = vec![2, 1];
            counts.sum = 5.0;
            counts.exemplars[1] = Some(Exemplar {
                trace: TraceId::from(7),
                span: SpanId::from(9),
                value: 4.0,
                at: UNIX_EPOCH,
            });
            reading.push(&TOOK, &[], Value::Histogram(counts));
            reading
        })
    }

    #[derive(Clone, Default)]
    struct Collector(Arc<Mutex<Vec<Request<ExportMetricsServiceRequest>>>>);

    #[tonic::async_trait]
    impl MetricsService for Collector {
        async fn export(
            &self,
            request: Request<ExportMetricsServiceRequest>,
        ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
            self.0.lock().unwrap().push(request);
            Ok(Response::new(ExportMetricsServiceResponse::default()))
        }
    }

    async fn collector() -> (Collector, String, JoinHandle<()>) {
        let collector = Collector::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let serving = tonic::transport::Server::builder()
            .add_service(MetricsServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serving.await.unwrap() });
        (collector, endpoint, task)
    }

    fn push(endpoint: &str, period: Duration) -> Push {
        let channel = Endpoint::from_shared(endpoint.to_owned()).unwrap();
        let mut standard = MetadataMap::new();
        standard.insert("x-team", "storage".parse().unwrap());
        Push {
            channel: channel.connect_lazy(),
            standard,
            headers: Headers::open(None).unwrap(),
            resource: Resource::default(),
            endpoint: endpoint.to_owned(),
            period,
            last_push_max: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn a_collector_gets_what_the_endpoint_shows_and_the_last_of_it_at_the_end() {
        let (collector, endpoint, _task) = collector().await;
        let (stop, stopping) = watch::channel(false);
        let hour = Duration::from_secs(3600);
        let pushing = tokio::spawn(push(&endpoint, hour).run(read(), stopping));
        stop.send_replace(true);
        pushing.await.unwrap();
        let mut received = std::mem::take(&mut *collector.0.lock().unwrap());
        let request = received.pop().unwrap();
        assert_eq!(request.metadata().get("x-team").unwrap(), "storage");
        let message = request.into_inner().resource_metrics.remove(0);
        let metrics = &message.scope_metrics[0].metrics;
        let names: Vec<_> = metrics.iter().map(|m| (&m.name[..], &m.unit[..])).collect();
        let expected = [
            ("test_sent_bytes", "By"),
            ("test_there", ""),
            ("test_took_seconds", "s"),
        ];
        assert_eq!(names, expected);
        let Some(Data::Sum(sent)) = &metrics[0].data else {
            panic!("{:?}", metrics[0]);
        };
        assert!(sent.is_monotonic);
        let point = &sent.data_points[0];
        assert_eq!(point.value, Some(PbNumber::AsInt(7)));
        assert_eq!(point.attributes[0].key, "volume");
        assert!(point.start_time_unix_nano > 0);
        let Some(Data::Histogram(took)) = &metrics[2].data else {
            panic!("{:?}", metrics[2]);
        };
        let point = &took.data_points[0];
        assert_eq!((point.count, point.sum), (3, Some(5.0)));
        assert_eq!(point.bucket_counts, [2, 1]);
        assert_eq!(point.explicit_bounds, [1.0]);
        assert_eq!(point.exemplars[0].trace_id, TraceId::from(7).to_bytes());
    }

    #[tokio::test]
    async fn a_collector_that_is_gone_holds_up_nobody() {
        let (stop, stopping) = watch::channel(false);
        let nowhere = push("http://127.0.0.1:1", Duration::from_millis(10));
        let pushing = tokio::spawn(nowhere.run(read(), stopping));
        sleep(Duration::from_millis(100)).await;
        assert!(!pushing.is_finished());
        stop.send_replace(true);
        timeout(Duration::from_secs(5), pushing)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_stop_does_not_wait_for_a_push_to_a_collector_that_says_nothing() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let (stop, stopping) = watch::channel(false);
        let mut push = push(&endpoint, Duration::ZERO);
        push.last_push_max = Duration::from_millis(50);
        let pushing = tokio::spawn(push.run(read(), stopping));
        let _open = silent.accept().await.unwrap();
        stop.send_replace(true);
        timeout(PUSH_MAX / 2, pushing).await.unwrap().unwrap();
    }

    #[test]
    fn many_series_are_several_messages() {
        let mut reading = Reading::of(&[LIST]);
        for n in 0..10_000 {
            reading.add(&SENT, &[&n.to_string()], n);
        }
        let now = SystemTime::now();
        let messages = messages(&reading, &Resource::default(), now, now);
        let series = messages.iter().map(|message| {
            let metrics = &message.resource_metrics[0].scope_metrics[0].metrics;
            let points = metrics.iter().map(|metric| match &metric.data {
                Some(Data::Sum(sum)) => sum.data_points.len(),
                _ => 0,
            });
            points.sum::<usize>()
        });
        let series: Vec<_> = series.collect();
        assert_eq!(series.iter().sum::<usize>(), 10_000);
        assert!(series.iter().all(|n| *n <= SERIES_PER_MESSAGE_MAX));
    }
}
