//! The block-store service as a library and a binary.
