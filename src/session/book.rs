//! Every session of the daemon, by owner. Many tasks access it; an owner's entry is locked for a copy at
//! most, never across an await. An owner's sessions lie together, so that their count is exact, a fork is one
//! step, and a page of a list is in order.
//!
//! `H` is a hold on a running turn: it is dropped when the turn ends or its session is deleted, whichever is
//! first.

mod incoming;
mod lease_time;
mod numbers;
mod terms;
mod watches;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use dashmap::DashMap;

use super::bytes::{Charge, Charges, Held, SESSION_BYTES};
use super::changes::Changes;
use super::history::History;
use super::snapshot::{Contents, Outline, Snapshot};
use super::state::{Session, SessionView, TurnContent, TurnId, TurnRequest, TurnStart};
use super::terms::Terms;
use super::watch::{Happening, Watch};
use crate::clock::Clock;
use crate::error::Error;
use crate::ids::{ModelName, Principal, SessionId, SessionKey, SessionName, TokenizerHash};

pub use incoming::{Arrived, Incoming, Replace};
pub use terms::{NewFork, SessionTotals};
pub use watches::SessionWatch;

use lease_time::LeaseTime;
use numbers::Numbers;

/// A session to create.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// Owner and name.
    pub key: SessionKey,
    /// The model it is bound to.
    pub model: ModelName,
    /// How long it stays, and its labels.
    pub terms: Terms,
    /// How its chat turns go on.
    pub history: History,
    /// Salt of its cached KV; empty for none.
    pub cache_salt: Arc<str>,
}

#[derive(Debug)]
struct Entry<H> {
    session: Session,
    turn: Option<H>,
    /// What its file has to hold.
    on_disk: Charge,
}

impl<H> Entry<H> {
    /// Counts what its file has to hold now.
    fn count(&mut self) {
        self.on_disk.change(self.session.bytes());
    }
}

/// What is held of one owner.
struct Owned<H> {
    entries: BTreeMap<SessionName, Entry<H>>,
    /// Bytes in memory, where forks share theirs.
    held: Held,
    /// Bytes on disk, where each file has its own.
    on_disk: Held,
    /// By number: those who watch.
    watches: BTreeMap<u64, Watch>,
}

impl<H> Default for Owned<H> {
    fn default() -> Self {
        let (held, on_disk) = (Held::default(), Held::default());
        Self { entries: BTreeMap::new(), held, on_disk, watches: BTreeMap::new() }
    }
}

impl<H> Owned<H> {
    /// Adds a session; returns the one that had its name.
    fn insert(&mut self, session: Session) -> Option<Session> {
        let name = session.key.name.clone();
        let mut entry = Entry { session, turn: None, on_disk: self.on_disk.charge(0) };
        entry.count();
        self.entries.insert(name, entry).map(|replaced| replaced.session)
    }

    /// Tells those who watch what happened to a session.
    fn tell(&mut self, name: &SessionName, happening: Happening) {
        self.watches.values_mut().for_each(|watch| watch.note(name, happening));
    }
}

/// Limits on what one owner may hold.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// Sessions.
    pub sessions_max: u32,
    /// Pinned sessions.
    pub sessions_pinned_max: u32,
    /// Labels of one session.
    pub session_labels_max: u32,
    /// Bytes of one session.
    pub session_bytes_max: u64,
    /// Bytes of all sessions together; what forks share counts once.
    pub sessions_bytes_max: u64,
    /// Bytes of all sessions together where they are stored; each fork has a file of its own.
    pub sessions_disk_bytes_max: u64,
    /// Watchers.
    pub session_watches_max: u32,
}

/// The sessions.
pub struct SessionBook<H> {
    owners: DashMap<Principal, Owned<H>>,
    turns_begun: AtomicU64,
    /// Numbers given to sessions so far.
    numbered: AtomicU64,
    watches_begun: AtomicU64,
    changes: Arc<Changes>,
    /// Which sessions there are, and which went.
    numbers: Mutex<Numbers>,
    limits: SessionLimits,
    clock: Arc<dyn Clock>,
    lease_time: Mutex<LeaseTime>,
}

impl<H> SessionBook<H> {
    /// Returns an empty book.
    #[must_use]
    pub fn new(limits: SessionLimits, clock: Arc<dyn Clock>) -> Self {
        let told = clock.wall();
        let lease_time = Mutex::new(LeaseTime::new(told));
        Self {
            owners: DashMap::new(),
            turns_begun: AtomicU64::new(0),
            numbered: AtomicU64::new(0),
            watches_begun: AtomicU64::new(0),
            changes: Arc::default(),
            numbers: Mutex::default(),
            limits,
            clock,
            lease_time,
        }
    }

