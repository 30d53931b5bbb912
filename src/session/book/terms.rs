//! What the book does about the terms of sessions: it makes forks, changes, lists and counts sessions by
//! them, and keeps them within their limits.

use std::collections::BTreeMap;
use std::ops::Bound::Unbounded;
use std::sync::PoisonError;
use std::time::SystemTime;

use super::{Owned, SessionBook, SessionLimits, live, not_found, usable};
use crate::error::Error;
use crate::ids::{ModelName, Principal, SessionKey, SessionName};
use crate::session::list::ListPage;
use crate::session::state::{Session, SessionView};
use crate::session::terms::{Lease, Terms, TermsChange};
use crate::session::watch::Happening;

/// A copy of a session to make.
#[derive(Clone, Debug)]
pub struct NewFork {
    /// The copy's name.
    pub name: SessionName,
    /// What differs from the original's terms.
    pub change: TermsChange,
    /// Number of turns to copy; None copies all.
    pub turn_count: Option<u32>,
    /// The original's token count as the caller saw it last.
    pub expected_token_count: Option<u32>,
}

/// Sums over sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionTotals {
    /// Number of sessions.
    pub sessions: usize,
    /// Number of pinned ones.
    pub pinned: usize,
    /// Number of those in which a turn runs.
    pub busy: usize,
    /// Bytes of them all; what forks share counts once.
    pub bytes: u64,
}

impl<H> SessionBook<H> {
    /// Copies a session of the same owner.
    pub fn fork(&self, from: &SessionKey, fork: NewFork) -> Result<SessionView, Error> {
        let now = self.now();
        let NewFork { name, change, turn_count, expected_token_count } = fork;
        let change = self.own_change(change);
        let mut owned = self.owners.get_mut(&from.owner).ok_or_else(|| not_found(from))?;
        let original = &usable(&mut owned, from, now)?.session;
        original.expect_tokens(expected_token_count)?;
        let key = SessionKey { owner: from.owner.clone(), name };
        let terms = original.terms().changed(&change);
        let mut copy = original.fork(key.clone(), now);
        self.refuse_another(&owned, &key.name, now)?;
        self.refuse_terms(&owned, &key.name, &terms, now)?;
        if terms != *copy.terms() {
            copy.set_terms(terms, now);
        }
        if let Some(turns) = turn_count {
            copy.truncate_turns(turns as usize, now)?;
        }
        self.refuse_on_disk(&owned.on_disk, copy.bytes())?;
        Ok(self.insert(&mut owned, copy))
    }

    /// Changes the terms of a session, which is a use of it.
    pub fn update(&self, key: &SessionKey, change: TermsChange) -> Result<SessionView, Error> {
        let now = self.now();
        let change = self.own_change(change);
        let mut owned = self.owners.get_mut(&key.owner).ok_or_else(|| not_found(key))?;
        let terms = live(&mut owned, key, now)?.session.terms().changed(&change);
        self.refuse_terms(&owned, &key.name, &terms, now)?;
        let entry = live(&mut owned, key, now)?;
        entry.session.set_terms(terms, now);
        entry.count();
        let view = entry.session.view();
        self.note(&mut owned, key, Happening::Changed);
        Ok(view)
    }

    /// Returns one page of an owner's sessions, and whether there are more.
    #[must_use]
    pub fn list(&self, owner: &Principal, page: &ListPage) -> (Vec<SessionView>, bool) {
        let now = self.now();
        let Some(owned) = self.owners.get(owner) else { return (Vec::new(), false) };
        let mut matching = owned
            .entries
            .range((page.start(), Unbounded))
            .take_while(|(name, _)| page.filter.takes_name(name))
            .map(|(_, entry)| &entry.session)
            .filter(|session| !session.is_expired(now) && page.filter.takes(session));
        let views = matching.by_ref().take(page.size).map(Session::view).collect();
        (views, matching.next().is_some())
    }

    /// Adds up what an owner, or all of them, hold.
    #[must_use]
    pub fn totals(&self, of: Option<&Principal>) -> SessionTotals {
        let mut totals = SessionTotals::default();
        for owned in self.owners.iter().filter(|owned| of.is_none_or(|owner| owned.key() == owner)) {
            totals.bytes += owned.held.bytes();
            for entry in owned.entries.values() {
                totals.sessions += 1;
                totals.pinned += usize::from(entry.session.terms().pinned);
                totals.busy += usize::from(entry.session.is_busy());
            }
        }
        totals
    }

    /// Returns the number of sessions of an owner, or of all, by model.
    #[must_use]
    pub fn count_by_model(&self, of: Option<&Principal>) -> BTreeMap<ModelName, usize> {
        let mut counts = BTreeMap::new();
        for owned in self.owners.iter().filter(|owned| of.is_none_or(|owner| owned.key() == owner)) {
            for entry in owned.entries.values() {
                *counts.entry(entry.session.model().clone()).or_default() += 1;
            }
        }
        counts
    }

    /// Returns a lease as sessions hold it, in the time by which leases run.
    pub(super) fn own_lease(&self, lease: Lease) -> Lease {
        match lease {
            Lease::AfterUse(_) => lease,
            Lease::Until(wall) => {
                let lease_time = self.lease_time.lock().unwrap_or_else(PoisonError::into_inner);
                Lease::Until(lease_time.of_wall(wall))
            }
        }
    }

    fn own_change(&self, change: TermsChange) -> TermsChange {
        TermsChange { lease: change.lease.map(|lease| self.own_lease(lease)), ..change }
    }

    /// Refuses the terms of one of an owner's sessions, which may be new, beyond a limit.
    pub(super) fn refuse_terms(
        &self,
        owned: &Owned<H>,
        name: &SessionName,
        terms: &Terms,
        now: SystemTime,
    ) -> Result<(), Error> {
        let SessionLimits { sessions_pinned_max, session_labels_max, sessions_bytes_max, .. } = self.limits;
        let session = owned.entries.get(name).map(|entry| &entry.session).filter(|own| !own.is_expired(now));
        let had = session.map(Session::terms);
        if terms.labels.len() > session_labels_max as usize {
            return Err(Error::SessionLimit {
                limit: "session_labels_max",
                value: session_labels_max.into(),
            });
        }
        let pinned = || owned.entries.values().filter(|entry| entry.session.terms().pinned).count();
        if terms.pinned && !had.is_some_and(|had| had.pinned) && pinned() >= sessions_pinned_max as usize {
            return Err(Error::SessionLimit {
                limit: "sessions_pinned_max",
                value: sessions_pinned_max.into(),
            });
        }
        let more = terms.bytes().saturating_sub(had.map_or(0, Terms::bytes)) as u64;
        if more > 0 && owned.held.bytes() + more > sessions_bytes_max {
            return Err(Error::SessionLimit { limit: "sessions_bytes_max", value: sessions_bytes_max });
        }
        if more > 0 { self.refuse_on_disk(&owned.on_disk, more) } else { Ok(()) }
    }
}
