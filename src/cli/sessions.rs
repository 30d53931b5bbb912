//! `mlxd sessions`: the caller's sessions: list, show, change, copy, cut, delete. `session_files` exports and
//! imports them, `session_watch` watches them.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use mlxd::clock::{Clock as _, SystemClock};
use mlxd_client::Client;
use mlxd_client::v1::{
    DeleteSessionRequest, ForkSessionRequest, GetSessionRequest, ListSessionsRequest, Role,
    SaveSessionRequest, SaveSessionResponse, Session, TruncateSessionRequest, UpdateSessionRequest,
    truncate_session_request::To, update_session_request::Lifetime,
};

use super::connect::ConnectArgs;
use super::failure::Result;
use super::session_filter::{WhichArgs, label};
use super::{format, json, out, session_files, session_watch};

const EXAMPLES: &str = "\
Examples:
  mlxd sessions
  mlxd sessions --label project=trip --json
  mlxd sessions show trip
  mlxd sessions label trip project=trip kind=chat
  mlxd sessions pin trip
  mlxd sessions save trip
  mlxd sessions fork trip trip-2 --turns 3
  mlxd sessions truncate trip --messages 5
  mlxd sessions rm trip trip-2
  mlxd sessions export trip trip.mlxd
  mlxd sessions import trip.mlxd --as trip-3
  mlxd sessions watch

`mlxd chat --session NAME` continues one.";

