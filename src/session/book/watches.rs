//! Those who watch an owner's sessions. They lie with the sessions, and are told under the same lock.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use super::{Owned, SessionBook, SessionLimits};
use crate::error::Error;
use crate::ids::Principal;
use crate::session::list::SessionFilter;
use crate::session::watch::{Told, Watch};

/// Somebody who watches an owner's sessions, until this is dropped.
pub struct SessionWatch<H> {
    book: Arc<SessionBook<H>>,
    owner: Principal,
    number: u64,
}

impl<H> SessionBook<H> {
    /// Begins to watch an owner's sessions; those that are there are told first, unless only changes are.
    ///
    /// # Errors
    /// The owner has too many watchers.
    pub fn watch(
        self: &Arc<Self>,
        owner: Principal,
        filter: SessionFilter,
        changes_only: bool,
    ) -> Result<SessionWatch<H>, Error> {
        let (now, SessionLimits { session_watches_max, .. }) = (self.now(), self.limits);
        let mut owned = self.owners.entry(owner.clone()).or_default();
        if owned.watches.len() >= session_watches_max as usize {
            let value = session_watches_max.into();
            return Err(Error::SessionLimit { limit: "session_watches_max", value });
        }
        let sessions = owned.entries.values().map(|entry| &entry.session);
        let watch = Watch::new(filter, sessions.filter(|session| !session.is_expired(now)), changes_only);
        let number = self.watches_begun.fetch_add(1, Ordering::Relaxed);
        owned.watches.insert(number, watch);
        drop(owned);
        Ok(SessionWatch { book: Arc::clone(self), owner, number })
    }
}

impl<H> SessionWatch<H> {
    /// Returns what there is to tell, at least one thing. If there is nothing, the next change wakes the
    /// context.
    pub fn poll(&self, context: &Context<'_>) -> Poll<Vec<Told>> {
        let Some(mut owned) = self.book.owners.get_mut(&self.owner) else { return Poll::Pending };
        let Owned { entries, watches, .. } = &mut *owned;
        let Some(watch) = watches.get_mut(&self.number) else { return Poll::Pending };
        let told = watch.take(|name| entries.get(name).map(|entry| &entry.session));
        if told.is_empty() {
            watch.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(told)
    }
}

impl<H> Drop for SessionWatch<H> {
    fn drop(&mut self) {
        if let Some(mut owned) = self.book.owners.get_mut(&self.owner) {
            owned.watches.remove(&self.number);
        }
    }
}

#[cfg(test)]
#[path = "watches_tests.rs"]
mod tests;
