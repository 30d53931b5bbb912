//! `mlxd generate`: generates one answer.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;

use clap::Args;
use mlxd_client::Client;
use mlxd_client::v1::{GenerateRequest, Message, generate_request::Input};

use super::answer::{SamplingArgs, open_session, stream_to_stdout};
use super::asking::AskingArgs;
use super::connect::{ConnectArgs, choose_model};
use super::failure::{Failure, Result};
use super::response_format::FormatArgs;
use super::{format, json, out, shown};

const EXAMPLES: &str = "\
Examples:
  mlxd generate \"What is the capital of France?\"
  mlxd generate -m SmolLM2-135M-Instruct --raw --max-tokens 20 \"Once upon a time\"
  git diff | mlxd generate --system \"Write a commit message.\"
  mlxd generate \"Summarize this:\" < notes.txt
  mlxd generate --session trip \"Name a city.\" && mlxd generate --session trip \"And its river?\"
  mlxd generate --continue \"Dear Anna,\" \"Write a letter to Anna.\"
  mlxd generate --n 3 --temperature 1 \"Name a boat.\"
  mlxd generate --json \"Hi\" | jq .usage
  mlxd generate --tool weather.json --json \"Is it raining in Paris?\" | jq .tool_calls
  mlxd generate --schema city.json \"Describe Paris.\"
  mlxd generate --choice yes --choice no \"Is Paris in France?\"";

/// Generate one answer and stream it to stdout.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// Prompt. The text of a pipe, socket or file on stdin follows it; with `-`, or without one, it is all
    prompt: Option<String>,
    /// Leave stdin unread
    #[arg(long, requires = "prompt")]
    no_stdin: bool,
    /// Model to use [default: the session's, else the only resident one]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Session to continue; created if it does not exist
    #[arg(long, value_name = "NAME")]
    session: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Text with which the answer begins; the output goes on there
    #[arg(long = "continue", value_name = "TEXT", conflicts_with_all = ["raw", "session"])]
    begun: Option<String>,
    /// Take control tokens that are written in the prompt as such
    #[arg(long, conflicts_with_all = ["raw", "session"])]
    allow_control_tokens: bool,
    /// Continue the prompt as raw text, without the chat template
    #[arg(long)]
    raw: bool,
    /// Number of answers; printed when all are complete, each after a line with its number
    #[arg(long, value_name = "N", conflicts_with = "session")]
    n: Option<u32>,
    /// Number of answers to draw, of which the most likely ones are printed
    #[arg(long, value_name = "N", conflicts_with = "session")]
    best_of: Option<u32>,
    /// Print one JSON object when the answer is complete
    #[arg(long)]
    json: bool,
    /// Print token counts and speed to stderr
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    asking: AskingArgs,
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Returns the prompt: the one given, what stdin holds, or both.
pub(crate) fn prompt(args: &GenerateArgs) -> Result<String> {
    read_prompt(args.prompt.as_deref(), args.no_stdin)
}

/// Runs the command.
pub(crate) async fn run(mut args: GenerateArgs, prompt: String) -> Result<()> {
    let client = args.connect.connect().await?;
    let request = request(&client, &mut args, prompt).await?;

    let (usage, timings) = if args.json || args.n.is_some() || args.best_of.is_some() {
        let response = client.generate(request).await?;
        if args.json {
            json::print(&json::generation(&response, args.session.as_deref()))?;
        } else {
            out::data(&shown::choices(&response))?;
        }
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

async fn request(client: &Client, args: &mut GenerateArgs, prompt: String) -> Result<GenerateRequest> {
    let mut request = if args.raw {
        GenerateRequest::prompt(prompt)
    } else {
        let system = args.system.as_ref().map(Message::system);
        let asked = system.into_iter().chain([Message::user(prompt)]);
        match &args.begun {
            Some(begun) => GenerateRequest::continuing(asked.chain([Message::assistant(begun)])),
            None => GenerateRequest::messages(asked),
        }
    };
    if let Some(Input::Chat(chat)) = &mut request.input {
        chat.allow_control_tokens = args.allow_control_tokens;
    }
    if let Some(name) = &args.session {
        request.model = open_session(client, name, args.model.as_deref()).await?.model;
        request.session.clone_from(name);
    } else {
        request.model = choose_model(client, args.model.as_deref()).await?;
    }
    request.response_format = args.format.read()?;
    args.sampling.settle(client, &request.model).await?;
    args.sampling.apply(&mut request);
    args.asking.apply(&mut request)?;
    (request.n, request.best_of) = (args.n, args.best_of);
    Ok(request)
}

fn read_prompt(given: Option<&str>, no_stdin: bool) -> Result<String> {
    let prompt = match given {
        None if io::stdin().is_terminal() => {
            return Err(Failure::Usage("a prompt is required; `-` reads it from stdin".into()));
        }
        Some("-") if no_stdin => {
            return Err(Failure::Usage("`-` reads stdin, which --no-stdin leaves unread".into()));
        }
        // A command before the pipe failed, or the wrong file was named: nobody wants an answer to nothing.
        None | Some("-") => read_stdin()?.ok_or_else(|| Failure::Usage("stdin is empty".into()))?,
        Some(prompt) if no_stdin || !stdin_may_have_text()? => prompt.to_owned(),
        Some(prompt) => with_stdin(prompt)?,
    };
    if prompt.is_empty() {
        return Err(Failure::Usage("the prompt is empty".into()));
    }
    Ok(prompt)
}

/// Tells whether stdin is a pipe, a socket (sshd and some programs make one where others make a pipe) or a
/// file. A terminal or the null device is left unread.
fn stdin_may_have_text() -> io::Result<bool> {
    let kind = File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata()?.file_type();
    Ok(kind.is_fifo() || kind.is_socket() || kind.is_file())
}

/// Returns the prompt and the text of stdin. An empty stdin, which cron gives to its jobs, adds nothing; a
/// note says so, since it may also come from a command that failed.
fn with_stdin(prompt: &str) -> Result<String> {
    if let Some(text) = read_stdin()? {
        return Ok(format!("{prompt}\n\n{text}"));
    }
    out::note("stdin is empty: only the prompt is sent\n");
    Ok(prompt.to_owned())
}

/// Reads stdin to its end; None if it holds only white space.
fn read_stdin() -> Result<Option<String>> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    // Only the final line end, which every text file has, is not part of the prompt.
    text.truncate(text.strip_suffix('\n').unwrap_or(&text).len());
    Ok((!text.trim().is_empty()).then_some(text))
}
