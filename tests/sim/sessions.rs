//! What clients do with sessions: they make them, take turns, pin, fork, truncate and delete them.

use std::time::Duration;

use tokio::sync::oneshot;

use super::request::{Request, Turn, raw_turn};
use super::world::{MODELS, PRINCIPALS, World};
use crate::engine::Command;
use crate::error::Error;
use crate::ids::{SessionKey, SessionName};
use crate::session::{History, NewFork, NewSession, Terms, TermsChange};

impl World {
    fn some_session(&mut self) -> Option<SessionKey> {
        let count = self.kept.len() as u64;
        if count == 0 {
            return None;
        }
        let place = usize::try_from(self.random.below(count)).unwrap();
        self.kept.keys().nth(place).cloned()
    }

    fn fresh_name(&mut self) -> SessionName {
        self.sessions_made += 1;
        format!("s{}", self.sessions_made).as_str().into()
    }

    /// Begins a turn of a session, at times with an outdated count.
    pub(super) fn session_turn(&mut self) {
        let Some(key) = self.some_session().filter(|_| !self.random.once_in(4)) else {
            return self.make_session();
        };
        let known = self.kept[&key].len();
        let stale = self.random.once_in(6);
        let expected = u32::try_from(known + usize::from(stale)).unwrap();
        let request = raw_turn(expected);
        let (hold, stopped) = oneshot::channel();
        match self.book.begin(&key, &request, hold) {
            Ok((guard, start)) => {
                assert!(!stale, "a stale count does not begin a turn");
                assert_eq!(*start.tokens, *self.kept[&key], "a turn builds on those that ended well");
                self.generate(Some((Turn { guard, stopped }, start.model, start.tokens.to_vec())));
            }
            Err(Error::SessionMoved { .. }) => assert!(stale, "{key} has not moved"),
            Err(Error::SessionBusy(_)) => {
                let has_turn =
                    |request: &Request| request.turn.as_ref().is_some_and(|turn| *turn.guard.key() == key);
                assert!(self.requests.iter().any(has_turn), "{key} is busy for a reason");
            }
            Err(Error::SessionNotFound(_)) => drop(self.kept.remove(&key)),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn make_session(&mut self) {
        let name = self.fresh_name();
        let key = SessionKey { owner: format!("p{}", self.random.below(PRINCIPALS)).as_str().into(), name };
        let ttl = Duration::from_secs(1 + self.random.below(30));
        let terms = Terms { pinned: self.random.once_in(8), ..Terms::after_use(ttl) };
        let (model, history, cache_salt) = (MODELS[0].into(), History::Auto, "".into());
        match self.book.create(NewSession { key: key.clone(), model, terms, history, cache_salt }) {
            Ok(_) => drop(self.kept.insert(key, vec![])),
            Err(Error::SessionLimit { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Changes a session in one way or another.
    pub(super) fn session_changes(&mut self) {
        let Some(key) = self.some_session() else { return };
        match self.random.below(4) {
            0 => {
                let pinned = self.random.once_in(2);
                let change = TermsChange { pinned: Some(pinned), ..TermsChange::default() };
                if self.book.update(&key, change).is_ok() {
                    self.engine.command(Command::PinSession(key, pinned));
                }
            }
            1 => self.fork(key),
            2 => {
                let length = usize::try_from(self.random.below(self.kept[&key].len() as u64 + 1)).unwrap();
                let cut = self.book.with(&key, |session, now| session.truncate_tokens(length, now));
                if cut.is_ok() {
                    self.kept.get_mut(&key).unwrap().truncate(length);
                }
            }
            _ => {
                if self.book.delete(&key).is_ok() {
                    self.engine.command(Command::Forget(key.clone()));
                }
                self.kept.remove(&key);
            }
        }
    }

    /// Copies a session, or its first turns.
    fn fork(&mut self, key: SessionKey) {
        let name = self.fresh_name();
        let tokens = self.kept[&key].clone();
        let turns = self.book.with(&key, |session, _| Ok(session.view().turns));
        let turns = turns.unwrap_or_default();
        let at = self.random.once_in(2).then(|| self.random.below(turns.len() as u64 + 1));
        let at = at.map(|at| u32::try_from(at).unwrap());
        let ends = at.map(|at| at.checked_sub(1).map_or(0, |last| turns[last as usize].token_count));
        let change = TermsChange { pinned: Some(self.random.once_in(6)), ..TermsChange::default() };
        let fork = NewFork { name: name.clone(), change, turn_count: at, expected_token_count: None };
        if self.book.fork(&key, fork).is_ok() {
            let tokens = tokens[..ends.unwrap_or(tokens.len())].to_vec();
            self.kept.insert(SessionKey { owner: key.owner, name }, tokens);
        }
    }
}
