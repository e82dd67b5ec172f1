//! The real stack in one process.
