//! A file system image goes in, services die, and the same image comes out.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::ensure;
use endio_crash_tests::{IMAGE_BYTES, Image, fsck, same_bytes, text};
use endio_testkit::cluster::{Background, Cluster, Options, Who};
use endio_testkit::seed;

const PATIENCE: Duration = Duration::from_secs(240);

fn image(directory: &Path, mib: u64, test: &str) -> anyhow::Result<Option<Image>> {
    let seed = seed::announce("endio-crash-tests", test);
    Image::make(directory, seed::number("ENDIO_IMAGE_MIB", mib), seed)
}

fn options(stores: usize) -> Options {
    Options { stores, capacity: "2GiB".to_owned(), ..Options::default() }
}

fn create(cluster: &Cluster, volume: &str, replicas: &str) -> anyhow::Result<()> {
    let size = IMAGE_BYTES.to_string();
    let args = ["volume", "create", volume, "--size", &size, "--replicas", replicas];
    cluster.endio_ok(&args).map(drop)
}

fn start_import(cluster: &Cluster, volume: &str, image: &Image) -> anyhow::Result<Background> {
    let args = ["import", volume, text(&image.path)?, "--depth", "4", "--checkpoint", "8MiB"];
    let stderr = cluster.dir().join(format!("import-{volume}.stderr"));
    Background::start(cluster.cli(&args)?, stderr)
}

/// Exports the volume, and insists on the same bytes and a clean file system.
fn comes_back(cluster: &Cluster, volume: &str, image: &Image) -> anyhow::Result<()> {
    let copy = cluster.dir().join(format!("{volume}.copy"));
    cluster.endio_ok(&["export", volume, text(&copy)?])?;
    same_bytes(&image.path, &copy)?;
    fsck(&copy)?;
    std::fs::remove_file(copy)?;
    Ok(())
}

fn is_thin(cluster: &Cluster, volume: &str, image: &Image) -> anyhow::Result<()> {
    let shown = cluster.endio_ok(&["--json", "volume", "show", volume])?;
    let shown: serde_json::Value = serde_json::from_str(shown.trim())?;
    let mapped = shown["mapped_blocks"].as_u64().expect("a number of blocks") * 4096;
    let data = image.data_bytes()?;
    let limit = data + data / 10 + (16 << 20);
    ensure!(mapped > 0 && mapped <= limit, "{mapped} bytes mapped for {data} bytes of data");
    Ok(())
}

/// Promises 1 and 2 with programs nobody here wrote, over the death of everything.
#[test]
fn import_survives_kill_everything() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let Some(image) = image(directory.path(), 150, "import_survives_kill_everything")? else {
        return Ok(());
    };
    let mut cluster = Cluster::start(options(1))?;
    create(&cluster, "vol1", "1")?;
    let began = Instant::now();
    cluster.endio_ok(&["import", "vol1", text(&image.path)?])?;
    cluster.endio_ok(&["fsync", "vol1"])?;
    eprintln!("imported {} MiB in {:?}", image.data_bytes()? >> 20, began.elapsed());
    cluster.kill_all();
    cluster.start_all()?;
    comes_back(&cluster, "vol1", &image)?;
    cluster.endio_ok(&["check"])?;
    is_thin(&cluster, "vol1", &image)?;
    Ok(cluster.no_panic()?)
}

/// Each service in turn is killed in the middle of an import, which notices nothing but the time.
#[test]
fn import_survives_each_service_being_killed_in_turn() -> anyhow::Result<()> {
    let test = "import_survives_each_service_being_killed_in_turn";
    let directory = tempfile::tempdir()?;
    let Some(image) = image(directory.path(), 48, test)? else { return Ok(()) };
    let mut cluster = Cluster::start(options(1))?;
    let mut turns = cluster.everyone().into_iter().cycle();
    let mut kills = 0;
    for round in 0..4 {
        let volume = format!("vol{round}");
        create(&cluster, &volume, "1")?;
        let mut import = start_import(&cluster, &volume, &image)?;
        for _ in 0..20 {
            sleep(Duration::from_millis(700));
            if import.is_over()? {
                break;
            }
            let who = turns.next().expect("a cycle has no end");
            cluster.bounce(who)?;
            kills += usize::from(!import.is_over()?);
        }
        import.finish(PATIENCE)?;
        comes_back(&cluster, &volume, &image)?;
        if kills >= 3 {
            break;
        }
    }
    eprintln!("{kills} kills fell into an import");
    ensure!(kills >= 3, "only {kills} kills fell into an import: ENDIO_IMAGE_MIB is too small");
    cluster.endio_ok(&["check"])?;
    Ok(cluster.no_panic()?)
}

