//! `mlxd sessions watch`: what becomes of the caller's sessions, a line each.

use clap::Args;
use mlxd_client::Client;
use mlxd_client::v1::{SessionChange, WatchSessionsRequest, watch_sessions_response::Event};

use super::failure::Result;
use super::session_filter::WhichArgs;
use super::{json, out};

#[derive(Args, Debug)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// Leave out the sessions that are there already
    #[arg(long)]
    changes: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs the command; it ends with the daemon.
pub(crate) async fn run(client: &Client, args: WatchArgs) -> Result<()> {
    let WatchArgs { which, changes: changes_only, json } = args;
    let WhichArgs { model, label, prefix: name_prefix, pinned } = which;
    let labels = label.into_iter().collect();
    let pinned = pinned.then_some(true);
    let request = WatchSessionsRequest { model, labels, name_prefix, pinned, changes_only };
    let mut stream = client.watch_sessions(request).await?;
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Change(change) if json => json::print(&json::session_change(&change))?,
            Event::Change(change) => out::data(&line(&change))?,
            Event::Ready(_) if json => json::print(&serde_json::json!({ "kind": "ready" }))?,
            Event::Ready(_) => {}
        }
    }
    Ok(())
}

/// Returns a change as a line.
fn line(change: &SessionChange) -> String {
    let kind = json::enum_name(change.kind().as_str_name(), "SESSION_CHANGE_KIND_");
    let SessionChange { name, session, changed_fields, merged_changes, .. } = change;
    let state = session.as_ref().map_or_else(String::new, |session| {
        let (turns, tokens) = (session.turns.len(), session.token_count);
        format!(": {turns} turns, {tokens} tokens, {}", json::session_state(session))
    });
    let fields =
        if changed_fields.is_empty() { String::new() } else { format!(" ({})", changed_fields.join(", ")) };
    let merged =
        if *merged_changes == 0 { String::new() } else { format!(", after {merged_changes} more changes") };
    format!("{kind} {name}{state}{fields}{merged}\n")
}

#[cfg(test)]
mod tests {
    use mlxd_client::v1::{Session, SessionChangeKind, SessionState};

    use super::*;

    #[test]
    fn a_change_is_a_line() {
        let session = Session { token_count: 12, state: SessionState::Hot.into(), ..Session::default() };
        let change = SessionChange {
            kind: SessionChangeKind::Changed.into(),
            name: "trip".into(),
            session: Some(session),
            changed_fields: vec!["busy".into(), "turns".into()],
            merged_changes: 2,
        };
        assert_eq!(
            line(&change),
            "changed trip: 0 turns, 12 tokens, hot (busy, turns), after 2 more changes\n"
        );
        let kind = SessionChangeKind::Deleted.into();
        let gone = SessionChange { kind, name: "trip".into(), ..SessionChange::default() };
        assert_eq!(line(&gone), "deleted trip\n");
    }
}
