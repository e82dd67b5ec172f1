//! The clients: random requests under an oracle, until everything is judged.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use endio_api::conversion::{ListIoEndsRequest, ListStoresRequest};
use endio_testkit::checkers;
use endio_testkit::client::Client;
use endio_testkit::oracle::Crash;
use endio_testkit::seed::Rng;
use endio_testkit::workload::{Mix, Workload};
use tokio::sync::Barrier;
use tokio::time::{Instant, sleep, timeout};

use crate::host::{dialing, url};
use crate::net;
use crate::plan::{Plan, VOLUME_BYTES, Volume, Who};

/// Longest simulated wait of a client for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Faults go on.
    Faults,
    /// Everything is mended: everything must end and add up.
    Healed,
    /// All was judged; every process is killed and started once more.
    Judged,
    /// They run again: what is on their disks is judged.
    Again,
    /// Nothing is left to ask.
    Done,
}

/// What the clients and the world outside of the simulation share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) phase: Cell<Phase>,
    pub(crate) requests: Cell<u64>,
    pub(crate) retries: Cell<u64>,
    pub(crate) takeovers: Cell<u64>,
    pub(crate) log: RefCell<Vec<String>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            phase: Cell::new(Phase::Faults),
            requests: Cell::default(),
            retries: Cell::default(),
            takeovers: Cell::default(),
            log: RefCell::default(),
        }
    }

    pub(crate) fn note(&self, text: impl std::fmt::Display) {
        let at = turmoil::sim_elapsed().unwrap_or_default().as_millis();
        self.log.borrow_mut().push(format!("{at:>7} ms  client: {text}"));
    }

    async fn until(&self, phase: Phase) {
        while self.phase.get() < phase {
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// All clients.
pub(crate) async fn run(plan: Plan, shared: Rc<Shared>) -> turmoil::Result {
    let mut rng = Rng::new(plan.seed ^ 0x00C1_1E27);
    let barrier = Rc::new(Barrier::new(plan.volumes.len()));
    let mut tasks = tokio::task::JoinSet::new();
    for (index, volume) in plan.volumes.iter().enumerate() {
        let user = User {
            name: format!("volume-{index}"),
            volume: *volume,
            writebacks: plan.writebacks,
            rng: rng.fork(),
            shared: Rc::clone(&shared),
            barrier: Rc::clone(&barrier),
        };
        tasks.spawn_local(user.run());
    }
    while let Some(ended) = tasks.join_next().await {
        ended?.map_err(|error| format!("{error:#}"))?;
    }
    shared.phase.set(Phase::Done);
    Ok(())
}

/// As [`Client::settles`], but a volume that another writeback has open is judged there.
async fn settles(client: &Client) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let wrong = match settled(client).await {
            Ok(()) => return Ok(()),
            Err(wrong) => wrong,
        };
        if began.elapsed() > PATIENCE {
            return Err(wrong);
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn settled(client: &Client) -> anyhow::Result<()> {
    let io_ends = client.inspect().io_ends(ListIoEndsRequest::default()).await?.into_inner();
    checkers::every_io_end_ends(&io_ends)?;
    let stores = client.inspect().stores(ListStoresRequest {}).await?.into_inner().stores;
    let check = client.check(true).await?;
    checkers::space_adds_up(&check.metadata.context("nothing is said of the metadata")?, &stores)?;
    anyhow::ensure!(check.findings.is_empty(), "no_foreign_or_stale_byte: {:?}", check.findings);
    Ok(())
}

struct User {
    name: String,
    volume: Volume,
    writebacks: usize,
    rng: Rng,
    shared: Rc<Shared>,
    barrier: Rc<Barrier>,
}

fn client(writeback: usize) -> anyhow::Result<Client> {
    let channel = net::dialer(dialing()).channel(&url(Who::Writeback(writeback)))?;
    Ok(Client::over(channel).with_patience(PATIENCE))
}

impl User {
    async fn run(mut self) -> anyhow::Result<()> {
        let name = self.name.clone();
        self.live().await.with_context(|| format!("{name}, {:?}", self.shared.phase.get()))
    }

    async fn live(&mut self) -> anyhow::Result<()> {
        let mut at = self.volume.writeback;
        let mut own = client(at)?;
        own.create(&self.name, VOLUME_BYTES, self.volume.replicas).await.context("create")?;
        let mix = Mix { depth: self.rng.between(1, 24) as usize, ..Mix::draw(&mut self.rng) };
        let fork = self.rng.fork();
        let mut load = Workload::new(own.clone(), &self.name, VOLUME_BYTES, fork).with_mix(mix);
        while self.shared.phase.get() == Phase::Faults {
            if self.volume.moves && self.rng.chance(20) {
                let instant = Duration::from_millis(self.rng.between(1, 500));
                if let Ok(ended) = timeout(instant, load.run(u64::MAX)).await {
                    ended?;
                }
                load.give_up();
                load.crashed(Crash::SinceFlush);
                at = (at + 1) % self.writebacks;
                own = client(at)?;
                self.take(&own).await.context("takeover")?;
                self.shared.note(format_args!("{} is at writeback-{at}", self.name));
                load.move_to(own.clone());
                continue;
            }
            load.run(self.rng.between(1, 40)).await?;
            if self.rng.chance(30) {
                load.drain().await?;
            }
            if self.rng.chance(10) {
                load.drain().await?;
                load.verify().await?;
            }
            sleep(Duration::from_millis(self.rng.below(60))).await;
        }
        load.drain().await.context("requests that were under way")?;
        self.count(&load);
        self.shared.note(format_args!("{} has its answers", self.name));
        load.verify().await?;
        // Half of the time what is dirty has to survive in the cache log.
        if self.rng.chance(50) {
            load.fsync().await.context("fsync")?;
        }
        self.barrier.wait().await;
        settles(&own).await.context("after the faults")?;
        self.barrier.wait().await;
        // What is acknowledged and dirty now is in the cache log and nowhere else.
        load.run(self.rng.between(1, 60)).await?;
        load.drain().await?;
        if self.barrier.wait().await.is_leader() {
            self.shared.note("everything adds up");
            self.shared.phase.set(Phase::Judged);
        }
        self.shared.until(Phase::Again).await;
        load.verify().await.context("after a last restart")?;
        load.run(20).await?;
        load.drain().await?;
        load.fsync().await.context("fsync")?;
        load.verify().await?;
        self.barrier.wait().await;
        settles(&own).await.context("at the end")?;
        self.barrier.wait().await;
        Ok(())
    }

    async fn take(&self, own: &Client) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let refused = match timeout(PATIENCE, own.open(&self.name, true)).await? {
                Ok(_) => break,
                Err(refused) => refused,
            };
            if began.elapsed() > PATIENCE {
                return Err(refused.into());
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.shared.takeovers.set(self.shared.takeovers.get() + 1);
        Ok(())
    }

    fn count(&self, load: &Workload) {
        self.shared.requests.set(self.shared.requests.get() + load.done);
        self.shared.retries.set(self.shared.retries.get() + load.retries());
    }
}
