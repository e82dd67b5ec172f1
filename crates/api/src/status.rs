//! One place that turns a domain reason into a gRPC status with machine-readable details.
