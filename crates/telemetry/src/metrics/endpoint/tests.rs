use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::metrics::{BUILD_INFO, COMMON, Process, Reading};

struct Served {
    addr: SocketAddr,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

async fn served(endpoint: Endpoint) -> Served {
    let bound = Bound::to(([127, 0, 0, 1], 0).into()).await.unwrap();
    let addr = bound.addr;
    let (stop, stopping) = watch::channel(false);
    let task = tokio::spawn(endpoint.serve(bound, stopping));
    Served { addr, stop, task }
}

fn own() -> Endpoint {
    let process = Process::new("test-svc", "1.2.3");
    Endpoint::new(Arc::new(move || {
        let mut reading = Reading::of(&[COMMON]);
        process.read(&mut reading);
        reading
    }))
}

async fn ask(addr: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(addr: SocketAddr, path: &str) -> String {
    ask(addr, &format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")).await
}

#[tokio::test]
async fn metrics_are_served_and_nothing_else_is() {
    let served = served(own()).await;
    let answer = get(served.addr, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let line = format!(
        "{}{{service=\"test-svc\",version=\"1.2.3\"}} 1\n",
        BUILD_INFO.name
    );
    assert!(answer.contains(&line), "{answer}");
    for path in ["/", "/metrics/", "/healthz"] {
        let answer = get(served.addr, path).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    let post = "POST /metrics HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n";
    let answer = ask(served.addr, post).await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    let open =
        "GET /metrics HTTP/1.1\r\nhost: test\r\naccept: application/openmetrics-text\r\n\r\n";
    assert!(ask(served.addr, open).await.ends_with("# EOF\n"));
}

#[tokio::test]
async fn a_stop_closes_what_is_open() {
    let served = served(own()).await;
    let mut silent = TcpStream::connect(served.addr).await.unwrap();
    get(served.addr, "/metrics").await;
    served.stop.send_replace(true);
    timeout(Duration::from_secs(5), served.task)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    assert!(TcpStream::connect(served.addr).await.is_err());
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_its_key() {
    let first = Bound::to(([127, 0, 0, 1], 0).into()).await.unwrap();
    let error = Bound::to(first.addr).await.unwrap_err();
    let told = format!("{error:#}");
    let expected = format!("listen on {} for metrics (metrics_listen): ", first.addr);
    assert!(told.starts_with(&expected), "{told}");
}

#[tokio::test]
async fn clients_that_say_nothing_keep_nobody_out_for_long() {
    let mut endpoint = own();
    endpoint.headers_max = Duration::from_millis(300);
    let served = served(endpoint).await;
    let began = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut stream = TcpStream::connect(served.addr).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nx: ")
            .await
            .unwrap();
        silent.push(stream);
    }
    // Each connection is taken, or refused, in its turn: this one comes behind all of them.
    let mut late = TcpStream::connect(served.addr).await.unwrap();
    assert_eq!(late.read(&mut [0]).await.unwrap_or(0), 0, "closed at once");
    for mut stream in silent {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let answer = get(served.addr, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn readings_that_hang_are_one_thread_and_an_answer_in_time() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = parking_lot::Mutex::new(wait);
    let threads = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&threads);
    let mut endpoint = Endpoint::new(Arc::new(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let _ = wait.lock().recv();
        Reading::of(&[COMMON])
    }));
    endpoint.patience = Duration::from_millis(50);
    let served = served(endpoint).await;
    let addr = served.addr;
    for _ in 0..3 {
        let answer = get(addr, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    assert_eq!(threads.load(std::sync::atomic::Ordering::SeqCst), 1);
    drop(go);
    // Also this thread has no more than its patience.
    while !get(addr, "/metrics").await.starts_with("HTTP/1.1 200 ") {}
}
