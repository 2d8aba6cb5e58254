use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_stream::StreamExt;

use super::*;

async fn incoming(connections_max: usize, greeting_max: Duration) -> (Incoming, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (Incoming::new(listener, connections_max, greeting_max), addr)
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
