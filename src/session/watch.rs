//! What a watcher of an owner's sessions was told, and what it has still to be told. Only names wait, each
//! once, however often its session changes: what a session is, is looked up when the watcher reads. So one
//! that never reads costs no more than its owner has sessions, and one that reads slowly still learns the
//! last state of each.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::SystemTime;

use super::list::SessionFilter;
use super::state::{Session, SessionView};
use super::terms::Terms;
use crate::ids::{SessionId, SessionName};

/// Changes that a watcher takes at once.
const TAKEN_MAX: usize = 64;

/// Something that happened to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happening {
    /// It came to be.
    Made,
    /// It is another.
    Changed,
    /// It was deleted.
    Deleted,
    /// It expired.
    Expired,
}

/// What became of a session, which is told as `S`.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<S = SessionView> {
    /// It was there already, or has come to match.
    Listed(Box<S>),
    /// It was made.
    Created(Box<S>),
    /// It changed in these fields.
    Changed(Box<S>, Vec<ViewField>),
    /// It was deleted.
    Deleted,
    /// It expired.
    Expired,
    /// It does not match any more.
    Unlisted,
}

/// A field in which a session may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewField {
    /// Its number of tokens.
    TokenCount,
    /// Its turns.
    Turns,
    /// Whether a turn runs.
    Busy,
    /// Its lifetime.
    Ttl,
    /// The time of its last use.
    LastUse,
    /// The time at which it expires.
    Expiry,
    /// Its labels.
    Labels,
    /// Whether it is pinned.
    Pinned,
}

/// One thing that a watcher is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// What became of a session.
    Change {
        /// The session.
        name: SessionName,
        /// What became of it.
        change: Change,
        /// Number of changes before it that are not told.
        merged: u32,
    },
    /// The sessions that were there are told.
    Ready,
}

/// A session as the watcher knows it.
#[derive(Clone, Debug, PartialEq)]
struct Known {
    id: SessionId,
    token_count: usize,
    turns: usize,
    busy: bool,
    terms: Terms,
    used: SystemTime,
}

/// What waits of a session.
#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    /// Whether it is one of those that were there.
    is_first: bool,
    /// Whether it was made since.
    is_made: bool,
    /// Whether it expired when it went last.
    has_expired: bool,
    changes: u32,
}

/// One watcher.
#[derive(Debug)]
pub(super) struct Watch {
    filter: SessionFilter,
    known: BTreeMap<SessionName, Known>,
    waiting: BTreeMap<SessionName, Waiting>,
    /// Sessions that were there and are not told yet.
    firsts: usize,
    is_ready: bool,
    /// Who waits for a change.
    pub(super) waker: Option<Waker>,
}

