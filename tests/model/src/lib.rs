//! Every order of events, for small configurations: the real state machine and the real gate of a
//! block-store between peers, messages and clocks that do anything they can.
//!
//! A state of the model is the list of steps that lead to it; two lists are the same state if they
//! leave machine, gate and messages alike. Nothing of the protocol is described a second time.

mod explore;
mod world;

pub use explore::Protocol;
pub use world::{Budget, Plant, Step, World};
