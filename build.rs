//! Generates the code of `mlxd.v1` and the descriptor set for reflection from the files under `proto/`,
//! without protoc: the daemon's server code, and beside it what is committed under `clients/rust`, which a
//! test compares (`tests/rust/codegen.rs`). With `MLXD_REGENERATE` set, the committed files are written anew.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use prost::Message as _;
use tonic_prost_build::configure;

/// Folder of the contract, relative to the package.
const PROTO_ROOT: &str = "proto";

/// Files of the contract.
const PROTO_FILES: [&str; 5] = [
    "mlxd/v1/errors.proto",
    "mlxd/v1/inference.proto",
    "mlxd/v1/model.proto",
    "mlxd/v1/server.proto",
    "mlxd/v1/session.proto",
];

/// Set it to write the committed code.
const REGENERATE: &str = "MLXD_REGENERATE";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO_ROOT}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={REGENERATE}");

    let files = protox::compile(PROTO_FILES, [PROTO_ROOT])?;
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out_dir.join("mlxd_descriptor.bin"), files.encode_to_vec())?;
    let server = configure().build_client(false).codec_path("crate::rpc::codec::CountingCodec");
    server.compile_fds(files.clone())?;

    // The client's fake server speaks the client's own message types, so that its tests compare them
    // directly.
    let client = configure().build_server(false);
    let fake = configure().build_client(false).extern_path(".mlxd.v1", "::mlxd_client::v1");
    for (name, builder, committed) in [
        ("client", client, "clients/rust/src/gen/mlxd.v1.rs"),
        ("fake", fake, "clients/rust/tests/gen/mlxd.v1.server.rs"),
    ] {
        let folder = out_dir.join(name);
        fs::create_dir_all(&folder)?;
        builder.out_dir(&folder).compile_fds(files.clone())?;
        if std::env::var_os(REGENERATE).is_some() {
            fs::copy(folder.join("mlxd.v1.rs"), committed)?;
        }
    }
    Ok(())
}
