//! Load generator over gRPC.
