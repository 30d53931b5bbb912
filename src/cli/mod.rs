//! The command line. Every command except `serve`, `convert`, `pull`, `list` and `rm` is a client of a
//! daemon, through the public crate `mlxd-client`; `run` also downloads a model, and starts a daemon where
//! none answers. Stdout carries data, stderr progress and errors. Called by `main`.

mod answer;
mod asking;
mod bar;
mod bench;
mod chat;
mod connect;
mod convert;
mod failure;
mod format;
mod generate;
mod interrupts;
mod json;
mod list;
mod load;
mod out;
mod own_daemon;
mod ps;
mod pull;
mod quantize;
mod response_format;
mod rm;
mod run;
mod serve;
mod session_files;
mod session_filter;
mod session_watch;
mod sessions;
mod shown;
mod transfer_bars;

use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mlxd::config::{Config, Overrides};

use failure::{Failure, Result};
use interrupts::Interrupts;

/// Serves language models on MLX to every app on this machine, over gRPC.
#[derive(Debug, Parser)]
#[command(name = "mlxd", version, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  mlxd run mlx-community/SmolLM2-135M-Instruct
  mlxd serve --model-root ~/models --model SmolLM2-135M-Instruct
  mlxd generate \"What is the capital of France?\"
  mlxd chat
  mlxd ps

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted.";

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Pull(pull::PullArgs),
    List(list::ListArgs),
    Rm(rm::RmArgs),
    Serve(serve::ServeArgs),
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    Load(load::LoadArgs),
    Unload(load::UnloadArgs),
    Ps(ps::PsArgs),
    Sessions(sessions::SessionsArgs),
    Bench(bench::BenchArgs),
    Convert(convert::ConvertArgs),
}

/// Runs the command given by the process's arguments.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done if even this cannot be written.
            _ = error.print();
            return ExitCode::from(if error.use_stderr() { failure::USAGE } else { 0 });
        }
    };
    let outcome = match cli.command {
        Command::Serve(args) => {
            mlxd::device::prepare();
            serve::run(args)
        }
        // Reads stdin first, while Ctrl-C still ends the process.
        Command::Generate(args) => {
            generate::prompt(&args).and_then(|prompt| wait(generate::run(args, prompt)))
        }
        Command::Chat(args) => runtime().and_then(|runtime| chat::run(&runtime, args)),
        Command::Load(args) => wait(load::run(args)),
        Command::Unload(args) => wait(load::run_unload(args)),
        Command::Ps(args) => wait(ps::run(args)),
        Command::Sessions(args) => wait(sessions::run(args)),
        // Handles Ctrl-C itself, to show the measurements taken so far.
        Command::Bench(args) => runtime().and_then(|runtime| runtime.block_on(bench::run(args))),
        Command::Convert(args) => convert::run(&args),
        Command::Pull(args) => wait(pull::run(args)),
        Command::Run(args) => runtime().and_then(|runtime| run::run(&runtime, args)),
        Command::List(args) => wait(list::run(args)),
        Command::Rm(args) => wait(rm::run(args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Reads the daemon's configuration, for the commands that look where it looks.
fn config() -> Result<Config> {
    Ok(Config::load(&Overrides::default()).map_err(anyhow::Error::from)?)
}

/// Builds the clients' runtime: one thread besides the main one, for the connection.
fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().map_err(Failure::Io)
}

/// Runs a client command; Ctrl-C drops it, which cancels its call.
fn wait(command: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = runtime()?;
    let mut interrupts = Interrupts::listen(&runtime)?;
    runtime.block_on(interrupts.or(command))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_of_every_command() {
        let mut command = Cli::command();
        command.build();
        let mut all = command.render_long_help().to_string();
        for subcommand in command.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let help = subcommand.render_long_help();
            all.push_str(&format!("\n===== {}\n{help}", subcommand.get_name()));
            let name = subcommand.get_name().to_owned();
            for action in subcommand.get_subcommands_mut().filter(|action| action.get_name() != "help") {
                let help = action.render_long_help();
                all.push_str(&format!("\n===== {name} {}\n{help}", action.get_name()));
            }
        }
        insta::assert_snapshot!(all);
    }

    #[test]
    fn sampling_out_of_its_type_is_a_usage_error() {
        for wrong in [["--temperature", "hot"], ["--max-tokens", "-1"], ["--seed", "1.5"]] {
            let arguments = ["mlxd", "generate"].into_iter().chain(wrong).chain(["hi"]);
            assert!(Cli::try_parse_from(arguments).is_err(), "{wrong:?}");
        }
    }
}
