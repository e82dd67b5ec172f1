//! A line to a service that a test can cut. What is sent over it meanwhile waits until it is mended.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::services::address;

/// Bytes that are taken from a connection at once.
const PIECE_BYTES: usize = 64 << 10;

/// The line, for connections over TCP.
pub struct Line {
    /// Where the service is reached over it.
    pub url: String,
    is_cut: watch::Sender<bool>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Line {
    /// One to the service there; whole.
    pub async fn start(to: &str) -> Self {
        let target = address(to).to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let is_cut = watch::Sender::new(false);
        let cut = is_cut.clone();
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&target).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) =
                    (near.into_split(), far.into_split());
                connections.spawn(pass_on(near_in, far_out, cut.subscribe()));
                connections.spawn(pass_on(far_in, near_out, cut.subscribe()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { url, is_cut, server }
    }

    /// From now on nothing gets through, in either direction.
    pub fn cut(&self) {
        self.is_cut.send_replace(true);
    }

    /// What was held up goes on.
    pub fn mend(&self) {
        self.is_cut.send_replace(false);
    }
}

/// One direction of a connection, until an end of it closes.
async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut is_cut: watch::Receiver<bool>,
) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        let is_whole = is_cut.wait_for(|is_cut| !is_cut).await.is_ok();
        if !is_whole || to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
