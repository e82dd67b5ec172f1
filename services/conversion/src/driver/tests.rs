//! The driver over a disk in memory, one event at a time.

use endio_chassis::metrics::Registry;
use endio_state_machine::machine::{Call, VolumeInfo};
use endio_store::meta::MemoryMeta;

use super::*;

/// Its epoch is durable, and so is everything else. Commits go to the thread.
async fn driver(meta: &MemoryMeta) -> Driver {
    let config = Config { commit_here_us_max: 0, ..Config::default() };
    let mut driver =
        Driver::open(config, meta, Metrics::new(&Registry::default())).expect("opened");
    commit(&mut driver).await;
    driver
}

async fn commit(driver: &mut Driver) {
    driver.settle(Instant::now(), false).expect("settled");
    while driver.durable().expect("durable") < driver.machine.seq() {
        driver.commit_progress().await.expect("committed");
    }
    driver.turn(&mut Vec::new(), false).expect("a turn");
}

fn ask<A>(
    driver: &mut Driver,
    question: impl FnOnce(oneshot::Sender<A>) -> Question,
) -> oneshot::Receiver<A> {
    let (reply, answer) = oneshot::channel();
    driver.event(Event::Ask(question(reply))).expect("asked");
    answer
}

fn call(driver: &mut Driver, call: Call) -> oneshot::Receiver<Result<ReplyBody, Refusal>> {
    let (reply, answer) = oneshot::channel();
    driver.event(Event::Call(call, reply)).expect("called");
    answer
}

fn create() -> Call {
    Call::CreateVolume {
        name: "v".to_owned(),
        size_bytes: 1 << 20,
        replicas: 1,
        in_place: false,
        growable: false,
        as_of: None,
    }
}

fn open(force: bool) -> Call {
    Call::OpenVolume {
        name: "v".to_owned(),
        volume: None,
        writeback: "wb".to_owned(),
        force,
        if_generation: None,
        reads_log: true,
    }
}

fn volume(driver: &mut Driver) -> oneshot::Receiver<Option<VolumeInfo>> {
    ask(driver, |reply| Question::Volume("v".to_owned(), reply))
}

#[tokio::test]
async fn what_is_told_of_volumes_and_their_logs_is_durable() {
    let meta = MemoryMeta::new();
    let mut driver = driver(&meta).await;
    // At rest there is nothing to wait for but the end of the turn.
    let mut none = volume(&mut driver);
    driver.turn(&mut Vec::new(), false).expect("a turn");
    assert_eq!(none.try_recv(), Ok(None));

    let mut created = call(&mut driver, create());
    let mut one = volume(&mut driver);
    let mut all = ask(&mut driver, Question::Volumes);
    assert!(created.try_recv().is_err());
    assert!(one.try_recv().is_err() && all.try_recv().is_err(), "told ahead of the disk");
    commit(&mut driver).await;
    assert!(matches!(created.try_recv(), Ok(Ok(ReplyBody::Volume(_)))));
    let found = one.try_recv().expect("told").expect("there");
    assert_eq!(all.try_recv().expect("told"), vec![found.clone()]);

    // Under the generation after an opening nobody else logs any more; before it is durable, it is not so.
    let mut opened = call(&mut driver, open(false));
    let generation = endio_types::Generation(found.generation.0 + 1);
    let from = endio_types::Lblk(0);
    let log = |generation| move |reply| Question::Logged(found.id, generation, from, 8, reply);
    let mut logged = ask(&mut driver, log(generation));
    let mut refused = ask(&mut driver, log(found.generation));
    assert!(opened.try_recv().is_err());
    assert!(logged.try_recv().is_err() && refused.try_recv().is_err(), "told ahead of the disk");
    commit(&mut driver).await;
    assert!(matches!(opened.try_recv(), Ok(Ok(ReplyBody::Opened(..)))));
    assert_eq!(logged.try_recv(), Ok(Ok(Vec::new())));
    assert!(matches!(refused.try_recv(), Ok(Err(_))));
}
