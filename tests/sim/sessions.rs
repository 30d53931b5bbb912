//! What clients do with sessions: they make them, take turns, pin, label, fork, truncate and delete them, all
//! owners under the same names; and what strangers try.

use std::time::Duration;

use tokio::sync::oneshot;

use super::request::{Known, Request, SESSION_LIMITS, Turn, turn};
use super::world::{MODELS, PRINCIPALS, World};
use crate::clock::Clock;
use crate::engine::Command;
use crate::error::Error;
use crate::ids::{Principal, SessionKey, SessionName};
use crate::session::{
    Arrived, History, InputKind, Joined, Labels, Lease, ListPage, NewFork, NewSession, Pieces, Replace,
    SessionFilter, SessionView, Snapshot, Terms, TermsChange, TurnEnd,
};
use crate::store::stepped::Told;

/// Names of sessions, of each owner; more than it may have.
const NAMES: u64 = 9;

fn owner(number: u64) -> Principal {
    format!("p{number}").into()
}

impl World {
    fn some_session(&mut self) -> Option<SessionKey> {
        let count = self.kept.len() as u64;
        if count == 0 {
            return None;
        }
        let place = usize::try_from(self.random.below(count)).unwrap();
        self.kept.keys().nth(place).cloned()
    }

    /// Returns a name, which may be taken.
    fn some_name(&mut self) -> SessionName {
        format!("s{}", self.random.below(NAMES)).into()
    }

    fn some_lease(&mut self) -> Lease {
        let time = Duration::from_millis(500 + self.random.below(30_000));
        if self.random.once_in(6) { Lease::Until(self.clock.wall() + time) } else { Lease::AfterUse(time) }
    }

    fn is_busy(&self, known: &Known) -> bool {
        let runs = |request: &Request| request.turn.as_ref().map(|turn| turn.number);
        known.turn.is_some() && self.requests.iter().any(|request| runs(request) == known.turn)
    }

    /// Returns whether its owner can use a session.
    fn is_alive(&self, key: &SessionKey) -> bool {
        let now = self.clock.wall();
        self.kept.get(key).is_some_and(|known| self.is_busy(known) || !known.is_expired(now))
    }

