//! Spans on their way to the collector.
//!
//! They wait in a bounded queue for a thread of their own, which hands them on in batches; the connection has a runtime of
//! its own. So a collector that is slow, silent or gone holds up nobody. What finds no room, or isn't taken in time, is
//! lost and counted; the log says once when that begins, and once when it ends.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use opentelemetry::Context;
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor},
};
use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle, Runtime};
use tonic::{
    Request,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, KeyAndValueRef, MetadataMap},
    transport::{Channel, Endpoint},
};

use super::settings::{Collector, metrics_headers};

/// Spans that wait.
const QUEUE_MAX: usize = 2048;
const BATCH_MAX: usize = 512;
/// How long spans are gathered before they are sent.
const GATHER: Duration = Duration::from_secs(1);
/// How long a batch may take, further tries included.
const BATCH_TIME_MAX: Duration = Duration::from_secs(3);
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// The most bytes of a file of headers.
const HEADERS_LEN_MAX: u64 = 64 << 10;
/// The log speaks of a collector that comes and goes at most this often.
const TOLD_PERIOD: Duration = Duration::from_secs(60);

/// What is known of the export.
#[derive(Debug)]
struct Books {
    endpoint: String,
    /// Spans in the queue.
    waiting: AtomicUsize,
    lost: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    fails: bool,
    /// Whether the log has said that it fails.
    told: bool,
    told_at: Option<Instant>,
    /// Of the spans lost, those that the log has told of.
    told_lost: u64,
}

impl Books {
    fn new(endpoint: &str) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            waiting: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// Whether a span has room in the queue. Where two come at once and there is room for one, both may have it.
    fn admit(&self) -> bool {
        let has_room = self.waiting.load(Relaxed) < QUEUE_MAX;
        if has_room {
            self.waiting.fetch_add(1, Relaxed);
        } else {
            self.lost.fetch_add(1, Relaxed);
        }
        has_room
    }

    /// A batch was taken out of the queue, and this became of it.
    fn done(&self, spans: usize, result: &OTelSdkResult, now: Instant) {
        let lost = match result {
            Ok(()) => 0,
            Err(_) => spans as u64,
        };
        let lost = self.lost.fetch_add(lost, Relaxed) + lost;
        let mut state = self.state.lock();
        match result {
            Err(error) => {
                state.fails = true;
                let is_due = state.told_at.is_none_or(|at| now - at >= TOLD_PERIOD);
                if !state.told && is_due {
                    state.told = true;
                    state.told_at = Some(now);
                    tracing::warn!(
                        endpoint = %self.endpoint, %error,
                        "traces can't be exported, and are lost; nothing else waits for that"
                    );
                }
            }
            Ok(()) => {
                if state.fails && state.told {
                    let lost = lost - std::mem::replace(&mut state.told_lost, lost);
                    tracing::info!(endpoint = %self.endpoint, lost, "traces are exported again");
                }
                state.fails = false;
                state.told = false;
            }
        }
    }

    fn tell_at_end(&self) {
        let lost = self.lost.load(Relaxed) + self.waiting.load(Relaxed) as u64;
        let lost = lost - self.state.lock().told_lost;
        if lost > 0 {
            tracing::warn!(endpoint = %self.endpoint, lost, "spans of traces were lost");
        }
    }
}

/// The export of spans while it runs.
#[derive(Debug)]
pub(super) struct Exporting {
    runtime: Runtime,
    books: Arc<Books>,
}

impl Exporting {
    /// Sets it up; it connects when there is something to export.
    ///
    /// # Errors
    /// A file can't be used, or no thread be started.
    pub(super) fn start(collector: &Collector) -> Result<(Self, Bounded)> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp")
            .enable_all()
            .build()
            .context("start the runtime that exports traces")?;
        let books = Arc::new(Books::new(&collector.endpoint));
        let (otlp, headers) = otlp(collector, &runtime)?;
        let exporter = Exporter {
            inner: Arc::new(otlp),
            headers,
            runtime: runtime.handle().clone(),
            books: Arc::clone(&books),
        };
        let batches = BatchConfigBuilder::default()
            // Never full: the books have fewer.
            .with_max_queue_size(2 * QUEUE_MAX)
            .with_max_export_batch_size(BATCH_MAX)
            .with_scheduled_delay(GATHER)
            .build();
        let batched = BatchSpanProcessor::builder(exporter)
            .with_batch_config(batches)
            .build();
        let bounded = Bounded {
            batched,
            books: Arc::clone(&books),
        };
        Ok((Self { runtime, books }, bounded))
    }

    /// Ends it, whatever is under way, and says what was lost.
    pub(super) fn end(self) {
        self.runtime.shutdown_background();
        self.books.tell_at_end();
    }
}

