//! Compiles the protobuf files with a pure-Rust compiler, so that `cargo` alone is enough.
use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from("../../proto");
    let files = [
        "endio/common/v1/common.proto",
        "endio/conversion/v1/conversion.proto",
        "endio/blockstore/v1/blockstore.proto",
        "endio/writeback/v1/writeback.proto",
    ]
    .map(|file| root.join(file));
    println!("cargo:rerun-if-changed=../../proto");
    let set = protox::Compiler::new([&root])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(&files)?
        .file_descriptor_set();
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("endio.bin"), set.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    config.bytes(["."]);
    tonic_prost_build::configure()
        // It holds a key: src/redact.rs prints it.
        .skip_debug([".endio.conversion.v1.Registered"])
        .compile_fds_with_config(set, config)?;
    Ok(())
}
