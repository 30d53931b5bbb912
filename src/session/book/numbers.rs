//! Which sessions there are, by number, and whose; which went since somebody last took note, and which are in
//! memory: for who keeps something of sessions besides.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use super::{Owned, SessionBook};
use crate::ids::{Principal, SessionId};
use crate::session::state::{Session, SessionView};

#[derive(Debug, Default)]
pub(super) struct Numbers {
    there: BTreeMap<SessionId, Principal>,
    gone: Vec<SessionId>,
}

impl Numbers {
    pub(super) fn add(&mut self, session: SessionId, owner: Principal) {
        self.there.insert(session, owner);
    }

    pub(super) fn remove(&mut self, session: SessionId) {
        self.there.remove(&session);
        self.gone.push(session);
    }

    pub(super) fn take_gone(&mut self) -> Vec<SessionId> {
        std::mem::take(&mut self.gone)
    }
}

impl<H> Owned<H> {
    fn in_memory(&self) -> Vec<SessionView> {
        let sessions = self.entries.values().map(|entry| &entry.session);
        sessions.filter(|session| !session.tokens().is_empty()).map(Session::view).collect()
    }
}

impl<H> SessionBook<H> {
    /// Returns the numbers of the sessions that went since the last call.
    #[must_use]
    pub fn take_gone(&self) -> Vec<SessionId> {
        self.numbers().take_gone()
    }

    /// Returns whose the session of a number is, if there is one.
    #[must_use]
    pub fn owner_of(&self, session: SessionId) -> Option<Principal> {
        self.numbers().there.get(&session).cloned()
    }

    pub(super) fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the sessions whose content is in memory, the last used first.
    #[must_use]
    pub fn in_memory(&self) -> Vec<SessionView> {
        let mut views: Vec<_> = self.owners.iter().flat_map(|owned| owned.in_memory()).collect();
        views.sort_by_key(|view| std::cmp::Reverse(view.used));
        views
    }

    /// Returns those of one owner, in the order of their names.
    #[must_use]
    pub fn in_memory_of(&self, owner: &Principal) -> Vec<SessionView> {
        self.owners.get(owner).map_or_else(Vec::new, |owned| owned.in_memory())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::clock::SystemClock;
    use crate::ids::SessionKey;
    use crate::session::{History, NewSession, SessionLimits, Terms};

    fn create(book: &SessionBook<()>, name: &str, ttl: Duration) -> SessionId {
        let key = SessionKey { owner: "uid:1".into(), name: name.into() };
        let (terms, history) = (Terms::after_use(ttl), History::Auto);
        book.create(NewSession { key, model: "m".into(), terms, history, cache_salt: "".into() }).unwrap().id
    }

    #[test]
    fn a_session_is_known_by_its_number_until_it_goes_whatever_ends_it() {
        let limits = SessionLimits {
            sessions_max: 9,
            sessions_pinned_max: 0,
            session_labels_max: 0,
            session_bytes_max: 1 << 20,
            sessions_bytes_max: 1 << 20,
            sessions_disk_bytes_max: 1 << 20,
            session_watches_max: 0,
        };
        let book = SessionBook::new(limits, Arc::new(SystemClock::new()));
        let hour = Duration::from_secs(3600);
        let deleted = create(&book, "deleted", hour);
        let replaced = create(&book, "replaced", Duration::ZERO);
        let new = create(&book, "replaced", hour);
        let swept = create(&book, "swept", Duration::ZERO);
        assert!([deleted, new, swept].iter().all(|id| book.owner_of(*id) == Some("uid:1".into())));
        book.delete(&SessionKey { owner: "uid:1".into(), name: "deleted".into() }).unwrap();
        assert_eq!(book.sweep().len(), 1);
        assert_eq!((book.take_gone(), book.take_gone()), (vec![replaced, deleted, swept], vec![]));
        assert!(book.owner_of(new).is_some());
        assert!([deleted, replaced, swept].iter().all(|id| book.owner_of(*id).is_none()));
    }
}
