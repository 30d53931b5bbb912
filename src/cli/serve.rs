//! `mlxd serve`: runs the daemon in the foreground.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mlxd::config::{self, Config, Overrides};
use mlxd::daemon;
use rustix::process::{Signal, getpid, kill_process};

use super::failure::Result;

const EXAMPLES: &str = "\
Examples:
  mlxd serve --model-root ~/models
  mlxd serve --model-root ~/models --model SmolLM2-135M-Instruct --log-format json
  mlxd serve --config /etc/mlxd.toml --listen 127.0.0.1:7070 --token-file ~/.mlxd/token

Precedence: flags, MLXD_* environment variables, configuration file, defaults. On SIGTERM or Ctrl-C the
daemon lets running requests finish, then exits with 0. On SIGHUP it reads its configuration again.";

/// Run the daemon in the foreground.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// Configuration file; deploy/mlxd.example.toml documents every key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Unix socket to listen on [default: $XDG_RUNTIME_DIR/mlxd/mlxd.sock, else ~/.mlxd/mlxd.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Folder that contains model folders; may be repeated
    #[arg(long = "model-root", value_name = "DIR")]
    model_roots: Vec<PathBuf>,
    /// Model to load at startup; may be repeated
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// Loopback TCP address to listen on as well; requires --token-file
    #[arg(long, value_name = "ADDRESS", requires = "token_file")]
    listen: Option<SocketAddr>,
    /// File with the bearer token that callers on TCP must present
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Stop when stdin closes, as on SIGTERM: for a process that starts a daemon for itself
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
    /// Format of the log on stderr
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

/// Runs the daemon until it has drained.
pub(crate) fn run(args: ServeArgs) -> Result<()> {
    let ServeArgs {
        config: config_file,
        socket,
        model_roots,
        models,
        listen,
        token_file,
        stop_with_stdin,
        log_format,
    } = args;
    if stop_with_stdin {
        std::thread::Builder::new().name("stdin".into()).spawn(end_with_stdin)?;
    }
    let log_format = log_format.map(|format| match format {
        LogFormat::Text => config::LogFormat::Text,
        LogFormat::Json => config::LogFormat::Json,
    });
    let overrides = Overrides { config_file, socket, model_roots, models, listen, token_file, log_format };
    let config = Config::load(&overrides).map_err(anyhow::Error::from)?;
    let reread = move || Config::load(&overrides);
    Ok(daemon::run(&config, reread).map_err(anyhow::Error::from)?)
}

/// Waits until nobody can write to stdin any more, then asks this process to drain.
fn end_with_stdin() {
    // What is written does not matter; an error ends it as well.
    _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    // The handler of the daemon takes it; without one the process ends at once.
    _ = kill_process(getpid(), Signal::TERM);
}
