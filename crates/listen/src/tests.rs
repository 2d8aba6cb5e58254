use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_stream::StreamExt;
use tonic::transport::server::Connected;

use tidemark_tls::GateFiles;

use super::*;
use crate::connection::Admission;

/// With a certificate and identities, so that whoever connects has to speak TLS and to say who they are.
async fn secured(times: Times) -> (Incoming, SocketAddr) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(path("crt"), own.cert.pem()).unwrap();
    std::fs::write(path("key"), own.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("identities"), "").unwrap();
    let gate = Gate::open(GateFiles {
        certificate: Some((path("crt"), path("key"))),
        ca: None,
        identities: Some(path("identities")),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut incoming = Incoming::new(listener, 4, times.greeting_max, gate.unwrap());
    incoming.times = times;
    (incoming, addr)
}

/// Reads until the connection ends; gives why.
async fn end_of(connection: &mut Connection) -> io::ErrorKind {
    let mut bytes = [0; 64];
    loop {
        match connection.read(&mut bytes).await {
            Ok(0) => return io::ErrorKind::UnexpectedEof,
            Ok(_) => {}
            Err(error) => return error.kind(),
        }
    }
}

async fn incoming(connections_max: usize, greeting_max: Duration) -> (Incoming, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let gate = Gate::open(GateFiles::default()).unwrap();
    (
        Incoming::new(listener, connections_max, greeting_max, gate),
        addr,
    )
}

async fn next(incoming: &mut Incoming) -> Connection {
    incoming.next().await.unwrap().unwrap()
}

#[tokio::test]
async fn those_beyond_the_limit_are_closed_and_room_is_made_by_those_that_end() {
    let (mut incoming, addr) = incoming(2, GREETING_MAX).await;
    let _one = TcpStream::connect(addr).await.unwrap();
    let _two = TcpStream::connect(addr).await.unwrap();
    let (first, _second) = (next(&mut incoming).await, next(&mut incoming).await);
    let mut refused = TcpStream::connect(addr).await.unwrap();
    let mut byte = [0];
    tokio::select! {
        _ = next(&mut incoming) => panic!("a third was admitted"),
        read = refused.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_))),
    }
    drop(first);
    let mut third = TcpStream::connect(addr).await.unwrap();
    let mut admitted = next(&mut incoming).await;
    third.write_all(b"x").await.unwrap();
    admitted.read_exact(&mut byte).await.unwrap();
    assert_eq!(byte, *b"x");
}

#[tokio::test]
async fn who_does_not_speak_in_time_is_cut_off_and_who_has_spoken_may_be_silent() {
    let greeting_max = Duration::from_millis(50);
    let (mut incoming, addr) = incoming(4, greeting_max).await;
    let _silent = TcpStream::connect(addr).await.unwrap();
    let mut silent = next(&mut incoming).await;
    let mut slow = TcpStream::connect(addr).await.unwrap();
    slow.write_all(b"PRI * HTTP/2.0").await.unwrap();
    let mut halting = next(&mut incoming).await;
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(&[1; 33]).await.unwrap();
    let mut spoken = next(&mut incoming).await;
    let mut greeting = [0; 33];
    spoken.read_exact(&mut greeting).await.unwrap();

    let mut byte = [0];
    for cut_off in [&mut silent, &mut halting] {
        let ended = async {
            while cut_off.read(&mut byte).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        assert_eq!(ended.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
    sleep(greeting_max * 2).await;
    client.write_all(b"x").await.unwrap();
    spoken.read_exact(&mut byte).await.unwrap();
    assert_eq!(byte, *b"x");
}

const SHORT: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_handshake_that_is_not_ended_in_time_is_cut_off() {
    let times = Times {
        greeting_max: SHORT,
        admission_max: Duration::from_secs(3600),
    };
    let (mut incoming, addr) = secured(times).await;
    let _silent = TcpStream::connect(addr).await.unwrap();
    let mut silent = next(&mut incoming).await;
    let mut slow = TcpStream::connect(addr).await.unwrap();
    // The head of a handshake message of 512 bytes, and the first of them.
    slow.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    let mut halting = next(&mut incoming).await;
    assert_eq!(end_of(&mut silent).await, io::ErrorKind::TimedOut);
    assert_eq!(end_of(&mut halting).await, io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn who_speaks_something_else_than_tls_is_refused_at_once() {
    let times = Times {
        greeting_max: Duration::from_secs(3600),
        admission_max: Duration::from_secs(3600),
    };
    let (mut incoming, addr) = secured(times).await;
    let mut plain = TcpStream::connect(addr).await.unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut refused = next(&mut incoming).await;
    assert_eq!(end_of(&mut refused).await, io::ErrorKind::InvalidData);
    // Its end is told, not torn off.
    let mut told = Vec::new();
    plain.read_to_end(&mut told).await.unwrap();
    assert_eq!(told.first(), Some(&21), "an alert");
}

#[tokio::test]
async fn who_does_not_say_in_time_who_they_are_is_cut_off() {
    let (mut incoming, addr) = incoming(4, GREETING_MAX).await;
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(&[1; 33]).await.unwrap();
    let mut stranger = next(&mut incoming).await;
    stranger.admission = Some(Admission::within(SHORT));
    assert_eq!(end_of(&mut stranger).await, io::ErrorKind::TimedOut);

    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(&[1; 33]).await.unwrap();
    let mut known = next(&mut incoming).await;
    known.admission = Some(Admission::within(SHORT));
    known.connect_info().admit();
    sleep(SHORT * 2).await;
    drop(client);
    assert_eq!(end_of(&mut known).await, io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn where_all_places_are_taken_the_oldest_that_is_nobody_gives_way() {
    let hour = Duration::from_secs(3600);
    let (mut incoming, addr) = secured(Times {
        greeting_max: hour,
        admission_max: hour,
    })
    .await;
    let mut clients = Vec::new();
    let mut open = Vec::new();
    for _ in 0..4 {
        clients.push(TcpStream::connect(addr).await.unwrap());
        open.push(next(&mut incoming).await);
    }
    // The oldest is somebody.
    open[0].connect_info().admit();
    clients.push(TcpStream::connect(addr).await.unwrap());
    open.push(next(&mut incoming).await);
    assert_eq!(end_of(&mut open[1]).await, io::ErrorKind::TimedOut);
    for kept in [0, 2, 3, 4] {
        let waited = tokio::time::timeout(Duration::from_millis(20), end_of(&mut open[kept]));
        assert!(waited.await.is_err(), "{kept}");
    }
    // Once all are somebody, nobody gives way.
    open.remove(1);
    for connection in &open {
        connection.connect_info().admit();
    }
    let mut refused = TcpStream::connect(addr).await.unwrap();
    let mut byte = [0];
    tokio::select! {
        _ = next(&mut incoming) => panic!("a fifth was admitted"),
        read = refused.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_))),
    }
}

#[tokio::test]
async fn those_who_give_way_and_have_not_left_yet_are_few() {
    let hour = Duration::from_secs(3600);
    let (mut incoming, addr) = secured(Times {
        greeting_max: hour,
        admission_max: hour,
    })
    .await;
    let mut held = Vec::new();
    // Four places; nobody looks at the connections, so that none of them leaves.
    for _ in 0..5 {
        let client = TcpStream::connect(addr).await.unwrap();
        held.push((client, next(&mut incoming).await));
    }
    let mut refused = TcpStream::connect(addr).await.unwrap();
    let mut byte = [0];
    tokio::select! {
        _ = next(&mut incoming) => panic!("too many were admitted"),
        read = refused.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_))),
    }
}
