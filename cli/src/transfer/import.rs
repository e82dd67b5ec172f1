//! `endio import`: a file into a volume.

use std::{
    fs::File,
    io::{Seek as _, SeekFrom},
    ops::Range,
    sync::Arc,
    time::UNIX_EPOCH,
};

use bytes::Bytes;
use endio_api::{
    common::ExtentState,
    conversion::{CreateVolumeRequest, Volume},
    writeback::{
        ExtentsRequest, OpenRequest, RangeRequest, VolumeRequest, WriteMode, WriteRequest,
        io_request::Op,
    },
};
use endio_types::{BLOCK_BYTES, Reason};
use serde_json::json;
use tokio::sync::mpsc;
use tonic::Response;

use super::{
    patience::Patience,
    pipeline::{Job, Pipeline, Settings, Verdict},
    progress_bar,
    reader::Piece,
    sparse,
    state::{State, StateFile},
};
use crate::{
    args::ImportArgs,
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, human},
};

/// Times that one round is sent before its error is told.
const ROUND_TRIES_MAX: u32 = 8;

/// The command.
pub(crate) async fn run(client: &Client, out: Output, args: ImportArgs) -> Outcome {
    let what = format!("import {} into volume {}", args.file.display(), args.volume);
    let (file, length, modified_ns) = open_source(&args)?;
    let mut patience = Patience::new(args.transfer.patience);
    let volume = find_volume(client, &args, length, &mut patience).await?;
    if volume.size_bytes < length && !volume.growable {
        let message = format!("the volume has {} bytes, the file {length}", volume.size_bytes);
        return Err(Failure::new(Exit::Usage, what, message).help(format!(
            "`endio volume resize {} --size {}`",
            args.volume,
            round_up(length)
        )));
    }
    let state_file = StateFile::at(args.transfer.state.clone(), &args.file, ".endio-import");
    let mut state = State::new("import", &args.volume, volume.id, (length, modified_ns));
    if state_file.resume(&mut state)? {
        eprintln!("continuing at {} of {}", human(state.offset), human(length));
    }
    let began_at = state.offset;
    let settings = Settings {
        depth: args.transfer.depth.into(),
        patience: args.transfer.patience,
        what: what.clone(),
    };
    let mut import = Import {
        client: client.clone(),
        pipeline: Pipeline::new(client.clone(), settings),
        file: Arc::new(file),
        length,
        volume: args.volume.clone(),
        sent: Sent::default(),
    };
    let bar = progress_bar(length, state.offset, "importing");
    while state.offset < length {
        let end = (state.offset + args.transfer.checkpoint.bytes()).min(length);
        let outcome = import.round(state.offset..end).await;
        if let Err(failure) = outcome {
            bar.abandon();
            let help = format!("{}; run the same command again to go on", failure.help);
            return Err(failure.help(help.trim_start_matches("; ").to_owned()));
        }
        state.offset = end;
        state.session = import.pipeline.session_hex();
        state_file.save(&state)?;
        bar.set_position(end);
    }
    bar.finish_and_clear();
    let (_, length_now, modified_now) = open_source(&args)?;
    if (length_now, modified_now) != (length, modified_ns) {
        let message = "the file was changed while it was read, so the copy may mix old and new";
        return Err(Failure::new(Exit::Failed, what, message)
            .help(format!("remove {} and import again", state_file.path().display())));
    }
    state_file.remove()?;
    let Sent { data_bytes, trimmed_bytes } = import.sent;
    let value = json!({
        "volume": args.volume, "bytes": length, "resumed_at": began_at,
        "data_bytes": data_bytes, "trimmed_bytes": trimmed_bytes,
    });
    out.print(&value, || {
        format!(
            "imported {} into volume {}: {} of data sent, durable",
            human(length),
            args.volume,
            human(data_bytes)
        )
    })
}

