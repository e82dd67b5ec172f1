#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;

/// Bound of waits that end by themselves unless something is broken.
const LONG: Duration = Duration::from_secs(30);

#[test]
fn an_address_round_trips_through_text() {
    for text in ["127.0.0.1:0", "[::1]:80", "localhost:7400", "unix:/run/s", "memory:a"] {
        assert_eq!(text.parse::<ListenAddr>().unwrap().to_string(), text);
    }
}

#[test]
fn text_that_is_no_address_is_refused() {
    for text in ["", "127.0.0.1", ":80", "host:", "host:99999", "unix:relative", "memory:", "a b:1"]
    {
        assert!(matches!(text.parse::<ListenAddr>(), Err(NetError::Address { .. })), "{text}");
    }
}

#[tokio::test]
async fn text_that_is_no_url_is_refused() {
    let dialer = Dialer::default();
    for url in ["", "127.0.0.1:80", "http://host", "ftp://h:1", "http://h:1/path", "memory:"] {
        assert!(matches!(dialer.channel(url), Err(NetError::Url { .. })), "{url}");
    }
    for url in ["http://localhost:80", "http://[::1]:80/", "unix:/a", "unix:///a", "memory:a"] {
        assert!(dialer.channel(url).is_ok(), "{url}");
    }
}

#[tokio::test]
async fn port_zero_is_replaced_by_the_port_in_the_url() {
    let listener = Listener::bind(&ListenAddr::loopback()).await.unwrap();
    let port = listener.url().strip_prefix("http://127.0.0.1:").unwrap();
    assert_ne!(port.parse::<u16>().unwrap(), 0);
    let taken = ListenAddr::Tcp(format!("127.0.0.1:{port}"));
    assert!(matches!(Listener::bind(&taken).await, Err(NetError::Bind { .. })));
}

#[tokio::test]
async fn a_memory_name_is_taken_once_and_free_after_the_listener() {
    let addr = ListenAddr::Memory("once".to_owned());
    let first = Listener::bind(&addr).await.unwrap();
    assert!(Listener::bind(&addr).await.is_err());
    drop(first);
    assert_eq!(Listener::bind(&addr).await.unwrap().url(), "memory:once");
}

#[tokio::test]
async fn a_dead_socket_file_is_replaced_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let addr = ListenAddr::Unix(path.clone());
    let live = Listener::bind(&addr).await.unwrap();
    let taken = Listener::bind(&addr).await.unwrap_err();
    assert!(matches!(taken, NetError::PathTaken { is_live: true, .. }), "{taken}");
    drop(live);
    assert!(path.exists(), "the dead socket is what this test is about");
    drop(Listener::bind(&addr).await.unwrap());

    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let taken = Listener::bind(&addr).await.unwrap_err();
    assert!(matches!(taken, NetError::PathTaken { is_live: false, .. }), "{taken}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_status_that_the_peer_sent_is_no_lost_connection() {
    assert!(is_connection_lost(&tonic::Status::unavailable("")));
    assert!(!is_connection_lost(&tonic::Status::cancelled("")));
}

#[tokio::test]
async fn a_peer_that_stops_answering_does_not_wedge_the_channel() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;

    // It takes connections and never says a word, like a host that was cut off.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    let (accepted, mut count) = tokio::sync::mpsc::channel(8);
    let peer = tokio::spawn(async move {
        let mut conns = Vec::new();
        while let Ok((conn, _)) = mute.accept().await {
            conns.push(conn);
            if accepted.send(()).await.is_err() {
                return;
            }
        }
    });
    let config =
        DialerConfig { keepalive_interval_ms: 20, keepalive_timeout_ms: 20, ..Default::default() };
    let mut client = HealthClient::new(Dialer::new(config).channel(&url).unwrap());
    for _ in 0..2 {
        let call = client.check(HealthCheckRequest::default());
        let status = tokio::time::timeout(LONG, call).await.unwrap().unwrap_err();
        assert!(is_connection_lost(&status), "{status:?}");
        count.recv().await.unwrap();
    }
    peer.abort();
}
