//! `endio export`: a volume into a file.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
};

use endio_api::writeback::VolumeRequest;
use serde_json::json;

use super::{
    patience::Patience,
    progress_bar,
    reader::{Piece, read_range},
    sparse::split,
    state::{State, StateFile, sync_directory},
};
use crate::{
    args::ExportArgs,
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, human},
};

/// The command.
pub(crate) async fn run(client: &Client, out: Output, args: ExportArgs) -> Outcome {
    let what = format!("export volume {} to {}", args.volume, args.file.display());
    let mut patience = Patience::new(args.transfer.patience);
    let name = &args.volume;
    let get = || async move { client.volumes().get(VolumeRequest { name: name.clone() }).await };
    let volume = patience.call(client, &format!("show volume {name}"), get).await?;
    let length = volume.size_bytes;
    let state_file = StateFile::at(args.transfer.state.clone(), &args.file, ".endio-export");
    let mut state = State::new("export", name, volume.id, (length, 0));
    let is_resumed = state_file.resume(&mut state)?;
    if is_resumed {
        eprintln!("continuing at {} of {}", human(state.offset), human(length));
    }
    let began_at = state.offset;
    let failed = |error: io::Error| Failure::new(Exit::Failed, what.clone(), error);
    let file = open_target(&args, is_resumed, &state, length)?;
    if !is_resumed {
        // From here on FILE is ours: a second run continues it instead of refusing it.
        state_file.save(&state)?;
    }
    let bar = progress_bar(length, state.offset, "exporting");
    let mut data_bytes = 0;
    while state.offset < length {
        let round = args.transfer.checkpoint.bytes().min(length - state.offset);
        let sink = |piece| {
            bar.set_position(write_piece(&file, piece, &mut data_bytes)?);
            Ok(())
        };
        let patience = args.transfer.patience;
        let outcome = read_range(client, name, state.offset, round, patience, sink).await;
        if let Err(failure) = outcome {
            bar.abandon();
            let help = format!("{}; run the same command again to go on", failure.help);
            return Err(failure.help(help.trim_start_matches("; ").to_owned()));
        }
        file.sync_data().map_err(failed)?;
        state.offset += round;
        state_file.save(&state)?;
    }
    bar.finish_and_clear();
    file.sync_all().map_err(failed)?;
    sync_directory(&args.file).map_err(failed)?;
    state_file.remove()?;
    let value = json!({
        "volume": name, "bytes": length, "resumed_at": began_at, "data_bytes": data_bytes,
    });
    out.print(&value, || {
        format!(
            "exported volume {name}, {}, to {}: {} of data, durable",
            human(length),
            args.file.display(),
            human(data_bytes)
        )
    })
}

/// The file with its full length. What lies beyond the checkpoint is a hole: an earlier run may
/// have left bytes there that the volume has no longer.
fn open_target(args: &ExportArgs, is_resumed: bool, state: &State, length: u64) -> Outcome<File> {
    let what = || format!("write {}", args.file.display());
    let mut options = OpenOptions::new();
    options.write(true);
    match (is_resumed, args.overwrite) {
        (true, _) => {}
        (false, true) => {
            options.create(true).truncate(true);
        }
        (false, false) => {
            options.create_new(true);
        }
    }
    let file = options.open(&args.file).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::new(Exit::Usage, what(), "it exists already")
            .help("replace it with --overwrite"),
        io::ErrorKind::NotFound if is_resumed => {
            Failure::new(Exit::NotFound, what(), "it is gone, but its state file is still there")
                .help("remove the state file to begin from the start")
        }
        _ => Failure::new(Exit::Failed, what(), error),
    })?;
    let cut = || {
        if file.metadata()?.len() < state.offset {
            return Err(io::Error::other("it is shorter than its state file says"));
        }
        file.set_len(state.offset)?;
        file.set_len(length)
    };
    cut().map_err(|error| Failure::new(Exit::Failed, what(), error))?;
    Ok(file)
}

/// Writes what is not zero; the rest of the file is holes. Returns the end of the piece.
fn write_piece(file: &File, piece: Piece, data_bytes: &mut u64) -> io::Result<u64> {
    match piece {
        Piece::Zeroes(offset, length) => Ok(offset + length),
        Piece::Data(offset, data) => {
            for part in split(offset, &data) {
                if let Piece::Data(at, data) = part {
                    *data_bytes += data.len() as u64;
                    file.write_all_at(&data, at)?;
                }
            }
            Ok(offset + data.len() as u64)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

    use clap::Parser as _;
    use endio_types::Reason;

    use super::*;
    use crate::{
        args::{Cli, Command},
        transfer::fake::{Fake, Fault},
    };

    const OUT: Output = Output { json: true };

    fn args(file: &Path, more: &[&str]) -> ExportArgs {
        let line = ["endio", "export", "v1", file.to_str().unwrap(), "--checkpoint", "1MiB"];
        let cli = Cli::try_parse_from(line.iter().chain(more)).unwrap();
        let Command::Export(args) = cli.command else { panic!("parsed as {:?}", cli.command) };
        args
    }

    async fn export(fake: &Fake, args: ExportArgs) -> Outcome {
        let client = Client::new(&fake.url()).unwrap();
        tokio::time::timeout(Duration::from_secs(60), run(&client, OUT, args)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_export_is_equal_and_sparse_although_reads_break_in_the_middle() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("copy.img");
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 8 << 20, 0);
        fake.put("v1", 1_000_000, &[7; 3_000_000]);
        fake.break_reads(&[
            Fault::CutAfterApply,
            Fault::Refuse(Reason::PeerAway),
            Fault::CutBeforeApply,
        ]);
        export(&fake, args(&path, &[])).await.unwrap();
        assert!(fs::read(&path).unwrap() == fake.content("v1"), "the file differs");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 4 << 20, "holes stay holes");
        assert!(!directory.path().join("copy.img.endio-export").exists());
        let failure = export(&fake, args(&path, &[])).await.unwrap_err();
        assert!(failure.help.contains("--overwrite"), "{failure}");
        export(&fake, args(&path, &["--overwrite"])).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_interrupted_export_goes_on_and_forgets_bytes_beyond_its_checkpoint() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("copy.img");
        let fake = Fake::start(vec![]).await;
        fake.create("v1", 4 << 20, 5);
        // The first round and part of the second arrive; then the volume refuses for good.
        fake.break_reads(&[
            Fault::Pass,
            Fault::CutAfterApply,
            Fault::Refuse(Reason::OldGeneration),
        ]);
        export(&fake, args(&path, &[])).await.unwrap_err();
        assert!(directory.path().join("copy.img.endio-export").exists());
        fake.put("v1", 1 << 20, &[0; 3 << 20]);
        fake.put("v1", 0, &[9; 1 << 20]);
        export(&fake, args(&path, &[])).await.unwrap();
        let copy = fs::read(&path).unwrap();
        assert!(copy[..1 << 20].iter().all(|b| *b == 5), "the first round is not read again");
        assert!(copy[1 << 20..].iter().all(|b| *b == 0), "the rest is as it is now");
        assert_eq!(copy.len(), 4 << 20);
    }
}
