//! How messages that hold a secret are printed: without it.

use std::fmt;

use crate::conversion::Registered;

/// Printed in place of a secret.
struct Secret;

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever adds a field decides here whether it may be printed.
        let Self { store, cluster_epoch, key: _, lease_ms, io_end_floor, protocol } = self;
        f.debug_struct("Registered")
            .field("store", store)
            .field("cluster_epoch", cluster_epoch)
            .field("key", &Secret)
            .field("lease_ms", lease_ms)
            .field("io_end_floor", io_end_floor)
            .field("protocol", protocol)
            .finish()
    }
}
