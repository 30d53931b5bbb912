//! Generates the daemon's server code for `mlxd.v1` and the descriptor set for reflection, from the
//! files under `proto/`, without protoc. The client's code is committed in `clients/rust/src/gen`.

use std::error::Error;
use std::path::PathBuf;

use prost::Message as _;

/// Where the contract lies, relative to the package.
const PROTO_ROOT: &str = "proto";

/// Its files.
const PROTO_FILES: [&str; 5] = [
    "mlxd/v1/errors.proto",
    "mlxd/v1/inference.proto",
    "mlxd/v1/model.proto",
    "mlxd/v1/server.proto",
    "mlxd/v1/session.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO_ROOT}");
    println!("cargo::rerun-if-changed=build.rs");

    let files = protox::compile(PROTO_FILES, [PROTO_ROOT])?;
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out_dir.join("mlxd_descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().build_client(false).build_server(true).compile_fds(files)?;
    Ok(())
}
