//! How the identities in certificates begin.

/// How the identity of every service begins.
pub const SERVICE: &str = "endio://service/";
/// How the identity of a conversion service begins.
pub const CONVERSION: &str = "endio://service/conversion/";
/// How the identity of a block-store begins.
pub const BLOCK_STORE: &str = "endio://service/block-store/";
/// How the identity of a writeback begins.
pub const WRITEBACK: &str = "endio://service/writeback/";
