//! Commands that change something: volumes, writes, ranges, syncs, load.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use endio_api::{
    conversion::{CreateVolumeRequest, ListVolumesRequest},
    writeback::{
        DeleteRequest, FsyncRequest, OpenRequest, RangeRequest, ResizeRequest, RetryKey,
        SyncAllRequest, VolumeRequest, WriteMode, WriteRequest, io_request::Op,
    },
};
use endio_types::ByteSize;
use serde_json::json;
use tokio::sync::mpsc;

use crate::{
    args::{RangeArgs, VolumeCommand, WriteArgs},
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, human, volume_json, volume_table},
    transfer::{
        patience::Patience,
        pipeline::{Job, Pipeline, Settings, Verdict},
        reader::{Piece, read_range},
    },
};

/// Longest write that becomes visible whole, in bytes: what one request carries.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// A write that makes no progress for so long says what it waits for.
const STALL_LOOK: Duration = Duration::from_secs(3);

/// `endio volume …`
pub(crate) async fn volume(client: &Client, out: Output, command: VolumeCommand) -> Outcome {
    let mut volumes = client.volumes();
    let answer = match command {
        VolumeCommand::List => {
            let answer = volumes.list(ListVolumesRequest {}).await;
            let list = answer.map_err(|e| client.failure("list volumes", &e))?.into_inner().volumes;
            let value = json!({ "volumes": list.iter().map(volume_json).collect::<Vec<_>>() });
            return out.print(&value, || volume_table(&list));
        }
        VolumeCommand::Delete { name } => {
            let answer =
                volumes.delete(DeleteRequest { name: name.clone(), ..<_>::default() }).await;
            answer.map_err(|e| client.failure(format!("delete volume {name}"), &e))?;
            return out.print(&json!({ "deleted": name }), || format!("volume {name} is deleted"));
        }
        VolumeCommand::Close { name } => {
            let answer = volumes.close(VolumeRequest { name: name.clone() }).await;
            answer.map_err(|e| client.failure(format!("close volume {name}"), &e))?;
            return out.print(&json!({ "closed": name }), || format!("volume {name} is closed"));
        }
        VolumeCommand::Create { name, size, replicas, in_place, growable } => {
            let request = CreateVolumeRequest {
                name: name.clone(),
                size_bytes: size.bytes(),
                replicas,
                in_place,
                growable,
                as_of: None,
            };
            volumes.create(request).await.map_err(|e| (format!("create volume {name}"), e))
        }
        VolumeCommand::Show { name } => {
            let what = format!("show volume {name}");
            volumes.get(VolumeRequest { name }).await.map_err(|e| (what, e))
        }
        VolumeCommand::Resize { name, size } => {
            let what = format!("resize volume {name} to {size}");
            let request = ResizeRequest { name, size_bytes: size.bytes(), ..<_>::default() };
            volumes.resize(request).await.map_err(|e| (what, e))
        }
        VolumeCommand::Open { name, force } => {
            let what = format!("open volume {name}");
            volumes.open(OpenRequest { name, force }).await.map_err(|e| (what, e))
        }
    };
    let volume = answer.map_err(|(what, e)| client.failure(what, &e))?.into_inner();
    out.print(&volume_json(&volume), || volume_table(std::slice::from_ref(&volume)))
}

