//! A session book and the writer of its store on a disk in memory, with things that happen to sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::watched::WatchedDisk;
use crate::clock::{Clock, Moment};
use crate::ids::{Principal, SessionKey};
use crate::session::{
    Arrived, History, InputKind, Joined, ListPage, Message, NewFork, NewSession, Pieces, Replace, Role,
    SessionBook, SessionFilter, SessionLimits, Snapshot, Terms, TermsChange, TurnContent, TurnRequest,
};
use crate::store::disk::Disk;
use crate::store::failing::{Chance, FailingDisk};
use crate::store::writer::Writer;
use crate::store::{Durability, LoadError, open};

/// What sessions are, without the numbers that a restart may change.
pub(super) type Told = BTreeMap<SessionKey, Snapshot>;

pub(super) struct World {
    pub(super) disk: FailingDisk,
    pub(super) book: Arc<SessionBook<()>>,
    pub(super) writer: Writer,
    /// Sessions that were found damaged, and why.
    pub(super) damaged: BTreeMap<SessionKey, String>,
}

struct Still;

impl Clock for Still {
    fn now(&self) -> Moment {
        Moment::default()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1000)
    }
}

/// A copy of all turns.
pub(super) fn whole(name: &str) -> NewFork {
    let change = TermsChange::default();
    NewFork { name: name.into(), change, turn_count: None, expected_token_count: None }
}

pub(super) fn book() -> Arc<SessionBook<()>> {
    let limits = SessionLimits {
        sessions_max: 1000,
        sessions_pinned_max: 1000,
        session_labels_max: 1000,
        session_bytes_max: 1 << 30,
        sessions_bytes_max: 1 << 30,
        sessions_disk_bytes_max: 1 << 30,
        session_watches_max: 1,
    };
    Arc::new(SessionBook::new(limits, Arc::new(Still)))
}

pub(super) fn key(name: &str) -> SessionKey {
    SessionKey { owner: "uid:1".into(), name: name.into() }
}

impl World {
    /// Starts on a disk, with every session read that can be.
    pub(super) fn start(disk: FailingDisk) -> Self {
        let door = Box::new(disk.clone());
        Self::begin(disk, door, true)
    }

    /// Starts on a disk behind a door.
    pub(super) fn on(disk: FailingDisk, door: &WatchedDisk) -> Self {
        Self::begin(disk, Box::new(door.clone()), true)
    }

    /// Starts on a disk and reads no session.
    pub(super) fn cold(disk: FailingDisk) -> Self {
        let door = Box::new(disk.clone());
        Self::begin(disk, door, false)
    }

    fn begin(disk: FailingDisk, door: Box<dyn Disk>, read: bool) -> Self {
        let (shelf, stored) = open::shelve(door).unwrap();
        let (shelf, book) = (Arc::new(shelf), book());
        book.number_from(shelf.first_number());
        let mut damaged: BTreeMap<_, _> =
            stored.iter().filter_map(|(outline, why)| Some((outline.key.clone(), why.clone()?))).collect();
        let keys: Vec<_> = stored.iter().map(|(outline, _)| outline.key.clone()).collect();
        book.restore(stored);
        for key in keys.into_iter().filter(|_| read) {
            let Some(id) = book.cold(&key) else { continue };
            match shelf.load(&key, id) {
                Ok(contents) => book.fill(&key, id, Ok(contents)),
                Err(LoadError::Damaged(why)) => {
                    book.fill(&key, id, Err(why.clone()));
                    damaged.insert(key, why);
                }
                Err(LoadError::Io(error)) => panic!("{error}"),
            }
        }
        book.changes().listen();
        let changes = Arc::clone(book.changes());
        let source = Arc::clone(&book);
        let now = Box::new(move |key: &SessionKey| source.snapshot(key));
        let writer = Writer::new(Arc::clone(&shelf), Durability::Turn, changes, now);
        Self { disk, book, writer, damaged }
    }

    /// Returns what every session is that can be used.
    pub(super) fn told(&self) -> Told {
        let page = ListPage { after: None, size: 1000, filter: SessionFilter::default() };
        let owners: [Principal; 2] = ["uid:1".into(), "token:2".into()];
        let views = owners.iter().flat_map(|owner| self.book.list(owner, &page).0);
        let snapshots = views.filter_map(|view| Some((view.key.clone(), self.book.snapshot(&view.key)?)));
        snapshots.filter(|(key, _)| !self.damaged.contains_key(key)).collect()
    }

