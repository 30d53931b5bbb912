//! `mlxd chat`: a conversation in a session of the daemon, so that only new tokens are prefilled. Offers line
//! editing on a terminal; in a pipe each line is a turn.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use clap::{Args, ValueEnum};
use mlxd_client::v1::{
    DeleteSessionRequest, ForkSessionRequest, GenerateFinished, GenerateRequest, GetSessionRequest, History,
    Message, Session, TruncateSessionRequest, truncate_session_request,
};
use mlxd_client::{Client, Request};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::answer::{SamplingArgs, create_session, open_session, stream_to_stdout};
use super::asking::AskingArgs;
use super::connect::ConnectArgs;
use super::failure::{Failure, Result};
use super::interrupts::Interrupts;
use super::{format, json, out};

const EXAMPLES: &str = "\
Examples:
  mlxd chat
  mlxd chat -m SmolLM2-135M-Instruct --system \"Answer in one sentence.\"
  mlxd chat --session trip
  printf 'Name a city.\\nAnd its river?\\n' | mlxd chat

Without --session the conversation is deleted at the end; with it, the next chat continues it.";

const HELP: &str = "\
/undo        undo the last turn
/reset       undo all turns
/fork NAME   copy the conversation to a new session
/stats       show the speed of the last answer and the size of the session
/exit        quit, like Ctrl-D; Ctrl-C stops an answer
";

/// Longest wait for the session to be deleted at the end, lest a daemon that stands still hold the program.
const DELETE_TIMEOUT: Duration = Duration::from_secs(2);

/// Chat with a model.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ChatArgs {
    /// Model to use [default: the session's, else the only resident one]
    #[arg(short, long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Session to continue and keep; created if it does not exist
    #[arg(long, value_name = "NAME")]
    pub(crate) session: Option<String>,
    /// System message, sent with the first turn
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Fate of past turns that the chat template writes differently now [default: the session's, else auto]
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) history: Option<Past>,
    #[command(flatten)]
    pub(crate) asking: AskingArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

/// What happens to past turns.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Past {
    /// Keep them where the template has a switch for past reasoning, else write them again
    Auto,
    /// Keep them: only new messages are prefilled
    Append,
    /// Write them again
    Rerender,
}

/// A running conversation.
struct Chat {
    client: Client,
    session: String,
    turns: u32,
    system: Option<String>,
    history: History,
    asking: AskingArgs,
    sampling: SamplingArgs,
    last: Option<GenerateFinished>,
}