/// The file, its length and when it was changed (0 for a device).
fn open_source(args: &ImportArgs) -> Outcome<(File, u64, u64)> {
    let what = || format!("read {}", args.file.display());
    let failed = |error: std::io::Error| {
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        Failure::new(if missing { Exit::NotFound } else { Exit::Failed }, what(), error)
    };
    let mut file = File::open(&args.file).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(Failure::new(Exit::Usage, what(), "it is a directory"));
    }
    // A block device has no length of its own, but its end can be sought.
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if !metadata.is_file() {
        return Ok((file, length, 0));
    }
    let modified = metadata.modified().map_err(failed)?;
    let modified = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    Ok((file, length, u64::try_from(modified).unwrap_or(u64::MAX)))
}

fn round_up(length: u64) -> u64 {
    length.next_multiple_of(BLOCK_BYTES).max(BLOCK_BYTES)
}

async fn find_volume(
    client: &Client,
    args: &ImportArgs,
    length: u64,
    patience: &mut Patience,
) -> Outcome<Volume> {
    let name = &args.volume;
    let get = || async move { client.volumes().get(VolumeRequest { name: name.clone() }).await };
    let found = patience.call(client, &format!("show volume {name}"), get).await;
    match found {
        Err(failure) if failure.reason == Some(Reason::UnknownVolume) => {
            if !args.create {
                return Err(failure.help(format!(
                    "create it with --create, or `endio volume create {name} --size {}`",
                    round_up(length)
                )));
            }
        }
        other => return other,
    }
    let request = CreateVolumeRequest {
        name: name.clone(),
        size_bytes: round_up(length),
        replicas: args.replicas,
        ..CreateVolumeRequest::default()
    };
    let create = || {
        let request = request.clone();
        async move { client.volumes().create(request).await }
    };
    patience.call(client, &format!("create volume {name}"), create).await
}

#[derive(Clone, Copy, Default)]
struct Sent {
    data_bytes: u64,
    trimmed_bytes: u64,
}

/// What the volume has where a range of the file goes.
struct Target {
    /// Where it ends now.
    size_bytes: u64,
    /// Ranges of it that are no holes, ascending, none beyond its end.
    occupied: Vec<Range<u64>>,
}

struct Import {
    client: Client,
    pipeline: Pipeline,
    file: Arc<File>,
    length: u64,
    volume: String,
    sent: Sent,
}

impl Import {
    /// Sends a range of the file and makes it durable; again from its start if acknowledged parts
    /// may be gone.
    async fn round(&mut self, range: Range<u64>) -> Outcome {
        for attempt in 1.. {
            let failure = match self.send(range.clone()).await? {
                Verdict::Repeat(failure) => failure,
                Verdict::Done => match self.pipeline.fsync(&self.volume).await? {
                    Verdict::Done => return Ok(()),
                    Verdict::Repeat(failure) => failure,
                },
            };
            if attempt == ROUND_TRIES_MAX {
                return Err(failure);
            }
            eprintln!("sending {} again from {}: {failure}", self.volume, human(range.start));
        }
        Ok(())
    }

    async fn send(&mut self, range: Range<u64>) -> Outcome<Verdict> {
        let Target { size_bytes, occupied } = self.target(range.clone()).await?;
        // A growable volume becomes as long as the file by what is written to it last. A hole writes
        // nothing.
        let must_reach_end = range.end == self.length && size_bytes < self.length;
        let (sender, mut jobs) = mpsc::channel(4);
        let (file, volume) = (Arc::clone(&self.file), self.volume.clone());
        let reader = tokio::task::spawn_blocking(move || {
            let mut sent = Sent::default();
            let mut ends_in_zeroes = false;
            let scanned = sparse::scan(&file, range.start, range.end, |piece| {
                ends_in_zeroes = matches!(piece, Piece::Zeroes(..));
                jobs_of(piece, &occupied, &volume, &mut sent)
                    .into_iter()
                    .all(|job| sender.blocking_send(Ok(job)).is_ok())
            });
            match scanned {
                Ok(()) if must_reach_end && ends_in_zeroes => {
                    let _ = sender.blocking_send(Ok(write_of(&volume, range.end - 1, ZERO)));
                }
                Ok(()) => {}
                Err(error) => {
                    let failure = Failure::new(Exit::Failed, "read the file", error);
                    let _ = sender.blocking_send(Err(failure));
                }
            }
            sent
        });
        let verdict = self.pipeline.run(&mut jobs, |_| {}).await?;
        drop(jobs);
        let sent = reader.await.unwrap_or_default();
        self.sent.data_bytes += sent.data_bytes;
        self.sent.trimmed_bytes += sent.trimmed_bytes;
        Ok(verdict)
    }

