//! Real processes, killed at any instant.