/// List, show, change, copy and delete your sessions.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct SessionsArgs {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    list: ListArgs,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Debug)]
struct ListArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// Print one JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show a session and its messages
    Show {
        /// Session
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Delete sessions; a running turn is cancelled
    Rm {
        /// Sessions
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Copy a session, or its first turns
    Fork {
        /// Session
        name: String,
        /// Name of the copy
        new_name: String,
        /// Number of turns to copy [default: all]
        #[arg(long, value_name = "N")]
        turns: Option<u32>,
    },
    /// Write a session's cached KV to disk, so that it goes on at once after a restart
    Save {
        /// Session
        name: String,
    },
    /// Cut a session back
    Truncate {
        /// Session
        name: String,
        #[command(flatten)]
        to: ToArgs,
    },
    /// Add, replace and remove labels
    Label {
        /// Session
        name: String,
        /// Labels to add or replace
        #[arg(value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// Label to remove; may be repeated
        #[arg(long, value_name = "KEY")]
        remove: Vec<String>,
    },
    /// Keep a session until it is deleted
    Pin {
        /// Session
        name: String,
    },
    /// Let a session expire again
    Unpin {
        /// Session
        name: String,
    },
    /// Change how long a session stays after its last use
    Ttl {
        /// Session
        name: String,
        /// Seconds
        seconds: u32,
    },
    /// Write all of a session to one file, which any mlxd can import
    Export {
        /// Session
        name: String,
        /// File, which is replaced if it exists; `-` is stdout
        file: PathBuf,
    },
    /// Make a session of a file that was exported
    Import(session_files::ImportArgs),
    /// Show what becomes of your sessions, until Ctrl-C
    Watch(session_watch::WatchArgs),
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct ToArgs {
    /// Number of turns to keep
    #[arg(long, value_name = "N")]
    turns: Option<u32>,
    /// Number of messages to keep: to the end of a turn, or before its answer
    #[arg(long, value_name = "N")]
    messages: Option<u32>,
    /// Number of tokens to keep
    #[arg(long, value_name = "N")]
    tokens: Option<u32>,
}

/// Runs the command.
pub(crate) async fn run(args: SessionsArgs) -> Result<()> {
    let SessionsArgs { action, list, connect } = args;
    let client = connect.connect().await?;
    match action {
        None => self::list(&client, list).await,
        Some(Action::Show { name, json }) => show(&client, name, json).await,
        Some(Action::Rm { names }) => {
            for name in names {
                client.delete_session(DeleteSessionRequest { name }).await?;
            }
            Ok(())
        }
        Some(Action::Fork { name, new_name, turns: turn_count }) => {
            let request = ForkSessionRequest { name, new_name, turn_count, ..Default::default() };
            told(&client.fork_session(request).await?)
        }
        Some(Action::Save { name }) => {
            let request = SaveSessionRequest { name: name.clone(), expected_token_count: None };
            let SaveSessionResponse { session, token_count, bytes } = client.save_session(request).await?;
            let all = session.unwrap_or_default().token_count;
            let size = format::bytes(bytes);
            Ok(out::data(&format!("{name}: the KV of {token_count} of {all} tokens is on disk, {size}\n"))?)
        }
        Some(Action::Truncate { name, to: ToArgs { turns, messages, tokens } }) => {
            let to = turns.map(To::TurnCount).or(messages.map(To::MessageCount));
            let to = to.or(tokens.map(To::TokenCount));
            let request = TruncateSessionRequest { name, to, expected_token_count: None };
            told(&client.truncate_session(request).await?)
        }
        Some(Action::Label { name, labels, remove: remove_labels }) => {
            let labels = labels.into_iter().collect();
            update(&client, UpdateSessionRequest { labels, remove_labels, ..named(name) }).await
        }
        Some(Action::Pin { name }) => {
            update(&client, UpdateSessionRequest { pinned: Some(true), ..named(name) }).await
        }
        Some(Action::Unpin { name }) => {
            update(&client, UpdateSessionRequest { pinned: Some(false), ..named(name) }).await
        }
        Some(Action::Ttl { name, seconds }) => {
            let lifetime = Some(Lifetime::Ttl(prost_types::Duration { seconds: seconds.into(), nanos: 0 }));
            update(&client, UpdateSessionRequest { lifetime, ..named(name) }).await
        }
        Some(Action::Export { name, file }) => session_files::export(&client, name, &file).await,
        Some(Action::Import(args)) => told(&session_files::import(&client, args).await?),
        Some(Action::Watch(args)) => session_watch::run(&client, args).await,
    }
}

fn named(name: String) -> UpdateSessionRequest {
    UpdateSessionRequest { name, ..Default::default() }
}

async fn update(client: &Client, request: UpdateSessionRequest) -> Result<()> {
    told(&client.update_session(request).await?)
}

async fn list(client: &Client, args: ListArgs) -> Result<()> {
    let ListArgs { which: WhichArgs { model, label, prefix: name_prefix, pinned }, json } = args;
    let labels = label.into_iter().collect();
    let pinned = pinned.then_some(true);
    let request = ListSessionsRequest { model, labels, name_prefix, pinned, ..Default::default() };
    let sessions = client.list_all_sessions_of(request).await?;
    if json {
        return Ok(json::print(&sessions.iter().map(json::session).collect::<Vec<_>>().into())?);
    }
    Ok(out::data(&table(&sessions, SystemClock::new().wall()))?)
}

async fn show(client: &Client, name: String, json: bool) -> Result<()> {
    let request = GetSessionRequest { name: name.clone(), ..Default::default() };
    let session = client.get_session(request).await?.session.unwrap_or_default();
    let messages = client.session_messages(&name).await?;
    let role = |role: Role| json::enum_name(role.as_str_name(), "ROLE_");
    if json {
        let mut shown = json::session(&session);
        let messages = messages
            .iter()
            .map(|message| serde_json::json!({ "role": role(message.role()), "content": message.text() }));
        shown["messages"] = messages.collect();
        return Ok(json::print(&shown)?);
    }
    let mut page = table(std::slice::from_ref(&session), SystemClock::new().wall());
    for message in &messages {
        page.push_str(&format!("\n[{}]\n{}\n", role(message.role()), message.text()));
    }
    Ok(out::data(&page)?)
}

/// Says what a session is now.
fn told(session: &Session) -> Result<()> {
    let Session { name, token_count, turns, .. } = session;
    Ok(out::data(&format!("{name}: {} turns, {token_count} tokens\n", turns.len()))?)
}

/// Returns sessions as a table at the time `now`.
fn table(sessions: &[Session], now: SystemTime) -> String {
    let header = [
        "SESSION", "MODEL", "TURNS", "TOKENS", "CACHED", "SIZE", "KV", "ON DISK", "STATE", "UNTIL", "LABELS",
    ];
    format::page(&header, sessions.iter().map(|session| row(session, now)))
}

fn row(session: &Session, now: SystemTime) -> Vec<String> {
    let mut labels: Vec<String> =
        session.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.sort_unstable();
    vec![
        session.name.clone(),
        session.model.clone(),
        session.turns.len().to_string(),
        session.token_count.to_string(),
        session.cached_token_count.to_string(),
        format::bytes(session.content_bytes),
        format::bytes(session.kv_bytes),
        if session.snapshot_bytes == 0 { "-".to_owned() } else { format::bytes(session.snapshot_bytes) },
        json::session_state(session),
        format::until(session.pinned, session.expire_time, "-", now),
        labels.join(" "),
    ]
}

#[cfg(test)]
mod tests {
    use mlxd_client::v1::SessionState;

    use super::*;

    #[test]
    fn sessions_are_shown_with_their_state_and_labels() {
        let now = SystemTime::UNIX_EPOCH;
        let session = Session {
            name: "trip".into(),
            model: "tiny".into(),
            token_count: 12,
            cached_token_count: 11,
            kv_bytes: 2048,
            snapshot_bytes: 4096,
            content_bytes: 600,
            state: SessionState::Hot.into(),
            expire_time: Some(prost_types::Timestamp { seconds: 61, nanos: 0 }),
            labels: [("b", "2"), ("a", "1")].map(|(key, value)| (key.into(), value.into())).into(),
            ..Session::default()
        };
        let pinned = Session {
            name: "kept".into(),
            pinned: true,
            labels: [].into(),
            snapshot_bytes: 0,
            ..session.clone()
        };
        assert_eq!(
            table(&[session, pinned], now),
            "SESSION  MODEL  TURNS  TOKENS  CACHED  SIZE   KV        ON DISK   STATE  UNTIL         LABELS\n\
             trip     tiny   0      12      11      600 B  2.00 KiB  4.00 KiB  hot    in 1 min 1 s  a=1 b=2\n\
             kept     tiny   0      12      11      600 B  2.00 KiB  -         hot    pinned\n"
        );
    }
}