/// `endio write`: standard input in requests of up to 1 MiB, retried like an import.
pub(crate) async fn write(client: &Client, out: Output, args: WriteArgs) -> Outcome {
    let mode = if args.direct { WriteMode::Direct } else { WriteMode::Buffered };
    let what = format!("write to volume {} at {}", args.volume, args.offset);
    let (sender, mut jobs) = mpsc::channel(2);
    let (volume, start, dsync) = (args.volume.clone(), args.offset.bytes(), args.dsync);
    let traceparent = if args.trace { sampled_parent() } else { String::new() };
    // Standard input may block for ever, so its thread is not waited for at the end.
    std::thread::spawn(move || {
        let mut offset = start;
        loop {
            let piece = read_input(REQUEST_BYTES_MAX);
            let job = match piece {
                Ok(data) if data.is_empty() => return,
                Ok(data) => {
                    let length = data.len() as u64;
                    let request = WriteRequest {
                        volume: volume.clone(),
                        offset_bytes: offset,
                        data,
                        mode: mode.into(),
                        dsync,
                        traceparent: traceparent.clone(),
                        ..WriteRequest::default()
                    };
                    offset = offset.saturating_add(length);
                    Ok(Job { op: Op::Write(request), bytes: length })
                }
                Err(error) => Err(Failure::new(Exit::Failed, "read standard input", error)),
            };
            if sender.blocking_send(job).is_err() {
                return;
            }
        }
    });
    let settings = Settings { depth: 8, patience: args.patience, what };
    let mut pipeline = Pipeline::new(client.clone(), settings);
    let progress = AtomicU64::new(0);
    let verdict = {
        let run = pipeline.run(&mut jobs, |bytes| {
            progress.fetch_add(bytes, Ordering::Relaxed);
        });
        tokio::pin!(run);
        let (mut told, mut before) = (BTreeSet::new(), 0);
        loop {
            tokio::select! {
                biased;
                verdict = &mut run => break verdict?,
                () = tokio::time::sleep(STALL_LOOK) => {
                    let now = progress.load(Ordering::Relaxed);
                    if std::mem::replace(&mut before, now) == now {
                        tell_blocked(client, &args.volume, &mut told).await;
                    }
                }
            }
        }
    };
    let written = progress.into_inner();
    if let Verdict::Repeat(failure) = verdict {
        return Err(failure);
    }
    let trace = pipeline.last_trace_id().to_owned();
    let value = json!({ "written_bytes": written, "trace_id": trace });
    out.print(&value, || {
        let hint =
            if trace.is_empty() { String::new() } else { format!("; see `endio trace {trace}`") };
        format!("wrote {} to {} at {}{hint}", human(written), args.volume, args.offset)
    })
}

/// A new W3C traceparent that says "sampled": every service does as the caller has decided.
fn sampled_parent() -> String {
    format!("00-{:032x}-{:016x}-01", rand::random::<u128>(), rand::random::<u64>())
}

/// Says on stderr, once each, what keeps a volume's writes from going on.
async fn tell_blocked(client: &Client, volume: &str, told: &mut BTreeSet<String>) {
    // A service that does not answer is told by the pipeline.
    let Ok(status) = crate::status::ask(client).await else { return };
    let of_volume = format!("volume {volume}");
    for blocked in status.blocked {
        let concerns = !blocked.what.starts_with("volume ") || blocked.what == of_volume;
        let line = format!("waiting: {}: {}", blocked.what, blocked.message);
        if concerns && told.insert(line.clone()) {
            eprintln!("{line}");
        }
    }
}

fn read_input(most: usize) -> std::io::Result<Bytes> {
    let mut data = Vec::new();
    std::io::stdin().lock().take(most as u64).read_to_end(&mut data)?;
    Ok(data.into())
}

/// `endio read`: bytes to standard output; holes as zeroes.
pub(crate) async fn read(client: &Client, args: &RangeArgs) -> Outcome {
    let mut out = std::io::stdout().lock();
    let zeroes = vec![0; 64 << 10];
    let sink = |piece: Piece| match piece {
        Piece::Data(_, data) => out.write_all(&data),
        Piece::Zeroes(_, mut length) => {
            while length > 0 {
                let part = length.min(zeroes.len() as u64);
                out.write_all(&zeroes[..usize::try_from(part).unwrap_or(zeroes.len())])?;
                length -= part;
            }
            Ok(())
        }
    };
    let (offset, length) = (args.offset.bytes(), args.length.bytes());
    read_range(client, &args.volume, offset, length, args.patience, sink).await?;
    out.flush().map_err(|error| Failure::new(Exit::Failed, "write standard output", error))
}

