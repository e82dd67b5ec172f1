//! What a hostile or broken peer can put on the wire, below the level of messages.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use endio_api::DESCRIPTORS;
use endio_testkit::seed::Rng;
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tower::ServiceExt as _;

/// Longest wait for the answer to one attack: it must end, whatever it is.
const ANSWER_WAIT: Duration = Duration::from_secs(20);

/// A lazily connected channel.
pub fn channel(url: &str) -> Channel {
    Endpoint::from_shared(url.to_owned()).expect("a URL").connect_lazy()
}

/// Paths of all methods of a service, from the descriptors.
pub fn methods(service: &str) -> Vec<String> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).expect("the descriptors are ours");
    let mut paths = Vec::new();
    for file in &set.file {
        for found in &file.service {
            let name = format!("{}.{}", file.package(), found.name());
            if name == service {
                let path = |method: &prost_types::MethodDescriptorProto| {
                    format!("/{name}/{}", method.name())
                };
                paths.extend(found.method.iter().map(path));
            }
        }
    }
    assert!(!paths.is_empty(), "{service} is not in the descriptors");
    paths
}

/// How a call ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    /// `grpc-status`, or the HTTP status if there is none.
    pub status: String,
    /// `grpc-message`.
    pub message: String,
}

/// One call with this body as it is.
///
/// # Errors
/// The connection broke, which is an answer, too.
///
/// # Panics
/// It does not end.
pub async fn call(channel: &Channel, path: &str, body: Bytes) -> Result<Ended, String> {
    let request = http::Request::post(format!("http://endio{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(body)))
        .expect("a request");
    let ended = async {
        let answer = channel.clone().oneshot(request).await.map_err(|e| e.to_string())?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.map_err(|e| e.to_string())?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        let field = |name: &str| {
            let value = trailers.get(name).or_else(|| head.headers.get(name));
            value.and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let status = field("grpc-status").unwrap_or_else(|| head.status.to_string());
        Ok(Ended { status, message: field("grpc-message").unwrap_or_default() })
    };
    timeout(ANSWER_WAIT, ended).await.unwrap_or_else(|_| panic!("{path} does not answer"))
}

/// A gRPC frame that says what it likes about its length.
pub fn frame(compressed: u8, length: u32, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(payload.len() + 5);
    frame.put_u8(compressed);
    frame.put_u32(length);
    frame.put_slice(payload);
    frame.freeze()
}

/// Broken frames and garbage messages against every method; returns how many were sent. Each must
/// end in an error.
pub async fn attack_frames(url: &str, service: &str, rng: &mut Rng) -> usize {
    let channel = channel(url);
    let mut sent = 0;
    for path in methods(service) {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("short");
        let garbage = {
            // A length-delimited field that is longer than the message.
            let mut bytes = vec![0x0A, 0xFF, 0xFF, 0xFF, 0x7F];
            bytes.extend(rng.bytes(40));
            bytes
        };
        let wrong_type = [0x0B, 0x0B, 0x0B, 0x0B].repeat(8);
        let endless_varint = [0x08].into_iter().chain([0xFF; 30]).collect::<Vec<u8>>();
        let bodies = [
            frame(0, length(&garbage), &garbage),
            frame(0, length(&wrong_type), &wrong_type),
            frame(0, length(&endless_varint), &endless_varint),
            frame(0, u32::MAX, &garbage),
            frame(0, 1 << 30, &[]),
            frame(1, length(&garbage), &garbage),
            frame(7, length(&garbage), &garbage),
            frame(0, 100, &garbage[..10]),
            Bytes::from_static(&[0, 0]),
        ];
        for body in bodies {
            sent += 1;
            if let Ok(ended) = call(&channel, &path, body.clone()).await {
                assert_ne!(ended.status, "0", "{path} accepts {body:?}");
                assert!(!ended.message.contains("panicked"), "{path}: {}", ended.message);
            }
        }
    }
    let absent = call(&channel, &format!("/{service}/NoSuchMethod"), Bytes::new()).await;
    assert_eq!(absent.expect("an answer").status, "12", "an unknown method is UNIMPLEMENTED");
    sent + 1
}

/// Things that are no HTTP/2, and HTTP/2 that is cut; returns how many were sent.
pub async fn attack_bytes(url: &str, rng: &mut Rng) -> usize {
    let address = url.trim_start_matches("http://").to_owned();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut attacks = vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        preface[..10].to_vec(),
        preface.clone(),
        [&preface[..], &settings].concat(),
        // A frame that claims 16 MiB, one of an unknown kind, one on stream 0, a bad SETTINGS.
        [&preface[..], &settings, &[0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 1]].concat(),
        [&preface[..], &settings, &[0, 0, 4, 0xEE, 0, 0, 0, 0, 1, 1, 2, 3, 4]].concat(),
        [&preface[..], &settings, &[0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]].concat(),
        [&preface[..], &[0, 0, 5, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5]].concat(),
        // HEADERS whose compressed block is garbage.
        [&preface[..], &settings, &[0, 0, 8, 1, 4, 0, 0, 0, 1], &[0xFF; 8]].concat(),
        // Window updates that overflow.
        [&preface[..], &settings, &[0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7F, 0xFF, 0xFF, 0xFF].repeat(3)]
            .concat(),
    ];
    for _ in 0..20 {
        let length = usize::try_from(rng.between(1, 2000)).expect("short");
        attacks.push(rng.bytes(length));
        attacks.push([&preface[..], &settings, &rng.bytes(length)].concat());
    }
    let sent = attacks.len();
    for attack in attacks {
        let mut stream = TcpStream::connect(&address).await.expect("the port is open");
        // The service may hang up while it is being written to.
        let _ = stream.write_all(&attack).await;
        let mut answer = vec![0; 1024];
        let _ = timeout(Duration::from_millis(5), stream.read(&mut answer)).await;
    }
    sent
}
