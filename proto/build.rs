//! Compiles the protocol without protoc.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=tidemark");
    let descriptors = protox::compile(
        [
            "tidemark/common/v1/common.proto",
            "tidemark/capture/v1/capture.proto",
            "tidemark/vault/v1/vault.proto",
        ],
        ["."],
    )?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("tidemark.binpb"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure()
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
