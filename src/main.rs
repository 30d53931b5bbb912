//! The `mlxd` program.
fn main() {}