/// Meaning of a typed line.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Say(&'a str),
    Help,
    Undo,
    Reset,
    Fork(&'a str),
    Stats,
    Exit,
    Unknown(&'a str),
}

impl Past {
    fn to_wire(self) -> History {
        match self {
            Self::Auto => History::Auto,
            Self::Append => History::Append,
            Self::Rerender => History::Rerender,
        }
    }
}

/// Runs the command.
pub(crate) fn run(runtime: &Runtime, args: ChatArgs) -> Result<()> {
    let mut interrupts = Interrupts::listen(runtime)?;
    let client = runtime.block_on(interrupts.or(args.connect.connect()))?;
    with_client(runtime, &mut interrupts, client, args)
}

/// Chats with a daemon that is connected.
pub(crate) fn with_client(
    runtime: &Runtime,
    interrupts: &mut Interrupts,
    client: Client,
    args: ChatArgs,
) -> Result<()> {
    let ChatArgs { model, session, system, history, asking, sampling, connect: _ } = args;
    let opened = runtime.block_on(interrupts.or(async {
        match &session {
            Some(name) => open_session(&client, name, model.as_deref()).await,
            None => create_session(&client, "", model.as_deref()).await,
        }
    }))?;
    let turns = u32::try_from(opened.turns.len()).unwrap_or(u32::MAX);
    if turns > 0 {
        runtime.block_on(interrupts.or(show_past(&client, &opened)))?;
    }
    let history = history.map_or(History::Unspecified, Past::to_wire);
    let (session_name, last) = (opened.name, None);
    let mut chat = Chat { client, session: session_name, turns, system, history, asking, sampling, last };
    let settled = runtime.block_on(interrupts.or(chat.sampling.settle(&chat.client, &opened.model)));
    let outcome = settled.and_then(|()| {
        if io::stdin().is_terminal() {
            on_terminal(runtime, &mut chat, &opened.model)
        } else {
            runtime.block_on(interrupts.or(from_pipe(&mut chat)))
        }
    });
    if session.is_none() {
        let mut request = Request::new(DeleteSessionRequest { name: chat.session });
        request.set_timeout(DELETE_TIMEOUT);
        // Best effort: a session that stays behind expires by its ttl.
        _ = runtime.block_on(chat.client.delete_session(request));
    }
    outcome
}

/// Says where a session that is continued stands: its size, and its last question and answer.
async fn show_past(client: &Client, session: &Session) -> Result<()> {
    let Session { name, turns, token_count, cached_token_count, .. } = session;
    let turns = turns.len();
    out::note(&format!("{name} goes on: {turns} turns, {token_count} tokens, {cached_token_count} cached\n"));
    let messages = client.session_messages(name).await?;
    for message in messages.iter().rev().take(2).rev() {
        let role = json::enum_name(message.role().as_str_name(), "ROLE_");
        out::note(&format!("[{role}] {}\n", shortened(&message.text())));
    }
    Ok(())
}

/// Returns a text on one line, of limited length.
fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 300;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Chats with a person; Ctrl-C stops an answer.
fn on_terminal(runtime: &Runtime, chat: &mut Chat, model: &str) -> Result<()> {
    let mut editor = DefaultEditor::new().map_err(|error| Failure::Local(error.into()))?;
    out::note(&format!("{model}, session {}; /help lists commands\n", chat.session));
    while let Some(line) = read_line(&mut editor)? {
        let input = parse(&line);
        if input == Input::Exit {
            break;
        }
        // A Ctrl-C after the last answer does not count.
        let mut interrupts = Interrupts::listen(runtime)?;
        match runtime.block_on(interrupts.or(chat.obey(&input))) {
            Ok(()) => {}
            Err(failure @ (Failure::Client(_) | Failure::Usage(_))) => failure.print(),
            Err(Failure::Interrupted) => out::note("(stopped; the turn is undone)\n"),
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

/// Returns the next line, trimmed; None at the end of the input.
fn read_line(editor: &mut DefaultEditor) -> Result<Option<String>> {
    match editor.readline("> ") {
        Ok(line) => {
            // History is a convenience; a failure to record the line is ignored.
            _ = editor.add_history_entry(line.as_str());
            Ok(Some(line.trim().to_owned()))
        }
        Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
        Err(ReadlineError::Eof) => Ok(None),
        Err(error) => Err(Failure::Local(error.into())),
    }
}

/// Takes each line of stdin as a turn, up to the first failure.
async fn from_pipe(chat: &mut Chat) -> Result<()> {
    let mut lines = stdin_lines()?;
    while let Some(line) = lines.recv().await {
        let line = line?;
        let input = parse(line.trim());
        if input == Input::Exit {
            break;
        }
        chat.obey(&input).await?;
    }
    Ok(())
}

/// Reads stdin on a thread of its own, which ends with the process: a read cannot be interrupted.
fn stdin_lines() -> io::Result<mpsc::Receiver<io::Result<String>>> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        for line in io::stdin().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("stdin".into()).spawn(read)?;
    Ok(receiver)
}

impl Chat {
    async fn obey(&mut self, input: &Input<'_>) -> Result<()> {
        match *input {
            Input::Say("") | Input::Exit => Ok(()),
            Input::Say(text) => self.say(text).await,
            Input::Undo => self.keep_turns(self.turns.saturating_sub(1)).await,
            Input::Reset => self.keep_turns(0).await,
            Input::Fork(name) => self.fork(name).await,
            Input::Stats => self.stats().await,
            Input::Help => {
                out::note(HELP);
                Ok(())
            }
            Input::Unknown(command) => {
                Err(Failure::Usage(format!("unknown command {command}; /help lists the commands")))
            }
        }
    }

    async fn say(&mut self, text: &str) -> Result<()> {
        let system = self.system.as_ref().filter(|_| self.turns == 0).map(Message::system);
        let messages = system.into_iter().chain([Message::user(text)]);
        let mut request =
            GenerateRequest { session: self.session.clone(), ..GenerateRequest::messages(messages) };
        request.set_history(self.history);
        self.sampling.apply(&mut request);
        self.asking.apply(&mut request)?;
        let end = stream_to_stdout(&self.client, request).await?;
        self.last = Some(end);
        self.turns += 1;
        Ok(())
    }

    async fn keep_turns(&mut self, turns: u32) -> Result<()> {
        let to = Some(truncate_session_request::To::TurnCount(turns));
        let name = self.session.clone();
        let session = self
            .client
            .truncate_session(TruncateSessionRequest { name, to, expected_token_count: None })
            .await?;
        self.turns = turns;
        out::note(&format!("turns: {turns}, tokens: {}\n", session.token_count));
        Ok(())
    }

    async fn fork(&self, name: &str) -> Result<()> {
        if name.is_empty() {
            return Err(Failure::Usage("/fork needs a name".into()));
        }
        let request = ForkSessionRequest {
            name: self.session.clone(),
            new_name: name.to_owned(),
            ..ForkSessionRequest::default()
        };
        self.client.fork_session(request).await?;
        out::note(&format!("copied; `mlxd chat --session {name}` continues there\n"));
        Ok(())
    }

    async fn stats(&self) -> Result<()> {
        let name = self.session.clone();
        let found =
            self.client.get_session(GetSessionRequest { name, ..GetSessionRequest::default() }).await?;
        let tokens = found.session.map_or(0, |session| session.token_count);
        out::note(&format!("session {}, turns: {}, tokens: {tokens}\n", self.session, self.turns));
        if let Some(end) = &self.last {
            let (usage, timings) = (end.usage.unwrap_or_default(), end.timings.unwrap_or_default());
            out::note(&format!("{}\n", format::speed(&usage, &timings)));
        }
        Ok(())
    }
}

fn parse(line: &str) -> Input<'_> {
    if !line.starts_with('/') {
        return Input::Say(line);
    }
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    match (command, rest.trim()) {
        ("/help", "") => Input::Help,
        ("/undo", "") => Input::Undo,
        ("/reset", "") => Input::Reset,
        ("/fork", name) => Input::Fork(name),
        ("/stats", "") => Input::Stats,
        ("/exit" | "/quit", "") => Input::Exit,
        _ => Input::Unknown(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_said_unless_it_starts_with_a_slash() {
        assert_eq!(parse("what is 1/2?"), Input::Say("what is 1/2?"));
        assert_eq!(parse("/undo"), Input::Undo);
        assert_eq!(parse("/fork  b "), Input::Fork("b"));
        assert_eq!(parse("/etc/hosts is what?"), Input::Unknown("/etc/hosts is what?"));
        assert_eq!(parse("/reset now"), Input::Unknown("/reset now"));
    }
}