    /// What the volume has in a range now.
    async fn target(&mut self, range: Range<u64>) -> Outcome<Target> {
        let client = self.client.clone();
        let what = format!("open volume {}", self.volume);
        let request = OpenRequest { name: self.volume.clone(), force: false };
        // Where a growable volume ends is known for sure only where it is open.
        let open = || {
            let (client, request) = (client.clone(), request.clone());
            async move { client.volumes().open(request).await }
        };
        let size_bytes = self.pipeline.patience().call(&client, &what, open).await?.size_bytes;
        let occupied = match range.start..range.end.min(size_bytes) {
            // Behind the end nothing is to be freed, and a question about it is refused.
            behind if behind.is_empty() => Vec::new(),
            within => self.occupied(within).await?,
        };
        Ok(Target { size_bytes, occupied })
    }

    /// Parts of a range that are no holes, ascending. The range is not empty and within the volume.
    async fn occupied(&mut self, range: Range<u64>) -> Outcome<Vec<Range<u64>>> {
        let what = format!("show the extents of volume {}", self.volume);
        let request = ExtentsRequest {
            volume: self.volume.clone(),
            offset_bytes: range.start,
            length_bytes: range.end - range.start,
        };
        let client = self.client.clone();
        let ask = || {
            let (client, request) = (client.clone(), request.clone());
            let limit = range.end;
            async move {
                let mut batches = client.inspect().extents(request).await?.into_inner();
                let mut occupied: Vec<Range<u64>> = Vec::new();
                while let Some(batch) = batches.message().await? {
                    for extent in batch.extents {
                        let start = extent.lblk.saturating_mul(BLOCK_BYTES);
                        let end = start.saturating_add(u64::from(extent.blocks) * BLOCK_BYTES);
                        // The last block of a growable volume may be shorter than a block.
                        let end = end.min(limit);
                        let is_hole = extent.state == i32::from(ExtentState::Hole);
                        match occupied.last_mut() {
                            _ if is_hole => {}
                            Some(last) if last.end == start => last.end = end,
                            _ => occupied.push(start..end),
                        }
                    }
                }
                Ok(Response::new(occupied))
            }
        };
        self.pipeline.patience().call(&client, &what, ask).await
    }
}

/// What is written where nothing but the length of the volume is to change.
const ZERO: Bytes = Bytes::from_static(&[0]);

fn write_of(volume: &str, offset_bytes: u64, data: Bytes) -> Job {
    let bytes = data.len() as u64;
    let request = WriteRequest {
        volume: volume.into(),
        offset_bytes,
        data,
        mode: WriteMode::Buffered.into(),
        ..WriteRequest::default()
    };
    Job { op: Op::Write(request), bytes }
}