    /// Writes what has changed.
    pub(super) fn write(&mut self) {
        let taken = self.book.changes().take(Some(Duration::ZERO));
        self.writer.write(taken.keys, false);
    }

    /// Writes everything and leaves in order.
    pub(super) fn leave(mut self) -> FailingDisk {
        let taken = self.book.changes().take(Some(Duration::ZERO));
        self.writer.write(taken.keys, true);
        self.writer.leave().unwrap();
        self.disk
    }

    pub(super) fn create(&self, name: &str) {
        let new = NewSession {
            key: key(name),
            model: "m".into(),
            terms: Terms::after_use(Duration::from_secs(60)),
            history: History::Append,
            cache_salt: "salt".into(),
        };
        drop(self.book.create(new));
    }

    /// A raw turn.
    pub(super) fn raw(&self, name: &str, tokens: &[u32]) {
        let request = |input| TurnRequest {
            model: None,
            input,
            expected_token_count: None,
            input_bytes: 0,
            history: None,
        };
        let Ok((guard, start)) = self.book.begin(&key(name), &request(InputKind::Raw), ()) else { return };
        guard.commit([&*start.tokens, tokens].concat(), TurnContent::Raw).unwrap();
    }

    /// A chat turn that rewrites all but the first bytes of the text.
    pub(super) fn chat(&self, name: &str, text: &str, kept: usize) {
        let request = TurnRequest {
            model: None,
            input: InputKind::Chat,
            expected_token_count: None,
            input_bytes: 0,
            history: None,
        };
        let Ok((guard, start)) = self.book.begin(&key(name), &request, ()) else { return };
        let old = start.text.unwrap_or_default();
        let text = [&old[..kept.min(old.len())], text].concat();
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let messages = vec![Message::text(Role::User, text.clone()), Message::text(Role::Assistant, "yes")];
        guard
            .commit(
                tokens,
                TurnContent::Chat { messages, text: Some(text.into()), text_is_whole: true, answer: None },
            )
            .unwrap();
    }

    /// Lets a copy of a session take the place of another, in one step.
    pub(super) fn replace(&self, from: &str, name: &str) {
        let Some(Snapshot { outline, contents: Some(contents) }) = self.book.snapshot(&key(from)) else {
            return;
        };
        let mut joined = Joined::default();
        for record in Pieces::new(&outline, contents) {
            joined.add(&record.outline, &record.content, usize::MAX).unwrap();
        }
        let (outline, contents) = joined.into_session().unwrap();
        let (model, terms) = (outline.model.clone(), outline.terms.clone());
        let replace = Some(Replace::default());
        let arrived = Arrived { key: key(name), model, terms, outline, contents, replace };
        self.book.take_in(self.book.expect(&"uid:1".into()), arrived).unwrap();
    }

    /// Lets something happen by chance.
    pub(super) fn happen(&self, chance: &mut Chance) {
        let name = ["a", "b", "c", "d"][chance.below(4)];
        let number = chance.below(1000);
        match chance.below(11) {
            0 | 1 => self.create(name),
            2..=4 => self.chat(name, &format!("turn {number} of {name}"), number % 40),
            5 | 6 => self.raw(name, &[7; 5].map(|token| token + u32::try_from(number).unwrap())),
            7 => {
                let other = ["a", "b", "c", "d"][chance.below(4)];
                drop(self.book.fork(&key(name), whole(other)));
            }
            8 => self.replace(name, ["a", "b", "c", "d"][chance.below(4)]),
            9 => drop(self.book.with(&key(name), |session, now| {
                let turns = number % (session.view().turns.len() + 1);
                session.truncate_turns(turns, now)
            })),
            _ => drop(self.book.delete(&key(name))),
        }
    }
}

/// Returns the keys of all.
pub(super) fn keys<'a>(told: impl IntoIterator<Item = &'a Told>) -> BTreeSet<SessionKey> {
    told.into_iter().flat_map(|told| told.keys().cloned()).collect()
}
