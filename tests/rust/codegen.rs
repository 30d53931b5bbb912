//! The client's committed code is what the contract generates. `MLXD_REGENERATE=1 cargo build` writes it anew
//! after a change of `proto/`.

#[test]
fn client_code_is_what_the_contract_generates() {
    let fresh = include_str!(concat!(env!("OUT_DIR"), "/client/mlxd.v1.rs"));
    let committed = include_str!("../../clients/rust/src/gen/mlxd.v1.rs");
    assert!(fresh == committed, "clients/rust/src/gen is out of date: MLXD_REGENERATE=1 cargo build");
}

#[test]
fn fake_server_code_is_what_the_contract_generates() {
    let fresh = include_str!(concat!(env!("OUT_DIR"), "/fake/mlxd.v1.rs"));
    let committed = include_str!("../../clients/rust/tests/gen/mlxd.v1.server.rs");
    assert!(fresh == committed, "clients/rust/tests/gen is out of date: MLXD_REGENERATE=1 cargo build");
}
