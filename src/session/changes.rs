//! The sessions that changed since somebody last took note: what the store has to write. Every change has a
//! number; who waits until a change is written waits for its number.

use std::collections::BTreeSet;
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
}

/// Changes that were taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The sessions: made, changed or gone.
    pub keys: BTreeSet<SessionKey>,
    /// The number of the last change among them, or before.
    pub number: u64,
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
        if !state.keys.contains(key) {
            state.keys.insert(key.clone());
        }
        drop(state);
        self.wake.notify_all();
    }

    /// Returns the number of the last change.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.state().number
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
        Taken { keys: std::mem::take(&mut state.keys), number: state.number, ended: state.ended }
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
    fn changes_are_numbered_and_taken_once() {
        let changes = Changes::default();
        changes.note(&key("before"));
        changes.listen();
        ["b", "a", "b"].into_iter().for_each(|name| changes.note(&key(name)));
        assert_eq!(changes.number(), 3);
        let taken = changes.take(None);
        assert_eq!((taken.keys.into_iter().collect::<Vec<_>>(), taken.number), (vec![key("a"), key("b")], 3));
        let nothing = Taken { number: 3, ..Taken::default() };
        assert_eq!(changes.take(Some(Duration::ZERO)), nothing);
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
