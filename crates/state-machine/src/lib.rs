//! The pure completion protocol: io_ends, leases, extent map, free space, dirty map.

pub mod chunk;
mod chunk_codec;
pub mod data_log;
pub mod extent_map;
pub mod gate;

pub mod free_space;
pub mod lease;
pub mod ledger;
pub mod limits;
pub mod machine;
pub mod queue;
pub mod record;
pub mod token;
pub mod writeback;
