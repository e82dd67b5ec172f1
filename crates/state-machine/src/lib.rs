//! The pure completion protocol: io_ends, leases, extent map, free space, dirty map.
