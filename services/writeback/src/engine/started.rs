//! Requests that have begun.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::failure::Failure;

/// A request that has begun. It goes on when this is dropped.
///
/// What has nothing to wait for, like most buffered writes, is done when this is made: no task is
/// spawned for it and no thread woken. The rest runs in a task of its own.
#[must_use = "it says whether the request succeeded"]
pub struct Started<T>(Stage<T>);

enum Stage<T> {
    Done(Option<Result<T, Failure>>),
    Task(JoinHandle<Result<T, Failure>>),
}

// Nothing in it is pinned by its place: the task has its own.
impl<T> Unpin for Started<T> {}

impl<T: Send + 'static> Started<T> {
    /// Runs a request as far as it goes now, and the rest in a task.
    pub(super) fn begin(
        tasks: &TaskTracker,
        request: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Self {
        let mut request = Box::pin(AssertUnwindSafe(request).catch_unwind());
        match request.as_mut().now_or_never() {
            // A defect in one request is no reason to end the stream that brought it.
            Some(done) => {
                Self(Stage::Done(Some(done.unwrap_or_else(|_| Err(Failure::task_lost())))))
            }
            None => Self(Stage::Task(tasks.spawn(async move {
                request.await.unwrap_or_else(|_| Err(Failure::task_lost()))
            }))),
        }
    }
}

impl<T> Future for Started<T> {
    type Output = Result<T, Failure>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            // Asked again after its answer: nothing is left to tell.
            Stage::Done(done) => {
                Poll::Ready(done.take().unwrap_or_else(|| Err(Failure::task_lost())))
            }
            Stage::Task(task) => task
                .poll_unpin(context)
                .map(|ended| ended.unwrap_or_else(|_| Err(Failure::task_lost()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_waits_for_nothing_makes_no_task() {
        let tasks = TaskTracker::new();
        let started = Started::begin(&tasks, async { Ok(7) });
        assert!(tasks.is_empty());
        assert!(matches!(started.await, Ok(7)));
    }

    #[tokio::test]
    async fn what_waits_goes_on_without_its_caller() {
        let tasks = TaskTracker::new();
        let (go, wait) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel();
        drop(Started::begin(&tasks, async move {
            let _ = wait.await;
            let _ = tell.send(());
            Ok(())
        }));
        assert_eq!(tasks.len(), 1);
        go.send(()).expect("the request waits");
        told.await.expect("it went on");
    }

    #[tokio::test]
    async fn a_panic_is_the_requests_own() {
        let tasks = TaskTracker::new();
        let now = Started::<()>::begin(&tasks, async { panic!("planted by a test") });
        assert_eq!(now.await.expect_err("it panicked").reason, Failure::task_lost().reason);
        let later = Started::<()>::begin(&tasks, async {
            tokio::task::yield_now().await;
            panic!("planted by a test")
        });
        assert_eq!(later.await.expect_err("it panicked").reason, Failure::task_lost().reason);
    }
}