    fn alive_of<'a>(&'a self, owner: &'a Principal) -> impl Iterator<Item = (&'a SessionKey, &'a Known)> {
        self.kept.iter().filter(move |(key, _)| key.owner == *owner && self.is_alive(key))
    }

    /// Checks why a session cannot be used or made.
    fn refused(&mut self, key: &SessionKey, error: Error) {
        match error {
            Error::SessionNotFound(_) => {
                assert!(!self.is_alive(key), "{key} has not expired");
                self.kept.remove(key);
            }
            Error::SessionBusy(_) => assert!(self.is_busy(&self.kept[key]), "{key} is busy for a reason"),
            Error::SessionExists(_) => assert!(self.is_alive(key), "{key} is taken"),
            Error::SessionLimit { limit: "sessions_max", value } => {
                assert_eq!(self.alive_of(&key.owner).count() as u64, value, "{key} is one too many");
            }
            Error::SessionLimit { limit: "sessions_pinned_max", value } => {
                let pinned = self.alive_of(&key.owner).filter(|(_, known)| known.terms.pinned);
                assert_eq!(pinned.count() as u64, value, "{key} is one pinned too many");
            }
            other => panic!("{key}: {other:?}"),
        }
    }

    /// Begins a turn of a session, at times with an outdated count.
    pub(super) fn session_turn(&mut self) {
        let Some(key) = self.some_session().filter(|_| !self.random.once_in(4)) else {
            return self.make_session();
        };
        let known = self.kept[&key].tokens.len();
        let stale = self.random.once_in(6);
        let expected = u32::try_from(known + usize::from(stale)).unwrap();
        let (hold, stopped) = oneshot::channel();
        self.warm(&key);
        let is_raw = match self.turns_of(&key).last() {
            None => self.random.once_in(2),
            Some(last) => last.raw || self.random.once_in(8),
        };
        let input = if is_raw { InputKind::Raw } else { InputKind::Chat };
        match self.book.begin(&key, &turn(input, expected), hold) {
            Ok((guard, start)) => {
                assert!(!stale, "a stale count does not begin a turn");
                assert!(self.is_alive(&key), "{key} has expired");
                self.turns += 1;
                let number = self.turns;
                let (known, now) = (self.kept.get_mut(&key).unwrap(), self.clock.wall());
                assert_eq!(*start.tokens, *known.tokens, "a turn builds on those that ended well");
                (known.turn, known.used) = (Some(number), now);
                let turn = Turn { guard, stopped, number, input };
                let mut tokens = start.tokens.to_vec();
                if input == InputKind::Chat && self.random.once_in(3) {
                    // As where a template rewrites what was said.
                    tokens.truncate(self.random.small(tokens.len() as u64 + 1) as usize);
                }
                self.restore(&key, &start.model, &tokens);
                self.generate(Some((turn, start.model, tokens)));
                self.note_uses();
            }
            Err(Error::SessionMoved { .. }) => assert!(stale, "{key} has not moved"),
            Err(error) => self.refused(&key, error),
        }
    }

    fn make_session(&mut self) {
        let key = SessionKey { owner: owner(self.random.below(PRINCIPALS)), name: self.some_name() };
        let (lease, pinned) = (self.some_lease(), self.random.once_in(8));
        let terms = Terms { lease, pinned, ..Terms::after_use(Duration::ZERO) };
        let (model, history, cache_salt) = (MODELS[0].into(), History::Auto, "".into());
        let new = NewSession { key: key.clone(), model, terms: terms.clone(), history, cache_salt };
        match self.book.create(new) {
            Ok(_) => self.keep_new(key, vec![], terms),
            Err(error) => self.refused(&key, error),
        }
    }

    fn keep_new(&mut self, key: SessionKey, tokens: Vec<u32>, terms: Terms) {
        assert!(!self.is_alive(&key), "{key} was there already");
        self.kept.insert(key, Known { tokens, terms, used: self.clock.wall(), turn: None });
    }

    /// Changes a session in one way or another.
    pub(super) fn session_changes(&mut self) {
        let Some(key) = self.some_session() else { return };
        match self.random.below(5) {
            0 => self.update(&key),
            1 => self.fork(&key),
            2 => self.truncate(&key),
            3 => self.replace(&key),
            _ => match self.book.delete(&key) {
                Ok(_) => {
                    assert!(self.is_alive(&key), "{key} has expired");
                    self.engine.command(Command::Forget(key.clone()));
                    self.kept.remove(&key);
                }
                Err(error) => self.refused(&key, error),
            },
        }
    }

    fn update(&mut self, key: &SessionKey) {
        let label = (format!("l{}", self.random.below(2)), self.random.below(2).to_string());
        let change = TermsChange {
            lease: self.random.once_in(2).then(|| self.some_lease()),
            pinned: self.random.once_in(2).then(|| self.random.once_in(2)),
            set_labels: self.random.once_in(2).then_some(label).into_iter().collect::<Labels>(),
            remove_labels: self.random.once_in(4).then(|| "l0".into()).into_iter().collect(),
        };
        match self.book.update(key, change.clone()) {
            Ok(_) => {
                let (known, now) = (self.kept.get_mut(key).unwrap(), self.clock.wall());
                (known.terms, known.used) = (known.terms.changed(&change), now);
                if let Some(pinned) = change.pinned {
                    self.engine.command(Command::PinSession(key.clone(), pinned));
                }
            }
            Err(error) => self.refused(key, error),
        }
    }

    /// Shortens a session, at times to the end of an earlier turn: it may be what it was then.
    fn truncate(&mut self, key: &SessionKey) {
        self.warm(key);
        let turns = self.turns_of(key);
        let tokens = &mut self.kept.get_mut(key).unwrap().tokens;
        let length = self.random.small(tokens.len() as u64 + 1) as usize;
        let is_raw = turns.iter().all(|turn| turn.raw);
        let count = if self.random.once_in(2) { turns.len().saturating_sub(1) } else { turns.len() / 2 };
        let by_tokens = is_raw && self.random.once_in(2);
        let cut = self.book.with(key, |session, now| {
            if by_tokens {
                session.truncate_tokens(length, now)?;
            } else {
                session.truncate_turns(count, now)?;
            }
            Ok(session.tokens().to_vec())
        });
        match cut {
            Ok(cut) => {
                let end = count.checked_sub(1).map_or(0, |last| turns[last].token_count);
                // What of a conversation stays is the session's to say.
                assert!(!is_raw || cut == tokens[..if by_tokens { length } else { end }], "{key}");
                *tokens = cut;
                self.note_uses();
            }
            Err(error) => self.refused(key, error),
        }
    }

    /// Returns a session's turns, if its owner can use it.
    fn turns_of(&self, key: &SessionKey) -> Vec<TurnEnd> {
        self.book.read(key, |session| Ok(session.view().turns)).unwrap_or_default()
    }

    /// Copies a session, or its first turns.
    fn fork(&mut self, from: &SessionKey) {
        let Known { tokens, terms, .. } = self.kept[from].clone();
        self.warm(from);
        let turns = self.turns_of(from);
        let at = self.random.once_in(2).then(|| self.random.small(turns.len() as u64 + 1));
        let change = TermsChange { pinned: Some(self.random.once_in(6)), ..TermsChange::default() };
        let (name, terms) = (self.some_name(), terms.changed(&change));
        let key = SessionKey { owner: from.owner.clone(), name: name.clone() };
        let fork = NewFork { name, change, turn_count: at, expected_token_count: None };
        match self.book.fork(from, fork) {
            Ok(_) => {
                // A pinned session stays beyond the end of its lease, its copy need not.
                let cut = self.book.snapshot(&key).unwrap().contents.unwrap().tokens.to_vec();
                let end = at.map(|at| at.checked_sub(1).map_or(0, |last| turns[last as usize].token_count));
                let is_raw = turns.iter().all(|turn| turn.raw);
                assert!(!is_raw || cut == tokens[..end.unwrap_or(tokens.len())], "{key} is a copy of {from}");
                self.keep_new(key, cut, terms);
            }
            Err(error @ Error::SessionNotFound(_)) => self.refused(from, error),
            Err(error) => self.refused(&key, error),
        }
    }

    /// Sends a session out and in again, in the place of another of its owner if there is one.
    fn replace(&mut self, from: &SessionKey) {
        let Known { tokens, terms, .. } = self.kept[from].clone();
        self.warm(from);
        if !self.is_alive(from) {
            return;
        }
        let Some(Snapshot { outline, contents: Some(contents) }) = self.book.snapshot(from) else { return };
        let mut joined = Joined::default();
        for record in Pieces::new(&outline, contents) {
            joined.add(&record.outline, &record.content, usize::MAX).unwrap();
        }
        let (outline, contents) = joined.into_session().unwrap();
        let key = SessionKey { owner: from.owner.clone(), name: self.some_name() };
        let (model, replace) = (outline.model.clone(), Some(Replace::default()));
        let arrived = Arrived { key: key.clone(), model, terms: terms.clone(), outline, contents, replace };
        match self.book.take_in(self.book.expect(&key.owner), arrived) {
            Ok(_) => {
                self.engine.command(Command::Forget(key.clone()));
                self.kept.insert(key, Known { tokens, terms, used: self.clock.wall(), turn: None });
            }
            Err(error) => self.refused(&key, error),
        }
    }

    /// Lets somebody try what is another's: there is nothing.
    pub(super) fn stranger(&mut self) {
        let Some(SessionKey { name, .. }) = self.some_session() else { return };
        let key = SessionKey { owner: owner(self.random.below(PRINCIPALS + 1)), name };
        if self.is_alive(&key) {
            return;
        }
        let fork = NewFork {
            name: "mine".into(),
            change: TermsChange::default(),
            turn_count: None,
            expected_token_count: None,
        };
        let tries = [
            self.book.read(&key, |_| Ok(())).err(),
            self.book.with(&key, |_, _| Ok(())).err(),
            self.book.begin(&key, &turn(InputKind::Raw, 0), oneshot::channel().0).err(),
            self.book.update(&key, TermsChange::default()).err(),
            self.book.fork(&key, fork).err(),
            self.book.delete(&key).err(),
        ];
        for error in tries {
            assert!(matches!(error, Some(Error::SessionNotFound(_))), "{key} is not there: {error:?}");
        }
    }

    /// Removes what has expired.
    pub(super) fn sweep(&mut self) {
        for key in self.book.sweep() {
            assert!(!self.is_alive(&key), "{key} has not expired");
            self.kept.remove(&key);
            self.engine.command(Command::Forget(key));
        }
        assert!(self.kept.keys().all(|key| self.is_alive(key)), "what has expired was swept");
    }

    /// Notes when sessions were last used: the end of a turn is a use as well.
    pub(super) fn note_uses(&mut self) {
        for (key, known) in &mut self.kept {
            if let Some(now) = self.book.snapshot(key) {
                known.used = now.outline.used;
            }
        }
    }

    fn views(&self, owner: &Principal) -> Vec<SessionView> {
        let page = ListPage { after: None, size: usize::MAX, filter: SessionFilter::default() };
        self.book.list(owner, &page).0
    }

    /// Everybody has what is theirs, within the limits, and nothing else.
    pub(super) fn check_sessions(&self) {
        for owner in (0..=PRINCIPALS).map(owner) {
            let views = self.views(&owner);
            let alive: Vec<_> = self.alive_of(&owner).collect();
            assert!(views.iter().map(|view| &view.key).eq(alive.iter().map(|(key, _)| *key)), "of {owner}");
            for (view, (key, known)) in views.iter().zip(alive) {
                assert_eq!(view.token_count, known.tokens.len(), "{key} has the turns that ended well");
                assert_eq!((&view.terms, view.busy), (&known.terms, self.is_busy(known)), "{key}");
            }
            let pinned = views.iter().filter(|view| view.terms.pinned).count();
            assert!(views.len() <= SESSION_LIMITS.sessions_max as usize, "{owner} has too many");
            assert!(pinned <= SESSION_LIMITS.sessions_pinned_max as usize, "{owner} has too many pinned");
        }
    }

    /// Returns what each owner has: sessions, and bytes, of which what forks share counts once.
    pub(super) fn totals(&self) -> Vec<(usize, u64)> {
        let totals = (0..=PRINCIPALS).map(|number| self.book.totals(Some(&owner(number))));
        totals.map(|totals| (totals.sessions, totals.bytes)).collect()
    }

    /// What the writer is told is what clients know.
    pub(super) fn check_told(&self, told: &[Told]) {
        for (key, now) in told {
            let Some(now) = now else {
                assert!(!self.is_alive(key), "{key} is gone for a reason");
                continue;
            };
            let Some(known) = self.kept.get(key) else {
                let end = now.outline.terms.end(now.outline.used);
                assert!(end.is_some_and(|end| end <= self.clock.wall()), "{key} is somebody's");
                continue;
            };
            assert_eq!(now.outline.sizes.tokens, known.tokens.len(), "{key} has the turns that ended well");
            assert_eq!(now.outline.terms, known.terms, "{key} has the terms that its owner gave it");
            if let Some(contents) = &now.contents {
                assert_eq!(*contents.tokens, *known.tokens, "{key}");
            }
        }
    }
}
