//! What an operator relies on: configuration, checks, lists.
#![allow(clippy::unwrap_used)]

mod check;
mod configuration;
mod list;