    /// Gives no session a number below this one.
    pub fn number_from(&self, first: SessionId) {
        self.numbered.fetch_max(first.0.saturating_sub(1), Ordering::Relaxed);
    }

    /// Returns the sessions that change, for who stores them.
    #[must_use]
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// Takes in sessions that were stored, each with why it is damaged, if it is. They hold the bytes that
    /// they held before, also where a limit has become smaller since; what has expired goes with the next
    /// sweep.
    pub fn restore(&self, stored: impl IntoIterator<Item = (Outline, Option<String>)>) {
        let mut by_owner = BTreeMap::<_, Vec<_>>::new();
        for (outline, damage) in stored {
            self.numbered.fetch_max(outline.id.0, Ordering::Relaxed);
            by_owner.entry(outline.key.owner.clone()).or_default().push((outline, damage));
        }
        for (owner, stored) in by_owner {
            let mut owned = self.owners.entry(owner).or_default();
            let numbers = stored.iter().flat_map(|(outline, _)| outline.charge_numbers());
            owned.held.number_above(numbers.max().unwrap_or(0));
            let mut charges = Charges::default();
            for (outline, damage) in stored {
                let session = Session::stored(owned.held.clone(), &mut charges, outline, damage);
                self.numbers().add(session.id(), session.key.owner.clone());
                owned.insert(session);
            }
        }
    }

    /// Returns what a session is now; none if there is none, whether it expired or not.
    #[must_use]
    pub fn snapshot(&self, key: &SessionKey) -> Option<Snapshot> {
        let owned = self.owners.get(&key.owner)?;
        owned.entries.get(&key.name).map(|entry| entry.session.snapshot())
    }

    /// Returns the number of a session whose content has still to be read.
    #[must_use]
    pub fn cold(&self, key: &SessionKey) -> Option<SessionId> {
        let owned = self.owners.get(&key.owner)?;
        let session = &owned.entries.get(&key.name)?.session;
        session.is_cold().then(|| session.id())
    }

    /// Gives a cold session the content that was read for its number, or says why it is damaged.
    pub fn fill(&self, key: &SessionKey, id: SessionId, contents: Result<Contents, String>) {
        let Some(mut owned) = self.owners.get_mut(&key.owner) else { return };
        let Some(cold) = owned.entries.get(&key.name).map(|entry| &entry.session) else { return };
        if !cold.is_cold() || cold.id() != id {
            return;
        }
        let others = || owned.entries.values().map(|entry| &entry.session);
        let contents = contents.map(|contents| cold.shared(contents, others()));
        let Some(entry) = owned.entries.get_mut(&key.name) else { return };
        match contents {
            Ok(contents) => entry.session.fill(contents),
            Err(why) => entry.session.lose(why),
        }
    }

    /// Creates an empty session.
    pub fn create(&self, new: NewSession) -> Result<SessionView, Error> {
        let now = self.now();
        let NewSession { key, model, terms, history, cache_salt } = new;
        let terms = Terms { lease: self.own_lease(terms.lease), ..terms };
        let mut owned = self.owners.entry(key.owner.clone()).or_default();
        self.refuse_another(&owned, &key.name, now)?;
        self.refuse_terms(&owned, &key.name, &terms, now)?;
        let session = Session::held(owned.held.clone(), key, model, terms, now);
        let session = session.with_history(history).with_cache_salt(cache_salt);
        Ok(self.insert(&mut owned, session))
    }

    /// Numbers a session and adds it.
    fn insert(&self, owned: &mut Owned<H>, session: Session) -> SessionView {
        let id = SessionId(self.numbered.fetch_add(1, Ordering::Relaxed) + 1);
        let session = session.with_id(id);
        let view = session.view();
        self.numbers().add(id, view.key.owner.clone());
        if let Some(replaced) = owned.insert(session) {
            // It expired and was not swept yet.
            self.numbers().remove(replaced.id());
            owned.tell(&view.key.name, Happening::Expired);
        }
        self.note(owned, &view.key, Happening::Made);
        view
    }

    /// Notes what happened to a session, for who stores it and for who watches.
    fn note(&self, owned: &mut Owned<H>, key: &SessionKey, happening: Happening) {
        self.changes.note(key);
        owned.tell(&key.name, happening);
    }