/// Requests that make the volume hold a piece: a write, or trims where it is no hole yet.
fn jobs_of(piece: Piece, occupied: &[Range<u64>], volume: &str, sent: &mut Sent) -> Vec<Job> {
    let (start, length) = match piece {
        Piece::Data(offset_bytes, data) => {
            sent.data_bytes += data.len() as u64;
            return vec![write_of(volume, offset_bytes, data)];
        }
        Piece::Zeroes(start, length) => (start, length),
    };
    let end = start + length;
    let first = occupied.partition_point(|range| range.end <= start);
    let mut jobs = Vec::new();
    for range in occupied[first..].iter().take_while(|range| range.start < end) {
        let (from, to) = (range.start.max(start), range.end.min(end));
        sent.trimmed_bytes += to - from;
        let request = RangeRequest {
            volume: volume.into(),
            offset_bytes: from,
            length_bytes: to - from,
            ..RangeRequest::default()
        };
        jobs.push(Job { op: Op::Trim(request), bytes: to - from });
    }
    jobs
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs,
        os::unix::fs::FileExt as _,
        path::{Path, PathBuf},
        time::Duration,
    };

    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        transfer::fake::{Fake, Fault},
    };

    const OUT: Output = Output { json: true };

    fn args(file: &Path, more: &[&str]) -> ImportArgs {
        let file = file.to_str().unwrap();
        let line = ["endio", "import", "v1", file, "--checkpoint", "1MiB", "--depth", "4"];
        let cli = Cli::try_parse_from(line.iter().chain(more)).unwrap();
        let Command::Import(args) = cli.command else { panic!("parsed as {:?}", cli.command) };
        args
    }

    /// 3 MiB and a bit: data, zero blocks inside data, a hole, and a short last block.
    fn source(directory: &Path) -> (PathBuf, Vec<u8>) {
        let path = directory.join("disk.img");
        let file = File::create(&path).unwrap();
        let data: Vec<u8> = (0..1_500_000u32).map(|i| (i % 251) as u8 + 1).collect();
        file.write_all_at(&data, 0).unwrap();
        file.write_all_at(&[0; 40_960], 409_600).unwrap();
        file.write_all_at(b"the end", (3 << 20) + 5).unwrap();
        (path.clone(), fs::read(&path).unwrap())
    }

    async fn import(fake: &Fake, args: ImportArgs) -> Outcome {
        let client = Client::new(&fake.url()).unwrap();
        tokio::time::timeout(Duration::from_secs(60), run(&client, OUT, args)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_import_copies_data_and_frees_what_the_file_does_not_have() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = source(directory.path());
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 4 << 20, 0xAA);
        import(&fake, args(&path, &[])).await.unwrap();
        let content = fake.durable("v1");
        assert!(content[..bytes.len()] == bytes[..], "the volume differs from the file");
        assert!(content[bytes.len()..].iter().all(|b| *b == 0xAA), "beyond the file stays");
        assert!(!directory.path().join("disk.img.endio-import").exists());
        fake.assert_each_sequence_applied_once();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_import_creates_the_volume_only_when_asked_and_skips_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = source(directory.path());
        let fake = Fake::start(vec![]).await;
        let failure = import(&fake, args(&path, &[])).await.unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(failure.help.contains("--create"));
        import(&fake, args(&path, &["--create"])).await.unwrap();
        let content = fake.durable("v1");
        assert_eq!(content.len() as u64, round_up(bytes.len() as u64));
        assert!(content[..bytes.len()] == bytes[..], "the volume differs from the file");
        assert_eq!(fake.trims(), 0, "holes of a new volume need no trim");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_import_finishes_through_cut_streams_and_refusals() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = source(directory.path());
        let fake = Fake::start(vec![
            Fault::CutBeforeApply,
            Fault::Refuse(Reason::Limit),
            Fault::CutAfterApply,
            Fault::Refuse(Reason::NotEnoughStores),
            Fault::Refuse(Reason::PeerAway),
            Fault::CutAfterApply,
        ])
        .await;
        fake.create("v1", 4 << 20, 0xAA);
        import(&fake, args(&path, &[])).await.unwrap();
        assert!(fake.durable("v1")[..bytes.len()] == bytes[..], "the volume differs");
        assert!(fake.duplicates() > 0, "a cut after applying makes a duplicate");
        assert_eq!(fake.faults_left(), 0);
        fake.assert_each_sequence_applied_once();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn lost_writes_are_sent_again_from_the_last_checkpoint() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = source(directory.path());
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 4 << 20, 0xAA);
        fake.lose_at_fsync(&[2, 4]);
        import(&fake, args(&path, &[])).await.unwrap();
        assert!(fake.durable("v1")[..bytes.len()] == bytes[..], "the volume differs");
        assert_eq!(fake.fsyncs(), 4 + 2, "one for each round, and one more for each loss");
        fake.assert_each_sequence_applied_once();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_interrupted_import_goes_on_where_it_was_durable() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = source(directory.path());
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 4 << 20, 0xAA);
        fake.break_for_good_at_fsync(2);
        let failure = import(&fake, args(&path, &["--patience", "300ms"])).await.unwrap_err();
        assert!(failure.help.contains("run the same command again"), "{failure}");
        let state = directory.path().join("disk.img.endio-import");
        assert!(fs::read_to_string(&state).unwrap().contains("\"offset\": 1048576"));
        fake.mend();
        let before = fake.written_bytes();
        import(&fake, args(&path, &[])).await.unwrap();
        assert!(fake.durable("v1")[..bytes.len()] == bytes[..], "the volume differs");
        assert!(fake.written_bytes() - before < 1 << 20, "the first round is not sent again");
        assert!(!state.exists());
        fake.assert_each_sequence_applied_once();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_volume_that_is_too_small_is_refused_before_anything_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = source(directory.path());
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 1 << 20, 0xAA);
        let failure = import(&fake, args(&path, &[])).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(fake.written_bytes(), 0);
    }

    /// A file of that length with only these bytes of it written; the rest is a hole.
    fn sparse_file(directory: &Path, length: u64, data: &[(u64, u64)]) -> PathBuf {
        let path = directory.join("sparse.img");
        let file = File::create(&path).unwrap();
        file.set_len(length).unwrap();
        for (start, end) in data {
            let bytes = vec![0x55; usize::try_from(end - start).unwrap()];
            file.write_all_at(&bytes, *start).unwrap();
        }
        path
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_growable_volume_holds_the_file_and_nothing_older_after_an_import() {
        const MIB: u64 = 1 << 20;
        // Size of the volume, length of the file, where it has data.
        type Trimmed = &'static [(u64, u64)];
        let cases: [(usize, u64, Trimmed); 7] = [
            // The volume ends inside a round and at its edge; the file has a hole at either end.
            (1_500_000, 3 * MIB + 5, &[(0, 4096), (2 * MIB, 2 * MIB + 9)]),
            (1 << 20, 3 * MIB, &[(MIB, MIB + 4096)]),
            // No whole number of blocks, on either side.
            (10_000, 20_000, &[(0, 4096), (16_384, 20_000)]),
            (20_000, 10_000, &[(0, 4096)]),
            (10_000, 12_000, &[]),
            (0, 2 * MIB + 1, &[]),
            (0, 10_000, &[(8_192, 10_000)]),
        ];
        for (size, length, data) in cases {
            let directory = tempfile::tempdir().unwrap();
            let path = sparse_file(directory.path(), length, data);
            let fake = Fake::start(vec![]).await;
            fake.create_growable("v1", size, 0xAA);
            import(&fake, args(&path, &[])).await.unwrap();
            let (content, file) = (fake.durable("v1"), fs::read(&path).unwrap());
            assert_eq!(content.len(), size.max(file.len()), "{size} {length}");
            assert!(content[..file.len()] == file[..], "{size} {length}: the volume differs");
            assert!(content[file.len()..].iter().all(|byte| *byte == 0xAA), "{size} {length}");
            fake.assert_each_sequence_applied_once();
        }
    }

    #[test]
    fn only_the_occupied_parts_of_zeroes_are_trimmed() {
        let occupied = [0..4096, 8192..16384, 20480..24576, 40960..45056];
        let mut sent = Sent::default();
        let jobs = jobs_of(Piece::Zeroes(12288, 20480), &occupied, "v", &mut sent);
        let ranges: Vec<(u64, u64)> = jobs
            .iter()
            .map(|job| match &job.op {
                Op::Trim(range) => (range.offset_bytes, range.length_bytes),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ranges, [(12288, 4096), (20480, 4096)]);
        assert_eq!(sent.trimmed_bytes, 8192);
        assert!(jobs_of(Piece::Zeroes(4096, 4096), &occupied, "v", &mut sent).is_empty());
    }
}
