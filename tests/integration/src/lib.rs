//! The real stack in one process, over real sockets, and peers whose every message a test decides.

pub mod hostile;
pub mod line;
pub mod raw;
pub mod secured;
pub mod services;
pub mod stack;
pub mod tampering;