    /// Reads a session with `read`.
    pub fn read<T>(
        &self,
        key: &SessionKey,
        read: impl FnOnce(&Session) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let now = self.now();
        let mut owned = self.owners.get_mut(&key.owner).ok_or_else(|| not_found(key))?;
        read(&usable(&mut owned, key, now)?.session)
    }

    /// Changes a session with `act`.
    pub fn with<T>(
        &self,
        key: &SessionKey,
        act: impl FnOnce(&mut Session, SystemTime) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let now = self.now();
        let mut owned = self.owners.get_mut(&key.owner).ok_or_else(|| not_found(key))?;
        let entry = usable(&mut owned, key, now)?;
        let acted = act(&mut entry.session, now)?;
        entry.count();
        self.note(&mut owned, key, Happening::Changed);
        Ok(acted)
    }

    /// Removes a session; returns the `H` of a running turn.
    pub fn delete(&self, key: &SessionKey) -> Result<Option<H>, Error> {
        let now = self.now();
        let mut owned = self.owners.get_mut(&key.owner).ok_or_else(|| not_found(key))?;
        live(&mut owned, key, now)?;
        let gone = owned.entries.remove(&key.name);
        gone.iter().for_each(|gone| self.numbers().remove(gone.session.id()));
        self.note(&mut owned, key, Happening::Deleted);
        Ok(gone.and_then(|entry| entry.turn))
    }

    /// Removes expired sessions and returns their keys.
    #[must_use]
    pub fn sweep(&self) -> Vec<SessionKey> {
        let now = self.now();
        let mut gone = Vec::new();
        self.owners.retain(|owner, owned| {
            let expired = owned.entries.extract_if(.., |_, entry| entry.session.is_expired(now));
            let expired: Vec<_> = expired.map(|(name, entry)| (name, entry.session.id())).collect();
            for (name, id) in expired {
                self.numbers().remove(id);
                let key = SessionKey { owner: owner.clone(), name };
                self.note(owned, &key, Happening::Expired);
                gone.push(key);
            }
            !owned.entries.is_empty() || !owned.watches.is_empty() || owned.held.is_used()
        });
        gone
    }

    /// Begins a turn; the guard rolls it back unless it is committed.
    pub fn begin(
        self: &Arc<Self>,
        key: &SessionKey,
        request: &TurnRequest,
        hold: H,
    ) -> Result<(TurnGuard<H>, TurnStart), Error> {
        let now = self.now();
        let id = TurnId(self.turns_begun.fetch_add(1, Ordering::Relaxed));
        let mut owned = self.owners.get_mut(&key.owner).ok_or_else(|| not_found(key))?;
        let (held, on_disk) = (owned.held.clone(), owned.on_disk.clone());
        let entry = usable(&mut owned, key, now)?;
        let reserved = self.reserve(&held, &on_disk, &entry.session, request.input_bytes)?;
        let start = entry.session.begin(id, request, now)?;
        entry.turn = Some(hold);
        owned.tell(&key.name, Happening::Changed);
        let (book, key, reserved) = (Arc::clone(self), key.clone(), Some(reserved));
        Ok((TurnGuard { book, key, id, reserved, tokenizer: None }, start))
    }

    /// Charges the bytes that a turn is going to add to a session, if there is room.
    fn reserve(
        &self,
        held: &Held,
        on_disk: &Held,
        session: &Session,
        bytes: usize,
    ) -> Result<Reserved, Error> {
        let SessionLimits { session_bytes_max, sessions_bytes_max, .. } = self.limits;
        let more = bytes as u64;
        if session.lasting_bytes() + more > session_bytes_max {
            return Err(Error::SessionLimit { limit: "session_bytes_max", value: session_bytes_max });
        }
        if held.bytes() + more > sessions_bytes_max {
            return Err(Error::SessionLimit { limit: "sessions_bytes_max", value: sessions_bytes_max });
        }
        self.refuse_on_disk(on_disk, more)?;
        Ok(Reserved { _memory: held.charge(bytes), _disk: on_disk.charge(bytes) })
    }

    /// Refuses bytes of files beyond the limit, where sessions are stored.
    fn refuse_on_disk(&self, on_disk: &Held, more: u64) -> Result<(), Error> {
        let value = self.limits.sessions_disk_bytes_max;
        if on_disk.bytes() + more > value && self.changes.is_heard() {
            return Err(Error::SessionLimit { limit: "sessions_disk_bytes_max", value });
        }
        Ok(())
    }

    /// Returns the time by which leases run.
    fn now(&self) -> SystemTime {
        let mut lease_time = self.lease_time.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock: another task's earlier reading would look like a step.
        lease_time.read(self.clock.wall())
    }

