//! The gRPC contract: generated code, domain conversions, and the one place that turns a domain
//! reason into a status.
//!
//! Messages are validated when they are received and nowhere else; what leaves is built from
//! domain types that are valid by construction.

pub mod access;
pub mod convert;
pub mod protocol;
mod redact;
pub mod status;
pub mod traces;

/// Generated from `proto/endio/**`; the comments there are the reference manual.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod proto {
    /// Messages shared by the services.
    pub mod common {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("endio.common.v1");
        }
    }
    /// The conversion service.
    pub mod conversion {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("endio.conversion.v1");
        }
    }
    /// The block-store service.
    pub mod blockstore {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("endio.blockstore.v1");
        }
    }
    /// The writeback service.
    pub mod writeback {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("endio.writeback.v1");
        }
    }
}
pub use proto::{
    blockstore::v1 as blockstore, common::v1 as common, conversion::v1 as conversion,
    writeback::v1 as writeback,
};

/// The file descriptor set of all of the above, with comments, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/endio.bin"));
