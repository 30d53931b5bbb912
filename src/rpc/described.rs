//! Sessions as they are sent, and their lifetimes as they come.

use std::time::{Duration, SystemTime};

use super::event::{duration, timestamp};
use super::history;
use super::pb;
use crate::count::count;
use crate::error::Error;
use crate::service::{DescribedSession, Lease, SessionView, TurnEnd};

const NANOS_PER_SECOND: i32 = 1_000_000_000;

/// Returns a session as it is sent.
pub(super) fn wire(session: DescribedSession) -> pb::Session {
    let DescribedSession { view, cached, snapshot } = session;
    let SessionView { id: _, key, model, token_count, tokens: _, bytes, turns, busy, terms, .. } = view;
    let SessionView { created, used, history, cache_salt: _, .. } = view;
    let (snapshot_token_count, snapshot_bytes) =
        snapshot.map_or((0, 0), |snapshot| (snapshot.tokens, snapshot.bytes));
    let state = match cached.tokens {
        _ if busy => pb::SessionState::Running,
        0 if snapshot_token_count > 0 => pb::SessionState::Saved,
        0 => pb::SessionState::Cold,
        _ => pb::SessionState::Hot,
    };
    let expire_time = terms.end(used).and_then(timestamp);
    let ttl = match terms.lease {
        Lease::AfterUse(ttl) => duration(ttl),
        Lease::Until(_) => None,
    };
    pb::Session {
        name: key.name.to_string(),
        model: model.to_string(),
        owner: key.owner.to_string(),
        token_count: count(token_count),
        turns: turns.iter().map(turn).collect(),
        busy,
        ttl,
        create_time: timestamp(created),
        last_use_time: timestamp(used),
        expire_time,
        labels: terms.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        pinned: terms.pinned,
        content_bytes: bytes,
        kv_bytes: cached.bytes,
        state: state.into(),
        history: history::to_wire(history),
        cached_token_count: cached.tokens,
        snapshot_token_count,
        snapshot_bytes,
    }
}

fn turn(turn: &TurnEnd) -> pb::Turn {
    let message_count = if turn.raw { 0 } else { count(turn.message_count) };
    pb::Turn { message_count, token_count: count(turn.token_count) }
}

/// Reads a lifetime. prost would repair a malformed one; it is refused.
pub(super) fn time_span(sent: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    let is_plain = sent.seconds >= 0 && (0..NANOS_PER_SECOND).contains(&sent.nanos);
    match Duration::try_from(sent) {
        Ok(ttl) if is_plain => Ok(Some(ttl)),
        Ok(_) | Err(_) => Err(Error::field("ttl", "must be a duration above 0")),
    }
}

/// Reads a time, which must be as the protocol writes one.
pub(super) fn time(sent: Option<prost_types::Timestamp>) -> Result<Option<SystemTime>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    let is_plain = (0..NANOS_PER_SECOND).contains(&sent.nanos);
    match SystemTime::try_from(sent) {
        Ok(time) if is_plain => Ok(Some(time)),
        Ok(_) | Err(_) => Err(Error::field("expire_time", "must be a time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_lifetime_is_refused() {
        let read = |seconds, nanos| time_span(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(time_span(None), Ok(None));
        assert_eq!(read(1, 5), Ok(Some(Duration::new(1, 5))));
        for (seconds, nanos) in [(-1, 0), (1, -5), (1, 1_000_000_000)] {
            let refused = read(seconds, nanos);
            assert!(matches!(refused, Err(Error::InvalidField { field, .. }) if field == "ttl"));
        }
    }
}