/// `endio fsync`
pub(crate) async fn fsync(
    client: &Client,
    out: Output,
    volume: String,
    patience: Duration,
) -> Outcome {
    let what = format!("fsync volume {volume}");
    let call = || {
        let (mut io, volume) = (client.io(), volume.clone());
        async move { io.fsync(FsyncRequest { volume, may_log: false, ..Default::default() }).await }
    };
    let waited = Patience::new(patience).call(client, &what, call).await?.waited_for;
    out.print(&json!({ "volume": volume, "waited_for": waited }), || {
        format!("volume {volume} is durable (waited for {waited} writes)")
    })
}

/// `endio sync`
pub(crate) async fn sync(client: &Client, out: Output) -> Outcome {
    let answer = client.io().sync_all(SyncAllRequest {}).await;
    let waited =
        answer.map_err(|e| client.failure("sync all volumes", &e))?.into_inner().waited_for;
    out.print(&json!({ "waited_for": waited }), || {
        format!("every volume is durable (waited for {waited} writes)")
    })
}

/// `endio trim|zero|allocate`
pub(crate) async fn range(
    client: &Client,
    out: Output,
    args: RangeArgs,
    verb: &'static str,
) -> Outcome {
    let request = RangeRequest {
        volume: args.volume.clone(),
        offset_bytes: args.offset.bytes(),
        length_bytes: args.length.bytes(),
        ..RangeRequest::default()
    };
    let what = format!("{verb} {} at {} of volume {}", args.length, args.offset, args.volume);
    // The same session and number with each try: it is applied once.
    let session = Bytes::copy_from_slice(&rand::random::<[u8; 16]>());
    let mut is_retry = false;
    let call = || {
        let retry = RetryKey { session: session.clone(), sequence: 1, is_retry };
        is_retry = true;
        let request = RangeRequest { retry: Some(retry), ..request.clone() };
        let mut io = client.io();
        async move {
            match verb {
                "trim" => io.trim(request).await,
                "zero" => io.write_zeroes(request).await,
                _ => io.allocate(request).await,
            }
        }
    };
    let changed = Patience::new(args.patience).call(client, &what, call).await?.blocks_changed;
    out.print(&json!({ "volume": args.volume, "blocks_changed": changed }), || {
        format!("{verb}: {changed} blocks changed")
    })
}

/// `endio bench`
pub(crate) async fn bench(client: &Client, out: Output, options: endio_bench::Options) -> Outcome {
    let what = format!("bench volume {}", options.volume);
    if let Some(size) = options.create {
        let ByteSize(size_bytes) = size;
        let name = options.volume.clone();
        let request =
            CreateVolumeRequest { name, size_bytes, replicas: 1, ..CreateVolumeRequest::default() };
        client
            .volumes()
            .create(request)
            .await
            .map_err(|e| client.failure(format!("create volume {}", options.volume), &e))?;
    }
    let name = options.volume.clone();
    let volume = client.volumes().get(VolumeRequest { name }).await;
    let size = volume.map_err(|e| client.failure(what.clone(), &e))?.into_inner().size_bytes;
    let mut channels = Vec::new();
    for _ in 0..options.connections {
        channels.push(client.another()?.channel());
    }
    let report = endio_bench::run(channels, &options, size).await.map_err(|error| match error {
        endio_bench::BenchError::Usage(message) => Failure::new(Exit::Usage, what.clone(), message),
        endio_bench::BenchError::Call(status) => client.failure(what.clone(), &status),
        other => Failure::new(Exit::Failed, what.clone(), other),
    })?;
    out.print(&report.json(), || report.to_string())?;
    if report.mismatches > 0 {
        let message = format!("{} blocks do not hold what was acknowledged", report.mismatches);
        return Err(Failure::new(Exit::DataLoss, what, message));
    }
    if report.failed > 0 {
        let message = format!("{} requests failed: {}", report.failed, report.first_error);
        return Err(Failure::new(Exit::Failed, what, message));
    }
    Ok(())
}
