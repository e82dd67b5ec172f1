//! The seam: gRPC of the services over the sockets of the simulated network.

use std::io;
use std::sync::Arc;

use endio_chassis::net::{Conn, Dialer, DialerConfig, Listener, Transport};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use turmoil::net::{TcpListener, TcpStream};

#[derive(Debug)]
struct Simulated;

impl Transport for Simulated {
    fn connect(&self, host_port: String) -> BoxFuture<'static, io::Result<Conn>> {
        Box::pin(async move { Ok(Conn::foreign(TcpStream::connect(host_port).await?, None)) })
    }
}

/// Dials hosts of the simulation by their names.
pub(crate) fn dialer(config: DialerConfig) -> Dialer {
    Dialer::new(config).over(Arc::new(Simulated))
}

/// Listens as `host` of the simulation, which must be the one that runs.
///
/// # Errors
/// The port is taken.
pub(crate) async fn listen(host: &str, port: u16) -> io::Result<Listener> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    let accepted = stream::unfold(listener, |listener| async {
        let conn = listener.accept().await.map(|(stream, peer)| Conn::foreign(stream, Some(peer)));
        Some((conn, listener))
    });
    Ok(Listener::foreign(format!("http://{host}:{port}"), accepted.boxed()))
}
