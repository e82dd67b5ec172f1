//! The writeback service as a library and a binary.
