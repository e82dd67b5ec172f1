//! All services on a disk whose power is cut in the middle of work, again and again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use endio_power_tests::disk::{Disk, Loss, Policy};
use endio_power_tests::mount::{self, Mounted};
use endio_testkit::client::Client;
use endio_testkit::cluster::{Cluster, Options, Who, drawn_sizes};
use endio_testkit::oracle::Crash;
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::Workload;
use endio_types::Reason;
use tokio::task::block_in_place;
use tokio::time::timeout;

const VOLUME: &str = "vol1";
const VOLUME_BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Futures that are tried of each cut.
const IMAGES: usize = 3;

struct Rig {
    cluster: Cluster,
    /// `None` only between two mounts.
    mounted: Option<Mounted>,
    place: PathBuf,
    load: Option<Workload>,
    rng: Rng,
    boots: u32,
    loss: Loss,
    images: u64,
    _directory: tempfile::TempDir,
}

fn options(place: &Path, env: &[(&str, &str)]) -> Options {
    let mut options = Options {
        capacity: "256MiB".to_owned(),
        data_root: Some(place.to_owned()),
        ..Options::default()
    };
    let small = [
        ("ENDIO_CONVERSION_CHECKPOINT_JOURNAL_BYTES", "65536"),
        ("ENDIO_WRITEBACK_LOG_SEGMENT_BYTES", "1048576"),
        ("ENDIO_BOOT_ID", "boot 0"),
    ];
    for (name, value) in small.iter().chain(env) {
        options.env.push(((*name).to_owned(), (*value).to_owned()));
    }
    options
}

impl Rig {
    async fn new(mut rng: Rng, env: &[(&str, &str)]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let place = directory.path().join("disk");
        std::fs::create_dir(&place)?;
        let mounted = Mounted::new(Disk::default(), &place)?;
        let mut options = options(&place, env);
        options.env.extend(drawn_sizes(&mut rng));
        let cluster = block_in_place(|| Cluster::start(options))?;
        let client = cluster.client().with_patience(PATIENCE);
        client.create(VOLUME, VOLUME_BYTES, 1).await?;
        let load = Workload::new(client, VOLUME, VOLUME_BYTES, rng.fork());
        Ok(Self {
            cluster,
            mounted: Some(mounted),
            place,
            load: Some(load),
            rng,
            boots: 0,
            loss: Loss::default(),
            images: 0,
            _directory: directory,
        })
    }

    fn client(&self) -> Client {
        self.cluster.client().with_patience(PATIENCE)
    }

    /// Work, and in the middle of it the power goes. Returns the disk as it was then.
    async fn work_and_cut(&mut self) -> anyhow::Result<Disk> {
        let mut load = self.load.take().expect("it is put back after each round");
        let instant = Duration::from_millis(self.rng.between(50, 700));
        if let Ok(ended) = timeout(instant, load.run(100_000)).await {
            ended?;
        }
        load.give_up();
        load.crashed(Crash::SinceFlush);
        self.load = Some(load);
        let mounted = self.mounted.take().expect("mounted");
        block_in_place(|| {
            mounted.cut();
            self.cluster.signal_kill();
            mounted.end();
            self.cluster.kill_all();
            mounted.unmount()
        })
    }

    /// Everything starts on what survived.
    fn start_on(&mut self, disk: Disk) -> anyhow::Result<()> {
        self.boots += 1;
        let boot = format!("boot {}", self.boots);
        self.cluster.set_env("ENDIO_BOOT_ID", Some(&boot));
        self.mounted = Some(Mounted::new(disk, &self.place)?);
        self.cluster.start_all()
    }

    fn stop_image(&mut self) -> anyhow::Result<()> {
        self.cluster.kill_all();
        self.mounted.take().map_or(Ok(()), |mounted| mounted.unmount().map(drop))
    }

    /// The promises, on one image.
    async fn judge(&mut self) -> anyhow::Result<()> {
        let client = self.client();
        // Whoever had the volume open is told that something may be missing: once.
        let told = client.fsync(VOLUME).await;
        let told = told.err().map(|refused| refused.reason);
        anyhow::ensure!(told == Some(Reason::LostWrites), "the first fsync said {told:?}");
        client.fsync(VOLUME).await?;
        let mut load = self.load.take().expect("a workload");
        load.verify().await?;
        let checked = client.check(true).await?;
        anyhow::ensure!(checked.findings.is_empty(), "{:?}", checked.findings);
        // It was told: a kill that is no power loss does not bring it back.
        block_in_place(|| self.cluster.bounce(Who::Writeback(0)))?;
        client.fsync(VOLUME).await?;
        load.verify().await?;
        self.load = Some(load);
        Ok(())
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        let disk = self.work_and_cut().await?;
        let before = self.load.as_ref().expect("a workload").knowledge();
        for image in 0..IMAGES {
            let draw = usize::try_from(self.rng.below(Policy::ALL.len() as u64))?;
            let policy = if image == 0 { Policy::Nothing } else { Policy::ALL[draw] };
            let (survived, loss) = disk.cut(policy, &mut self.rng);
            self.count(loss);
            if image > 0 {
                block_in_place(|| self.stop_image())?;
                if let Some(load) = &mut self.load {
                    load.know(before.clone());
                }
            }
            let context = format!("image {image}, {policy:?}, {loss:?}");
            let started = block_in_place(|| self.start_on(survived));
            started.map_err(|error| error.context(context.clone()))?;
            self.judge().await.map_err(|error| error.context(context))?;
        }
        Ok(())
    }

    fn count(&mut self, loss: Loss) {
        self.images += 1;
        self.loss.changes += loss.changes;
        self.loss.changes_lost += loss.changes_lost;
        self.loss.names += loss.names;
        self.loss.names_lost += loss.names_lost;
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Nobody may hang on a disk whose server is going away.
        if let Some(mounted) = &self.mounted {
            mounted.cut();
            mounted.end();
        }
        self.cluster.kill_all();
    }
}

/// Promises 1, 2, 3 and 6 across power cuts: what was flushed is there, what was not may be missing and
/// then somebody is told, once; nothing is foreign or torn, and every service starts again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_flushed_and_the_first_fsync_says_that_more_may_be() {
    if !mount::is_possible() {
        return;
    }
    let test = "a_power_cut_loses_nothing_that_was_flushed";
    let seed = seed::announce("endio-power-tests", test);
    let mut rig = Rig::new(Rng::new(seed), &[]).await.unwrap();
    let rounds = seed::number("ENDIO_POWER_ROUNDS", 4);
    for round in 0..rounds {
        let ended = rig.round().await;
        ended.unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error:#}"));
    }
    rig.client().settles().await.unwrap();
    rig.cluster.no_panic().unwrap();
    let done = rig.load.as_ref().unwrap().done;
    eprintln!("{rounds} cuts, {} images, {done} requests, {:?}", rig.images, rig.loss);
    assert!(rig.loss.changes_lost > 0 && rig.loss.names_lost > 0, "the disk forgot something");
}
