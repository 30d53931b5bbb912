//! How a chat turn goes on from its session, on the wire.

use super::pb;
use crate::error::Error;
use crate::service::{History, HistoryOutcome};

/// Reads a `history`; None is unspecified.
pub(super) fn from_wire(sent: i32) -> Result<Option<History>, Error> {
    match pb::History::try_from(sent) {
        Ok(pb::History::Unspecified) => Ok(None),
        Ok(pb::History::Auto) => Ok(Some(History::Auto)),
        Ok(pb::History::Append) => Ok(Some(History::Append)),
        Ok(pb::History::Rerender) => Ok(Some(History::Rerender)),
        Err(_) => Err(Error::field("history", "unknown history")),
    }
}

/// Writes a session's `history`.
pub(super) fn to_wire(history: History) -> i32 {
    let history = match history {
        History::Auto => pb::History::Auto,
        History::Append => pb::History::Append,
        History::Rerender => pb::History::Rerender,
    };
    history.into()
}

/// Writes what a turn did.
pub(super) fn outcome(outcome: Option<HistoryOutcome>) -> i32 {
    let outcome = match outcome {
        None => pb::HistoryOutcome::Unspecified,
        Some(HistoryOutcome::Continued) => pb::HistoryOutcome::Continued,
        Some(HistoryOutcome::Appended) => pb::HistoryOutcome::Appended,
        Some(HistoryOutcome::Rerendered) => pb::HistoryOutcome::Rerendered,
    };
    outcome.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_history_comes_back_as_it_was_and_an_unknown_one_is_refused() {
        for history in [History::Auto, History::Append, History::Rerender] {
            assert_eq!(from_wire(to_wire(history)), Ok(Some(history)));
        }
        assert_eq!(from_wire(0), Ok(None));
        assert!(matches!(from_wire(9), Err(Error::InvalidField { field, .. }) if field == "history"));
    }
}
