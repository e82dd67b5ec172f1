//! A machine loses power with acknowledged writes in the cache: whoever flushes next is told, once.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use endio_crash_tests::nbd::Connection;
use endio_nbd::Errno;
use endio_nbd::consts::cmd;
use endio_testkit::cluster::{Cluster, Options, Who};
use tokio::task::block_in_place;

const BLOCK: usize = 4096;
const BOOT: &str = "ENDIO_BOOT_ID";

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// An NBD client has flushed once, so its writes are acknowledged from the cache. What was in the
/// cache log and not flushed is gone after the power cut. Its next flush fails, so that it cannot
/// take the lost write for durable; the one after that succeeds, also after a kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nbd_client_is_told_once_that_acknowledged_writes_were_lost() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd");
    let options = Options {
        capacity: "256MiB".to_owned(),
        data_root: Some(directory.path().join("data")),
        writeback_args: vec!["--nbd-listen".to_owned(), format!("unix:{}", socket.display())],
        env: vec![
            (BOOT.to_owned(), "boot 1".to_owned()),
            // What is dirty stays in the cache until it is flushed.
            ("ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS".to_owned(), "600000".to_owned()),
        ],
        ..Options::default()
    };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    cluster.client().with_patience(Duration::from_secs(60)).create("v", 1 << 20, 1).await.unwrap();
    let (old, new) = (vec![1; BLOCK], vec![2; BLOCK]);

    let mut client = Connection::open(&socket, "v").await.unwrap();
    client.call(cmd::WRITE, 0, 0, BLOCK, &old).await.unwrap().unwrap();
    client.call(cmd::FLUSH, 0, 0, 0, b"").await.unwrap().unwrap();
    let log = directory.path().join("data/writeback-0/log");
    let flushed = directory.path().join("flushed");
    copy(&log, &flushed);
    client.call(cmd::WRITE, 0, 0, BLOCK, &new).await.unwrap().unwrap();
    assert_eq!(client.call(cmd::READ, 0, 0, BLOCK, b"").await.unwrap().unwrap(), new);

    // The power goes: the log is what was flushed of it, and the machine boots again.
    block_in_place(|| {
        cluster.process(Who::Writeback(0)).kill();
        fs::remove_dir_all(&log).unwrap();
        copy(&flushed, &log);
        cluster.set_env(BOOT, Some("boot 2"));
        cluster.start_all()
    })
    .unwrap();
    let mut client = Connection::open(&socket, "v").await.unwrap();
    assert_eq!(client.call(cmd::READ, 0, 0, BLOCK, b"").await.unwrap().unwrap(), old);
    let told = client.call(cmd::FLUSH, 0, 0, 0, b"").await.unwrap();
    assert_eq!(told, Err(Errno::Io.code()), "the first flush after the loss");
    client.call(cmd::FLUSH, 0, 0, 0, b"").await.unwrap().unwrap();
    client.call(cmd::WRITE, 0, 0, BLOCK, &new).await.unwrap().unwrap();
    client.call(cmd::FLUSH, 0, 0, 0, b"").await.unwrap().unwrap();

    // A kill without a power cut loses nothing, and nobody is told again.
    block_in_place(|| cluster.bounce(Who::Writeback(0))).unwrap();
    let mut client = Connection::open(&socket, "v").await.unwrap();
    client.call(cmd::FLUSH, 0, 0, 0, b"").await.unwrap().unwrap();
    assert_eq!(client.call(cmd::READ, 0, 0, BLOCK, b"").await.unwrap().unwrap(), new);
    cluster.no_panic().unwrap();
}
