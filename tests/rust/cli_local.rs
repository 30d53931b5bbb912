//! The commands that work without a daemon, where one cannot be asked or the configuration is broken.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::cli::stderr;

/// Runs a command with a home folder of its own, and nothing of the person's settings.
fn mlxd(home: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlxd"));
    command.args(arguments).stdin(Stdio::null()).env_clear().env("HOME", home).env("XDG_RUNTIME_DIR", home);
    command.envs(variables.iter().copied()).output().expect("mlxd runs")
}

/// Makes a repo in the cache of a home folder.
fn repo(home: &Path) -> PathBuf {
    let repo = home.join(".cache/huggingface/hub/models--owner--name");
    fs::create_dir_all(repo.join("blobs")).expect("a folder");
    repo
}

#[test]
fn a_daemon_that_cannot_be_asked_is_an_error_and_not_an_absent_one() {
    let home = tempfile::tempdir().unwrap();
    let repo = repo(home.path());
    for command in [&["rm", "owner/name"][..], &["list"]] {
        for (options, variables, said) in [
            (&["--token-file", "/nonexistent/token"][..], &[][..], "token"),
            (&["--address", "localhost"], &[], "address"),
            (&[], &[("MLXD_ADDRESS", "localhost")], "address"),
        ] {
            let output = mlxd(home.path(), &[command, options].concat(), variables);
            assert_eq!(output.status.code(), Some(1), "{command:?} {options:?} {variables:?}");
            assert!(stderr(&output).contains(said), "{}", stderr(&output));
            assert!(repo.exists());
        }
    }
    let output = mlxd(home.path(), &["rm", "owner/name"], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!repo.exists());
}

#[test]
fn a_broken_configuration_is_told_by_every_command_that_reads_it() {
    let home = tempfile::tempdir().unwrap();
    repo(home.path());
    let file = home.path().join("mlxd.toml");
    fs::write(&file, "model_roots = 1").unwrap();
    let variables = [("MLXD_CONFIG", file.to_str().unwrap())];
    for arguments in
        [&["convert", "owner/name", "out"][..], &["list"], &["pull", "owner/name"], &["rm", "owner/name"]]
    {
        let output = mlxd(home.path(), arguments, &variables);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains("model_roots"), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn a_dry_run_takes_no_option_that_it_would_ignore() {
    let home = tempfile::tempdir().unwrap();
    for option in [&["--pin"][..], &["--unpin"], &["--keep-alive", "5m"]] {
        let output = mlxd(home.path(), &[&["load", "tiny", "--dry-run"], option].concat(), &[]);
        assert_eq!(output.status.code(), Some(2), "{option:?}: {}", stderr(&output));
    }
}