fn wait_until_some_is_imported(import: &mut Background, cluster: &Cluster) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stores = cluster.endio_ok(&["--json", "stores"])?;
        let is_mapped = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let stores = line["stores"].as_array().cloned().unwrap_or_else(|| vec![line]);
            stores.iter().any(|store| store["mapped_blocks"].as_u64().unwrap_or(0) > 256)
        };
        if stores.lines().any(is_mapped) {
            break;
        }
        ensure!(!import.is_over()?, "the import was over too soon:\n{}", import.said());
        ensure!(Instant::now() < deadline, "nothing was imported:\n{stores}\n{}", import.said());
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Kills the second of two stores for good in the middle of an import with two replicas.
fn one_of_two_dies(waits: bool, test: &str) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let Some(image) = image(directory.path(), 32, test)? else { return Ok(()) };
    let mut cluster = Cluster::start(options(2))?;
    create(&cluster, "vol1", "2")?;
    let mut import = start_import(&cluster, "vol1", &image)?;
    wait_until_some_is_imported(&mut import, &cluster)?;
    cluster.process(Who::Store(1)).kill();
    if waits {
        let deadline = Instant::now() + PATIENCE;
        let words = ["NOT_ENOUGH_STORES", "not enough stores", "fewer live stores"];
        while !words.iter().any(|word| import.said().contains(word)) {
            ensure!(!import.is_over()?, "it ended instead of waiting:\n{}", import.said());
            ensure!(Instant::now() < deadline, "it does not say why it waits:\n{}", import.said());
            sleep(Duration::from_millis(50));
        }
    }
    cluster.add_store()?;
    import.finish(PATIENCE)?;
    cluster.endio_ok(&["fsync", "vol1"])?;
    comes_back(&cluster, "vol1", &image)?;
    cluster.endio_ok(&["check", "--no-data"])?;
    Ok(cluster.no_panic()?)
}

/// Promise 1 with replicas: one store of two is gone for good and a third takes its place.
#[test]
fn import_finishes_when_a_store_dies_for_good_and_a_third_registers() -> anyhow::Result<()> {
    one_of_two_dies(false, "import_finishes_when_a_store_dies_for_good_and_a_third_registers")
}

/// With too few stores an import waits, says why, and goes on as soon as it can (promise 6).
#[test]
fn import_with_too_few_stores_says_so_and_waits() -> anyhow::Result<()> {
    one_of_two_dies(true, "import_with_too_few_stores_says_so_and_waits")
}

/// Imports a file of that length, with data only in one range, into a growable volume of `size` bytes of
/// 0xAA: the file's bytes are what is there afterwards, and beyond them what was there before.
fn into_a_growable_volume(
    cluster: &Cluster,
    volume: &str,
    size: usize,
    length: u64,
    data: (u64, usize),
) -> anyhow::Result<()> {
    let (old, new) = (cluster.dir().join("old.img"), cluster.dir().join("new.img"));
    std::fs::write(&old, vec![0xAA; size])?;
    let file = std::fs::File::create(&new)?;
    file.set_len(length)?;
    file.write_all_at(&vec![0x55; data.1], data.0)?;
    cluster.endio_ok(&["volume", "create", volume, "--size", &size.to_string(), "--growable"])?;
    cluster.endio_ok(&["import", volume, text(&old)?])?;
    cluster.endio_ok(&["import", volume, text(&new)?, "--checkpoint", "1MiB"])?;
    let copy = cluster.dir().join(format!("{volume}.copy"));
    cluster.endio_ok(&["export", volume, text(&copy)?])?;
    let (file, copy) = (std::fs::read(&new)?, std::fs::read(&copy)?);
    ensure!(copy.len() == size.max(file.len()), "{volume} has {} bytes", copy.len());
    let differs = file.iter().zip(&copy).position(|(file, copy)| file != copy);
    ensure!(differs.is_none(), "{volume} differs from the file at {differs:?}");
    let stays = copy.iter().skip(file.len()).all(|byte| *byte == 0xAA);
    ensure!(stays, "{volume} was changed beyond the file");
    Ok(())
}

/// Holes of the file free what a growable volume had there, and make it as long as the file all the same.
#[test]
fn a_growable_volume_holds_the_file_and_nothing_older_after_an_import() -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    let cluster = Cluster::start(options(1))?;
    // The volume ends inside a round of the import, and a hole follows; the file ends with one.
    into_a_growable_volume(&cluster, "longer", 1_500_000, 3 * MIB + 5, (2 * MIB, 9))?;
    into_a_growable_volume(&cluster, "shorter", 20_000, 10_000, (0, 4_096))?;
    into_a_growable_volume(&cluster, "unaligned", 10_000, 20_000, (16_384, 3_616))?;
    into_a_growable_volume(&cluster, "trailing", 4_096, 2 * MIB + 1, (0, 100))?;
    cluster.endio_ok(&["check"])?;
    Ok(cluster.no_panic()?)
}