impl Watch {
    /// Returns a watcher of the sessions that are there: it is told of them at first, or knows them already.
    pub(super) fn new<'a>(
        filter: SessionFilter,
        sessions: impl Iterator<Item = &'a Session>,
        changes_only: bool,
    ) -> Self {
        let (mut known, mut waiting) = (BTreeMap::new(), BTreeMap::new());
        for session in sessions.filter(|session| filter.takes(session)) {
            let name = session.key.name.clone();
            if !filter.takes_name(&name) {
                continue;
            }
            if changes_only {
                known.insert(name, Known::new(session));
            } else {
                waiting.insert(name, Waiting { is_first: true, changes: 1, ..Waiting::default() });
            }
        }
        let firsts = waiting.len();
        Self { filter, known, waiting, firsts, is_ready: false, waker: None }
    }

    /// Notes what happened to a session, and wakes who waits.
    pub(super) fn note(&mut self, name: &SessionName, happening: Happening) {
        if !self.filter.takes_name(name) {
            return;
        }
        let is_gone = matches!(happening, Happening::Deleted | Happening::Expired);
        if is_gone && !self.known.contains_key(name) {
            // The watcher never heard of it.
            self.forget(name);
        } else {
            let waiting = self.waiting.entry(name.clone()).or_default();
            waiting.changes = waiting.changes.saturating_add(1);
            waiting.is_made |= happening == Happening::Made;
            waiting.has_expired = match happening {
                Happening::Made | Happening::Changed => waiting.has_expired,
                Happening::Deleted => false,
                Happening::Expired => true,
            };
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn forget(&mut self, name: &SessionName) {
        let waiting = self.waiting.remove(name);
        self.firsts -= usize::from(waiting.is_some_and(|waiting| waiting.is_first));
    }

    /// Returns what there is to tell, at most a number of things; `find` returns a session that is there.
    pub(super) fn take<'a>(&mut self, find: impl Fn(&SessionName) -> Option<&'a Session>) -> Vec<Told> {
        let mut told = Vec::new();
        while told.len() < TAKEN_MAX {
            if self.firsts == 0 && !self.is_ready {
                self.is_ready = true;
                told.push(Told::Ready);
            }
            // Those that were there come first: their names are among the others'.
            let next = self.waiting.iter().find(|(_, waiting)| self.firsts == 0 || waiting.is_first);
            let Some(name) = next.map(|(name, _)| name.clone()) else { break };
            let waiting = self.waiting.remove(&name).unwrap_or_default();
            self.firsts -= usize::from(waiting.is_first);
            self.tell(&mut told, name, waiting, &find);
        }
        told
    }

    /// Tells what became of a session.
    fn tell<'a>(
        &mut self,
        told: &mut Vec<Told>,
        name: SessionName,
        waiting: Waiting,
        find: &impl Fn(&SessionName) -> Option<&'a Session>,
    ) {
        let session = find(&name);
        let now = session.filter(|session| self.filter.takes(session));
        let now = now.map(|session| (session, Known::new(session)));
        let was = self.known.remove(&name);
        let is_other = |now: &Known| was.as_ref().is_some_and(|was| was.id != now.id);
        let mut merged = waiting.changes.saturating_sub(1);
        if let Some(was) = &was
            && now.as_ref().is_none_or(|(_, now)| is_other(now))
        {
            let change = match session {
                Some(session) if session.id() == was.id => Change::Unlisted,
                _ if waiting.has_expired => Change::Expired,
                _ => Change::Deleted,
            };
            told.push(Told::Change { name: name.clone(), change, merged });
            merged = 0;
        }
        let Some((session, known)) = now else { return };
        let change = match &was {
            Some(was) if was.id == known.id => match known.differences(was) {
                // The watcher knows it as it is.
                fields if fields.is_empty() => None,
                fields => Some(Change::Changed(Box::new(session.view()), fields)),
            },
            Some(_) | None if waiting.is_made && !waiting.is_first => {
                Some(Change::Created(Box::new(session.view())))
            }
            Some(_) | None => Some(Change::Listed(Box::new(session.view()))),
        };
        told.extend(change.map(|change| Told::Change { name: name.clone(), change, merged }));
        self.known.insert(name, known);
    }
}

impl Known {
    fn new(session: &Session) -> Self {
        let (token_count, turns) = session.counts();
        Self {
            id: session.id(),
            token_count,
            turns,
            busy: session.is_busy(),
            terms: session.terms().clone(),
            used: session.used,
        }
    }

    /// Returns the fields in which it differs from what it was.
    fn differences(&self, was: &Self) -> Vec<ViewField> {
        let Self { id: _, token_count, turns, busy, terms, used } = self;
        let Terms { lease, pinned, labels } = terms;
        let differs = [
            (ViewField::TokenCount, *token_count != was.token_count),
            (ViewField::Turns, *turns != was.turns),
            (ViewField::Busy, *busy != was.busy),
            (ViewField::Ttl, *lease != was.terms.lease),
            (ViewField::LastUse, *used != was.used),
            (ViewField::Expiry, terms.end(*used) != was.terms.end(was.used)),
            (ViewField::Labels, *labels != was.terms.labels),
            (ViewField::Pinned, *pinned != was.terms.pinned),
        ];
        differs.into_iter().filter_map(|(field, differs)| differs.then_some(field)).collect()
    }
}
