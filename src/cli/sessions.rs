//! `mlxd sessions`: the caller's sessions: list, show, change, copy, cut, delete.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use mlxd::clock::{Clock as _, SystemClock};
use mlxd_client::Client;
use mlxd_client::v1::{
    DeleteSessionRequest, ForkSessionRequest, GetSessionRequest, ListSessionsRequest, Role, Session,
    TruncateSessionRequest, UpdateSessionRequest, truncate_session_request::To,
    update_session_request::Lifetime,
};

use super::connect::ConnectArgs;
use super::failure::Result;
use super::{format, json, out};

const EXAMPLES: &str = "\
Examples:
  mlxd sessions
  mlxd sessions --label project=trip --json
  mlxd sessions show trip
  mlxd sessions label trip project=trip kind=chat
  mlxd sessions pin trip
  mlxd sessions fork trip trip-2 --turns 3
  mlxd sessions truncate trip --messages 5
  mlxd sessions rm trip trip-2

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
    /// Only sessions of this model
    #[arg(short, long, value_name = "MODEL", default_value = "")]
    model: String,
    /// Only sessions with this label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Only sessions whose name begins with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,
    /// Only pinned sessions
    #[arg(long)]
    pinned: bool,
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

fn label(text: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
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
    }
}

fn named(name: String) -> UpdateSessionRequest {
    UpdateSessionRequest { name, ..Default::default() }
}

async fn update(client: &Client, request: UpdateSessionRequest) -> Result<()> {
    told(&client.update_session(request).await?)
}

async fn list(client: &Client, args: ListArgs) -> Result<()> {
    let ListArgs { model, label, prefix: name_prefix, pinned, json } = args;
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
pub(crate) fn table(sessions: &[Session], now: SystemTime) -> String {
    let header = ["SESSION", "MODEL", "TURNS", "TOKENS", "CACHED", "SIZE", "KV", "STATE", "UNTIL", "LABELS"];
    let header = header.map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(sessions.iter().map(|one| row(one, now))).collect();
    format::table(&rows)
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
        json::session_state(session),
        until(session, now),
        labels.join(" "),
    ]
}

/// Returns how much longer a session stays if nobody uses it.
fn until(session: &Session, now: SystemTime) -> String {
    if session.pinned {
        return "pinned".to_owned();
    }
    let end = session.expire_time.and_then(|time| SystemTime::try_from(time).ok());
    let left = |end: SystemTime| end.duration_since(now).unwrap_or(Duration::ZERO);
    end.map_or_else(|| "-".to_owned(), |end| format!("in {}", format::duration(left(end))))
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
            content_bytes: 600,
            state: SessionState::Hot.into(),
            expire_time: Some(prost_types::Timestamp { seconds: 61, nanos: 0 }),
            labels: [("b", "2"), ("a", "1")].map(|(key, value)| (key.into(), value.into())).into(),
            ..Session::default()
        };
        let pinned = Session { name: "kept".into(), pinned: true, labels: [].into(), ..session.clone() };
        assert_eq!(
            table(&[session, pinned], now),
            "SESSION  MODEL  TURNS  TOKENS  CACHED  SIZE   KV        STATE  UNTIL         LABELS\n\
             trip     tiny   0      12      11      600 B  2.00 KiB  hot    in 1 min 1 s  a=1 b=2\n\
             kept     tiny   0      12      11      600 B  2.00 KiB  hot    pinned\n"
        );
    }

    #[test]
    fn a_label_is_a_key_and_a_value() {
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(label("a="), Ok(("a".into(), String::new())));
        assert!(label("a").is_err());
    }
}