impl Collector {
    /// A connection that is made when it is first used, and what is shown over it. It belongs to the runtime that this is
    /// called in.
    ///
    /// # Errors
    /// The file of headers can't be used.
    pub(crate) fn dial(&self) -> Result<(Channel, Headers)> {
        let tune = |endpoint: Endpoint| {
            endpoint
                .connect_timeout(CONNECT_MAX)
                .timeout(BATCH_TIME_MAX)
        };
        let channel = tidemark_tls::dial_lazily(&self.endpoint, self.ca.as_deref(), tune)
            .context("otlp_endpoint")?;
        Ok((channel, Headers::open(self.headers_file.as_deref())?))
    }
}

fn otlp(collector: &Collector, runtime: &Runtime) -> Result<(Otlp, Headers)> {
    let _entered = runtime.enter();
    let (channel, headers) = collector.dial()?;
    let shown = headers.clone();
    let otlp = Otlp::builder()
        .with_tonic()
        .with_channel(channel)
        .with_interceptor(move |mut request: Request<()>| {
            shown.put(request.metadata_mut());
            Ok(request)
        })
        .with_timeout(BATCH_TIME_MAX)
        .build()
        .context("set up the export of traces")?;
    Ok((otlp, headers))
}

/// What is shown to a collector, as its file had it last.
#[derive(Debug, Clone)]
pub(crate) struct Headers(Option<Arc<HeadersFile>>);

#[derive(Debug)]
struct HeadersFile {
    path: PathBuf,
    last: Mutex<MetadataMap>,
}

impl Headers {
    /// # Errors
    /// The file can't be used.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let file = path.map(|path| {
            let last = Mutex::new(headers(path)?);
            let path = path.to_owned();
            anyhow::Ok(Arc::new(HeadersFile { path, last }))
        });
        Ok(Self(file.transpose()?))
    }

    /// Reads the file again. One that can't be used now, as while it is written, changes nothing.
    pub(crate) async fn renew(&self) {
        let Some(file) = self.0.clone() else { return };
        let renewed = tokio::task::spawn_blocking(move || {
            if let Ok(headers) = headers(&file.path) {
                *file.last.lock() = headers;
            }
        });
        // It can't fail but by a mistake of ours; the last ones are as good then.
        let _ = renewed.await;
    }

    /// Puts them in place of those of the same names.
    pub(crate) fn put(&self, metadata: &mut MetadataMap) {
        let Some(file) = &self.0 else { return };
        for header in file.last.lock().iter() {
            if let KeyAndValueRef::Ascii(name, value) = header {
                metadata.insert(name, value.clone());
            }
        }
    }
}

/// Headers for metrics as standard variables have them: `name=value,name=value`, values encoded as in URLs. What is none
/// is passed over.
pub(crate) fn standard_headers() -> MetadataMap {
    listed(&metrics_headers().unwrap_or_default())
}

fn listed(text: &str) -> MetadataMap {
    let mut headers = MetadataMap::new();
    for (name, value) in text.split(',').filter_map(|header| header.split_once('=')) {
        if let Some((name, value)) = header(name, &decoded(value.trim())) {
            headers.insert(name, value);
        }
    }
    headers
}

/// Without the encoding of URLs; as it is, where it is not encoded so.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let Some(byte) = part
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
        else {
            return text.to_owned();
        };
        bytes.push(byte);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

/// A header, whose value nobody gets to see.
fn header(name: &str, value: &str) -> Option<(AsciiMetadataKey, AsciiMetadataValue)> {
    let name = name.trim().to_ascii_lowercase();
    let name = AsciiMetadataKey::from_bytes(name.as_bytes()).ok()?;
    let mut value: AsciiMetadataValue = value.trim().parse().ok()?;
    value.set_sensitive(true);
    Some((name, value))
}

