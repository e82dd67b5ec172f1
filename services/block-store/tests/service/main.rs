//! The block-store service between a conversion that does what a test says and a device that fails
//! when it is told to.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod bench;
mod fake;
mod hostile;
mod lifecycle;
mod readers;
mod reads;
mod session;
mod writes;
