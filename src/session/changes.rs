//! The sessions that changed since somebody last took note: what the store has to write. Every change has a
//! number; who waits until a session's change is dealt with waits for its number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ids::SessionKey;

/// The changed sessions. Nothing is noted until [`Changes::listen`] says that somebody takes it.
#[derive(Debug, Default)]
pub struct Changes {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    listening: bool,
    ended: bool,
    number: u64,
    keys: BTreeSet<SessionKey>,
    /// Sessions with changes that are not dealt with.
    pending: BTreeMap<SessionKey, Pending>,
}

/// Numbers of a session's changes.
#[derive(Debug)]
struct Pending {
    /// The last one.
    noted: u64,
    /// The last one when it was taken.
    taken: u64,
    /// The last one that is dealt with, or an earlier change.
    settled: u64,
}

/// Changes that were taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The sessions: made, changed or gone.
    pub keys: BTreeSet<SessionKey>,
    /// Whether there will be no more.
    pub ended: bool,
}

impl Changes {
    /// Notes changes from now on.
    pub fn listen(&self) {
        self.state().listening = true;
    }

    /// Returns whether somebody takes what is noted: whether sessions are stored.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.state().listening
    }

    /// Notes a change. Call it while the session is locked, so that who takes it finds what it was.
    pub fn note(&self, key: &SessionKey) {
        let mut state = self.state();
        if !state.listening {
            return;
        }
        state.number += 1;
        let number = state.number;
        if let Some(pending) = state.pending.get_mut(key) {
            pending.noted = number;
        } else {
            let before = number - 1;
            state.pending.insert(key.clone(), Pending { noted: number, taken: before, settled: before });
        }
        if !state.keys.contains(key) {
            state.keys.insert(key.clone());
        }
        drop(state);
        self.wake.notify_all();
    }

    /// Returns the number of a session's last change, unless all of its changes are dealt with.
    #[must_use]
    pub fn pending(&self, key: &SessionKey) -> Option<u64> {
        self.state().pending.get(key).map(|pending| pending.noted)
    }

    /// Returns whether a session's changes up to a number are dealt with.
    #[must_use]
    pub fn is_settled(&self, key: &SessionKey, number: u64) -> bool {
        self.state().pending.get(key).is_none_or(|pending| pending.settled >= number)
    }

    /// Says that sessions are dealt with as they were when they were taken, or later.
    pub fn settle(&self, keys: &[SessionKey]) {
        let mut state = self.state();
        for key in keys {
            let Some(pending) = state.pending.get_mut(key) else { continue };
            pending.settled = pending.taken;
            if pending.settled == pending.noted {
                state.pending.remove(key);
            }
        }
    }

    /// Returns whether changes wait to be taken.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.state().keys.is_empty()
    }

    /// Says that there will be no more changes.
    pub fn end(&self) {
        self.state().ended = true;
        self.wake.notify_all();
    }

    /// Waits for changes or the end and takes what there is; after `limit`, if one is given, also nothing.
    #[must_use]
    pub fn take(&self, limit: Option<Duration>) -> Taken {
        let mut state = self.state();
        let is_idle = |state: &mut State| state.keys.is_empty() && !state.ended;
        state = match limit {
            Some(limit) => {
                let waited = self.wake.wait_timeout_while(state, limit, is_idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner),
        };
        let State { keys, pending, ended, .. } = &mut *state;
        let keys = std::mem::take(keys);
        for key in &keys {
            if let Some(pending) = pending.get_mut(key) {
                pending.taken = pending.noted;
            }
        }
        Taken { keys, ended: *ended }
    }

    /// Waits for `limit`, or until the end.
    pub fn pause(&self, limit: Duration) {
        let waited = self.wake.wait_timeout_while(self.state(), limit, |state| !state.ended);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> SessionKey {
        SessionKey { owner: "uid:1".into(), name: name.into() }
    }

    #[test]
    fn changes_are_taken_once_and_none_is_noted_before_somebody_listens() {
        let changes = Changes::default();
        changes.note(&key("before"));
        assert_eq!(changes.pending(&key("before")), None);
        changes.listen();
        ["b", "a", "b"].into_iter().for_each(|name| changes.note(&key(name)));
        assert!(changes.has_more());
        let taken = changes.take(None);
        assert_eq!(taken.keys.into_iter().collect::<Vec<_>>(), vec![key("a"), key("b")]);
        assert!(!changes.has_more());
        assert_eq!(changes.take(Some(Duration::ZERO)), Taken::default());
    }

    #[test]
    fn a_change_is_settled_with_its_session_and_not_with_others_or_an_earlier_state() {
        let changes = Changes::default();
        changes.listen();
        ["a", "b"].into_iter().for_each(|name| changes.note(&key(name)));
        let [a, b] = ["a", "b"].map(|name| changes.pending(&key(name)).unwrap());
        drop(changes.take(None));
        changes.note(&key("a"));
        let later = changes.pending(&key("a")).unwrap();
        changes.settle(&[key("a")]);
        assert_eq!((changes.is_settled(&key("a"), a), changes.is_settled(&key("a"), later)), (true, false));
        assert!(!changes.is_settled(&key("b"), b));
        drop(changes.take(None));
        changes.settle(&[key("a"), key("b"), key("c")]);
        assert!(changes.is_settled(&key("a"), later) && changes.is_settled(&key("b"), b));
        assert_eq!(changes.pending(&key("a")), None);
    }

    #[test]
    fn the_end_wakes_who_waits_and_leaves_nothing_behind() {
        let changes = Changes::default();
        changes.listen();
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| changes.take(None));
            changes.end();
            assert!(taker.join().unwrap().ended);
        });
        changes.note(&key("a"));
        let last = changes.take(None);
        assert!(last.ended && last.keys.len() == 1);
        changes.pause(Duration::MAX);
    }
}