    fn refuse_another(&self, owned: &Owned<H>, name: &SessionName, now: SystemTime) -> Result<(), Error> {
        let alive = || owned.entries.iter().filter(|(_, entry)| !entry.session.is_expired(now));
        if alive().any(|(taken, _)| taken == name) {
            return Err(Error::SessionExists(name.to_string()));
        }
        let SessionLimits { sessions_max, sessions_bytes_max, .. } = self.limits;
        if alive().count() >= sessions_max as usize {
            return Err(Error::SessionLimit { limit: "sessions_max", value: sessions_max.into() });
        }
        if owned.held.bytes() >= sessions_bytes_max {
            return Err(Error::SessionLimit { limit: "sessions_bytes_max", value: sessions_bytes_max });
        }
        self.refuse_on_disk(&owned.on_disk, SESSION_BYTES as u64)
    }

    fn end_turn<T>(&self, key: &SessionKey, end: impl FnOnce(&mut Session, SystemTime) -> T) -> Option<T> {
        let now = self.now();
        let mut owned = self.owners.get_mut(&key.owner)?;
        let entry = owned.entries.get_mut(&key.name)?;
        let ran = entry.session.is_busy();
        let ended = end(&mut entry.session, now);
        if ran && !entry.session.is_busy() {
            entry.turn = None;
            entry.count();
            // Also after a roll-back: it was used.
            self.note(&mut owned, key, Happening::Changed);
        }
        Some(ended)
    }
}

fn deleted() -> Error {
    Error::Cancelled("the session was deleted".into())
}

fn not_found(key: &SessionKey) -> Error {
    Error::SessionNotFound(key.name.to_string())
}

fn live<'a, H>(
    owned: &'a mut Owned<H>,
    key: &SessionKey,
    now: SystemTime,
) -> Result<&'a mut Entry<H>, Error> {
    let entry = owned.entries.get_mut(&key.name).ok_or_else(|| not_found(key))?;
    if entry.session.is_expired(now) { Err(not_found(key)) } else { Ok(entry) }
}

/// Returns a session whose content is in memory.
fn usable<'a, H>(
    owned: &'a mut Owned<H>,
    key: &SessionKey,
    now: SystemTime,
) -> Result<&'a mut Entry<H>, Error> {
    let entry = live(owned, key, now)?;
    entry.session.refuse_without_content()?;
    Ok(entry)
}

/// Bytes that a turn is going to add, until it ends.
struct Reserved {
    _memory: Charge,
    _disk: Charge,
}

/// A running turn of a session. Dropping it rolls the turn back.
pub struct TurnGuard<H> {
    book: Arc<SessionBook<H>>,
    key: SessionKey,
    id: TurnId,
    /// The bytes that it is going to add.
    reserved: Option<Reserved>,
    /// Whose tokens it brings.
    tokenizer: Option<TokenizerHash>,
}

impl<H> TurnGuard<H> {
    /// Says whose tokens the turn brings.
    #[must_use]
    pub fn of_tokenizer(mut self, tokenizer: TokenizerHash) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Changes the bytes that it is going to add.
    ///
    /// # Errors
    /// The session or its owner would hold more than a limit, or the session was deleted.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), Error> {
        self.reserved = None;
        // Held alone: another turn would find the same room.
        let owned = self.book.owners.get_mut(&self.key.owner).ok_or_else(deleted)?;
        let entry = owned.entries.get(&self.key.name).ok_or_else(deleted)?;
        self.reserved = Some(self.book.reserve(&owned.held, &owned.on_disk, &entry.session, bytes)?);
        Ok(())
    }

    /// Returns the key of its session.
    #[must_use]
    pub fn key(&self) -> &SessionKey {
        &self.key
    }

    /// Commits the turn, as in [`Session::commit`]; returns the session's token count.
    pub fn commit(self, tokens: impl Into<Arc<[u32]>>, content: TurnContent) -> Result<usize, Error> {
        let tokens = tokens.into();
        let token_count = tokens.len();
        let committed = self.book.end_turn(&self.key, |session, now| {
            if let Some(tokenizer) = self.tokenizer {
                session.note_tokenizer(self.id, tokenizer);
            }
            session.commit(self.id, tokens, content, now)
        });
        if committed == Some(true) { Ok(token_count) } else { Err(deleted()) }
    }
}

impl<H> Drop for TurnGuard<H> {
    fn drop(&mut self) {
        // After a commit the turn does not run any more, and this changes nothing.
        self.book.end_turn(&self.key, |session, now| session.roll_back(self.id, now));
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