/// The headers of a file: lines of `name: value`. What is wrong with a line is told without its value.
fn headers(path: &Path) -> Result<MetadataMap> {
    let shown = || format!("otlp_headers_file {}", path.display());
    let length = fs::metadata(path).with_context(shown)?.len();
    if length > HEADERS_LEN_MAX {
        bail!("{}: {length} bytes are too many", shown());
    }
    let text = fs::read_to_string(path).with_context(shown)?;
    let mut headers = MetadataMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let header = line
            .split_once(':')
            .and_then(|(name, value)| header(name, value));
        let Some((name, value)) = header else {
            bail!("{}: line {number} is no header: write name: value", shown());
        };
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Keeps the queue within its bound.
#[derive(Debug)]
pub(super) struct Bounded {
    batched: BatchSpanProcessor,
    books: Arc<Books>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batched.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.books.admit() {
            self.batched.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batched.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batched.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batched.set_resource(resource);
    }
}

/// Exports on the runtime, in time, and keeps the books.
#[derive(Debug)]
struct Exporter {
    inner: Arc<Otlp>,
    headers: Headers,
    runtime: Handle,
    books: Arc<Books>,
}

impl SpanExporter for Exporter {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        let spans = batch.len();
        self.books.waiting.fetch_sub(spans, Relaxed);
        let (inner, headers) = (Arc::clone(&self.inner), self.headers.clone());
        let sent = self.runtime.spawn(async move {
            let export = async {
                headers.renew().await;
                inner.export(batch).await
            };
            let sent = tokio::time::timeout(BATCH_TIME_MAX, export).await;
            sent.unwrap_or(Err(OTelSdkError::Timeout(BATCH_TIME_MAX)))
        });
        async move {
            let result = sent
                .await
                .unwrap_or_else(|error| Err(OTelSdkError::InternalFailure(error.to_string())));
            self.books.done(spans, &result, Instant::now());
            result
        }
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        // Nobody else has it before the first export.
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_past_the_bound_are_lost_and_counted() {
        let books = Books::new("http://collector");
        assert!((0..QUEUE_MAX).all(|_| books.admit()));
        assert!((0..3).all(|_| !books.admit()));
        assert_eq!(books.lost.load(Relaxed), 3);
        books.waiting.fetch_sub(BATCH_MAX, Relaxed);
        assert!(books.admit());
    }

    #[test]
    fn a_collector_that_comes_and_goes_is_told_of_once_in_a_while() {
        let books = Books::new("http://collector");
        let failed = Err(OTelSdkError::Timeout(BATCH_TIME_MAX));
        let told = || {
            let state = books.state.lock();
            (state.told, state.told_at)
        };
        let begin = Instant::now();
        for seconds in 0..3 {
            books.done(2, &failed, begin + Duration::from_secs(seconds));
            assert_eq!(told(), (true, Some(begin)));
        }
        books.done(2, &Ok(()), begin + Duration::from_secs(3));
        assert!(!told().0);
        assert_eq!(books.state.lock().told_lost, 6);
        // Soon again: nothing is said, but once it has failed for long enough.
        books.done(2, &failed, begin + Duration::from_secs(4));
        assert!(!told().0);
        books.done(2, &failed, begin + TOLD_PERIOD);
        assert_eq!(told(), (true, Some(begin + TOLD_PERIOD)));
    }

    #[test]
    fn headers_are_lines_and_a_bad_one_is_told_without_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("headers");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            headers(&path)
        };
        let good = read("# of the hosted one\nAuthorization: Bearer abc:def\n\nx-team: storage\n");
        let good = good.unwrap();
        assert_eq!(good.get("authorization").unwrap(), "Bearer abc:def");
        assert_eq!(good.get("x-team").unwrap(), "storage");
        assert!(!format!("{good:?}").contains("abc"));
        for bad in ["x: 1\nsecret", "se cret: 1", "name: s\u{1}ecret"] {
            let told = format!("{:#}", read(bad).unwrap_err());
            let named = told.contains("headers") && told.contains("line");
            assert!(named && !told.contains("ecret"), "{told}");
        }
        assert!(headers(&dir.path().join("missing")).is_err());
    }

    #[test]
    fn standard_headers_are_a_list_with_values_as_in_urls() {
        let headers =
            listed("Authorization=Basic%20a%3D=, x-team = storage ,none,x-raw=50%,se cret=1");
        assert_eq!(headers.len(), 3);
        assert_eq!(headers.get("authorization").unwrap(), "Basic a==");
        assert_eq!(headers.get("x-team").unwrap(), "storage");
        assert_eq!(headers.get("x-raw").unwrap(), "50%");
    }

    #[tokio::test]
    async fn a_file_of_headers_is_read_again_and_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("headers");
        let write = |text: &str| fs::write(&path, text).unwrap();
        write("authorization: old\n");
        let headers = Headers::open(Some(&path)).unwrap();
        for (text, shown) in [("authorization: new\n", "new"), ("half a li", "new")] {
            write(text);
            headers.renew().await;
            let mut metadata = listed("authorization=standard,x-team=storage");
            headers.put(&mut metadata);
            let values: Vec<_> = metadata.get_all("authorization").iter().collect();
            assert_eq!(values, [shown], "{text}");
            assert_eq!(metadata.get("x-team").unwrap(), "storage");
        }
    }
}
