//! The `mlxd` program: the daemon, and a client of it for people and scripts.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
