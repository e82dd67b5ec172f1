//! The threads that a service's tasks run on.

use std::io;

/// Worker threads where nothing else is said: half of the processors, at least one.
///
/// The services mostly wait for each other and for disks, whose threads are apart from these. A
/// second worker for the same few messages mainly costs: each message wakes it to look for work, and
/// on two processors that are shared with two other services and a client it takes their time.
pub fn worker_threads_default() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).max(1))
}

/// Runs a service to its end on a runtime of its own. `worker_threads`: 0 stands for
/// [`worker_threads_default`].
///
/// # Errors
/// Threads cannot be started.
pub fn block_on<F: Future>(worker_threads: usize, service: F) -> io::Result<F::Output> {
    let worker_threads = match worker_threads {
        0 => worker_threads_default(),
        given => given,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads)
        .enable_all()
        .build()?;
    Ok(runtime.block_on(service))
}

/// Runs what takes long and does not await, without holding up the other tasks of the runtime where
/// that can be had.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    let flavor = Handle::try_current().map(|handle| handle.runtime_flavor());
    match flavor {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_as_many_workers_as_it_was_given_and_at_least_one() {
        let workers = |given| {
            block_on(given, async { tokio::runtime::Handle::current().metrics().num_workers() })
                .expect("threads")
        };
        assert_eq!(workers(3), 3);
        assert_eq!(workers(0), worker_threads_default());
        assert!(worker_threads_default() >= 1);
    }

    #[test]
    fn others_go_on_beside_work_that_takes_long() {
        let (go, wait) = std::sync::mpsc::channel();
        let seen = block_on(1, async move {
            let long = tokio::spawn(async move { aside(|| wait.recv()) });
            // The only worker is busy with the first task, or will be.
            let other = tokio::spawn(async move { go.send(7) });
            other.await.expect("it runs").expect("somebody waits");
            long.await.expect("it ends")
        });
        assert_eq!(seen.expect("threads"), Ok(7));
        assert_eq!(aside(|| 1), 1);
    }
}
