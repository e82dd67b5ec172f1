//! The conversion service as a library and a binary.
