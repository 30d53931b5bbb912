//! `mlxd generate`: generates one answer.

use std::io::{self, IsTerminal as _, Read as _};

use clap::Args;
use mlxd_client::Client;
use mlxd_client::v1::{GenerateRequest, Message};

use super::answer::{SamplingArgs, open_session, stream_to_stdout};
use super::connect::{ConnectArgs, choose_model};
use super::failure::{Failure, Result};
use super::{format, json, out};

const EXAMPLES: &str = "\
Examples:
  mlxd generate \"What is the capital of France?\"
  mlxd generate -m SmolLM2-135M-Instruct --raw --max-tokens 20 \"Once upon a time\"
  git diff | mlxd generate --system \"Write a commit message.\" -
  mlxd generate --session trip \"Name a city.\" && mlxd generate --session trip \"And its river?\"
  mlxd generate --json \"Hi\" | jq .usage";

/// Generate one answer and stream it to stdout.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// Prompt; `-`, or none when stdin is a pipe, reads it from stdin
    prompt: Option<String>,
    /// Model to use [default: the session's, else the only resident one]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Session to continue; created if it does not exist
    #[arg(long, value_name = "NAME")]
    session: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as raw text, without the chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object when the answer is complete
    #[arg(long)]
    json: bool,
    /// Print token counts and speed to stderr
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs the command.
pub(crate) async fn run(args: GenerateArgs) -> Result<()> {
    let prompt = read_prompt(args.prompt.as_deref())?;
    let client = args.connect.connect().await?;
    let request = request(&client, &args, prompt).await?;

    let (usage, timings) = if args.json {
        let response = client.generate(request).await?;
        json::print(&json::generation(&response, args.session.as_deref()))?;
        (response.usage, response.timings)
    } else {
        let end = stream_to_stdout(&client, request).await?;
        (end.usage, end.timings)
    };
    if args.stats {
        let line = format::speed(&usage.unwrap_or_default(), &timings.unwrap_or_default());
        out::note(&format!("{line}\n"));
    }
    Ok(())
}

async fn request(client: &Client, args: &GenerateArgs, prompt: String) -> Result<GenerateRequest> {
    let mut request = if args.raw {
        GenerateRequest::prompt(prompt)
    } else {
        let system = args.system.as_ref().map(Message::system);
        GenerateRequest::messages(system.into_iter().chain([Message::user(prompt)]))
    };
    args.sampling.apply(&mut request);
    if let Some(name) = &args.session {
        open_session(client, name, args.model.as_deref()).await?;
        request.session.clone_from(name);
        // The daemon refuses a model that is not the session's.
        request.model = args.model.clone().unwrap_or_default();
    } else {
        request.model = choose_model(client, args.model.as_deref()).await?;
    }
    Ok(request)
}

fn read_prompt(given: Option<&str>) -> Result<String> {
    let mut stdin = io::stdin();
    match given {
        Some("-") => {}
        Some(prompt) => return Ok(prompt.to_owned()),
        None if stdin.is_terminal() => {
            return Err(Failure::Usage("a prompt is required; `-` reads it from stdin".into()));
        }
        None => {}
    }
    let mut prompt = String::new();
    stdin.read_to_string(&mut prompt)?;
    // Only the final line end, which every text file has, is not part of the prompt.
    prompt.truncate(prompt.strip_suffix('\n').unwrap_or(&prompt).len());
    Ok(prompt)
}
