//! Compares the committed code with what the contract generates. After a change of `proto/`,
//! `MLXD_REGENERATE=1 cargo test -p mlxd-client --test codegen` writes it again.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;

const PROTO_FILES: [&str; 5] = [
    "mlxd/v1/errors.proto",
    "mlxd/v1/inference.proto",
    "mlxd/v1/model.proto",
    "mlxd/v1/server.proto",
    "mlxd/v1/session.proto",
];

fn check(committed: &str, configure: impl FnOnce(tonic_prost_build::Builder) -> tonic_prost_build::Builder) {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = protox::compile(PROTO_FILES, [package.join("../../proto")]).expect("the contract compiles");
    let scratch = tempfile::tempdir().expect("a scratch folder");
    configure(tonic_prost_build::configure())
        .out_dir(scratch.path())
        .compile_fds(files)
        .expect("code is generated");
    let fresh = fs::read_to_string(scratch.path().join("mlxd.v1.rs")).expect("generated code");

    let path = package.join(committed);
    if std::env::var_os("MLXD_REGENERATE").is_some() {
        fs::write(&path, &fresh).expect("the committed file can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == fresh, "{committed} is out of date; run this test with MLXD_REGENERATE=1");
}

#[test]
fn client_code_is_what_the_contract_generates() {
    check("src/gen/mlxd.v1.rs", |builder| builder.build_server(false));
}

#[test]
fn fake_server_code_is_what_the_contract_generates() {
    // The fake speaks the client's own message types, so that tests compare them directly.
    check("tests/gen/mlxd.v1.server.rs", |builder| {
        builder.build_client(false).extern_path(".mlxd.v1", "::mlxd_client::v1")
    });
}
