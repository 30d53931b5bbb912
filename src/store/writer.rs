//! The thread that writes. It takes all changes that wait, writes their files, then makes all of them
//! durable: changes that come together wait together, but for no more bytes than [`BATCH_BYTES_MAX`] at a
//! time. A session whose file cannot be written stays in its list and is tried again after the next change,
//! or after a while: the file then gets what it missed. Nobody waits for it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::put::{Step, put};
use super::shelf::{Doubt, Kept, Shelf};
use super::{Durability, Written, clean, file};
use crate::count::count;
use crate::ids::SessionKey;
use crate::session::{Changes, Lease, Outline, Snapshot, Taken, record};

/// Time between two tries to write what could not be written.
const RETRY: Duration = Duration::from_secs(10);

/// The same where others make way on a full disk.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// Bytes that others free on a full disk, if they have as many: more than sessions write in a while.
const WAY_BYTES: u64 = 64 << 20;

/// Time in which changes are collected where nobody waits for them.
const COLLECT: Duration = Duration::from_secs(1);

/// Time of use that may be lost.
const USE_LOST: Duration = Duration::from_secs(60);

/// The part of a lifetime that it may be.
const USE_LOST_PART: u32 = 10;

/// Bytes after which what was written is made durable and acknowledged before more is written: a disk takes
/// them in a fraction of a second.
pub(super) const BATCH_BYTES_MAX: u64 = 16 << 20;

/// Tells what a session is now; none if it is gone.
pub(super) type Source = Box<dyn Fn(&SessionKey) -> Option<Snapshot> + Send>;

/// Asks others on a full disk to free bytes; returns whether they do.
pub(super) type MakeWay = Box<dyn Fn(u64) -> bool + Send>;

pub(super) struct Writer {
    shelf: Arc<Shelf>,
    durability: Durability,
    changes: Arc<Changes>,
    now: Source,
    make_way: MakeWay,
    /// Whether others make way.
    is_room_coming: bool,
    /// Sessions whose file could not be written.
    pub(super) behind: BTreeSet<SessionKey>,
    /// Those of them that are still to be tried in this round.
    due: BTreeSet<SessionKey>,
    /// Sessions that were only used since their file was written.
    used: BTreeSet<SessionKey>,
    /// Whether it was said that sessions are not written.
    said: bool,
}

impl Writer {
    pub(super) fn new(shelf: Arc<Shelf>, durability: Durability, changes: Arc<Changes>, now: Source) -> Self {
        let (behind, due, used) = Default::default();
        let (make_way, is_room_coming): (MakeWay, _) = (Box::new(|_| false), false);
        Self { shelf, durability, changes, now, make_way, is_room_coming, behind, due, used, said: false }
    }

    /// Asks others to free bytes where the disk is full.
    pub(super) fn with_way(self, make_way: MakeWay) -> Self {
        Self { make_way, ..self }
    }

    /// Writes until there are no more changes.
    pub(super) fn run(mut self) {
        let _end = End(Arc::clone(&self.shelf));
        loop {
            let taken = self.changes.take(self.patience());
            let ended = taken.ended;
            self.step(taken);
            if ended {
                break;
            }
            if self.durability == Durability::Second {
                self.changes.pause(COLLECT);
            }
        }
        if let Err(error) = self.leave() {
            tracing::warn!(%error, "the state folder could not be left in order");
        }
    }

    /// Returns the time after which it goes on without changes; none if there is nothing to go on with.
    pub(super) fn patience(&self) -> Option<Duration> {
        let retry = if self.is_room_coming { RETRY_SOON } else { RETRY };
        if self.due.is_empty() { (!self.behind.is_empty()).then_some(retry) } else { Some(Duration::ZERO) }
    }

    /// Deals with changes that were taken.
    pub(super) fn step(&mut self, taken: Taken) {
        let Taken { mut keys, ended } = taken;
        if ended {
            keys.append(&mut self.used);
        }
        self.write(keys, ended);
    }

    /// Writes what sessions are now, and after them those that are behind, until other changes wait.
    pub(super) fn write(&mut self, mut keys: BTreeSet<SessionKey>, is_last: bool) {
        self.is_room_coming = false;
        if self.due.is_empty() || is_last {
            self.due.clone_from(&self.behind);
        }
        self.due.retain(|key| !keys.contains(key));
        while !keys.is_empty() {
            self.batch(&mut keys, is_last);
        }
        let mut due = std::mem::take(&mut self.due);
        while !due.is_empty() {
            self.batch(&mut due, is_last);
            if !is_last && self.changes.has_more() {
                break;
            }
        }
        self.due = due;
        if self.said && self.behind.is_empty() {
            self.said = false;
            tracing::info!("sessions are written to state_dir again");
        }
    }

    /// Writes the first of some sessions, and says that they are dealt with.
    fn batch(&mut self, keys: &mut BTreeSet<SessionKey>, is_last: bool) {
        let (mut done, mut steps, mut bytes, mut error) = (Vec::new(), Vec::new(), 0, None);
        while bytes < BATCH_BYTES_MAX
            && error.is_none()
            && let Some(key) = keys.pop_first()
        {
            done.push(key.clone());
            self.used.remove(&key);
            self.behind.remove(&key);
            let told = self.shelf.kept().get(&key).cloned();
            let now = (self.now)(&key);
            if !is_last && is_only_used(told.as_ref(), now.as_ref()) {
                self.used.insert(key);
                continue;
            }
            match put(&self.shelf, &key, told, now) {
                Ok(Some(step)) => {
                    bytes += step.bytes;
                    steps.push(step);
                }
                Ok(None) => error = self.drop_older(key).err(),
                Err(failed) => error = Some(self.fail(key, failed)),
            }
        }
        let synced = self.sync(steps);
        let error = error.or(synced.err());
        if error.as_ref().is_some_and(is_full) && !self.is_room_coming {
            self.is_room_coming = (self.make_way)(WAY_BYTES);
        }
        if let Some(error) = error.filter(|_| !self.said) {
            self.said = true;
            tracing::warn!(%error, "sessions cannot be written to state_dir; they go on in memory");
        }
        let behind = count(self.behind.len());
        self.changes.settle(&done);
        self.shelf.written.send_modify(|written| written.behind = behind);
    }

    /// Makes files durable; returns the first error.
    fn sync(&mut self, steps: Vec<Step>) -> io::Result<()> {
        let (mut durable, mut synced) = (Vec::with_capacity(steps.len()), Ok(()));
        for step in steps {
            match step.sync(&self.shelf) {
                Ok(()) => durable.push(step),
                Err(error) => synced = synced.and(Err(self.fail(step.key, error))),
            }
        }
        let is_named = durable.iter().any(Step::is_named);
        let named = if is_named { self.shelf.disk.sync_names() } else { Ok(()) };
        let mut removed = Ok(());
        for step in durable {
            // A file that is still what it was gets the change again; of one with a new name it is not known.
            if named.is_err() && step.is_named() {
                self.behind.insert(step.key.clone());
            }
            let key = step.key.clone();
            step.keep(&self.shelf, named.is_ok());
            removed = self.drop_older(key).and(removed);
        }
        synced.and(named).and(removed)
    }

    /// Removes what a session has taken the place of. What is left stays in its list.
    fn drop_older(&mut self, key: SessionKey) -> io::Result<()> {
        self.shelf.drop_older(&key).inspect_err(|_| _ = self.behind.insert(key))
    }

    /// Notes that a session's file could not be written.
    fn fail(&mut self, key: SessionKey, error: io::Error) -> io::Error {
        self.shelf.doubt(&key);
        self.behind.insert(key);
        error
    }

    /// Leaves the note that all is written, if it is.
    pub(super) fn leave(&self) -> io::Result<()> {
        if !self.behind.is_empty() {
            return Ok(());
        }
        let (kept, disk) = (self.shelf.kept(), &*self.shelf.disk);
        // The note is not to tell more than the files do after a power failure.
        for kept in kept.values().filter(|kept| !kept.synced) {
            disk.sync(&file::name(kept.id()))?;
        }
        clean::leave(disk, kept.values().map(|kept| (&kept.told, kept.tail)))
    }
}

/// Returns whether somebody else may free what lacks.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Returns whether a session differs from what its file tells by little time of its last use.
fn is_only_used(told: Option<&Kept>, now: Option<&Snapshot>) -> bool {
    let (Some(Kept { told, doubt: Doubt::Nothing, .. }), Some(now)) = (told, now) else { return false };
    let used = now.outline.used;
    let lost = used.duration_since(told.outline.used).unwrap_or(Duration::MAX);
    let may_be_lost = match now.outline.terms.lease {
        Lease::AfterUse(ttl) => USE_LOST.min(ttl / USE_LOST_PART),
        Lease::Until(_) => USE_LOST,
    };
    let outline = Outline { used, ..told.outline.clone() };
    lost < may_be_lost
        && outline == now.outline
        && record(Some(&Snapshot { outline, contents: told.contents.clone() }), now).is_none()
}

/// Says that nothing more is written, also where the thread panics: nobody waits then.
struct End(Arc<Shelf>);

impl Drop for End {
    fn drop(&mut self) {
        let failed = u32::from(std::thread::panicking());
        self.0.written.send_modify(|written| {
            *written = Written { behind: written.behind.max(failed), ended: true };
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::session::{Session, Terms};
    use crate::store::file::Tail;

    #[test]
    fn of_the_last_use_a_tenth_of_the_lifetime_may_be_lost_and_a_minute_at_most() {
        let lost = |ttl: u64, used: u64| {
            let terms = Terms::after_use(Duration::from_secs(ttl));
            let key = SessionKey { owner: "uid:1".into(), name: "a".into() };
            let told = Session::new(key, "m".into(), terms, SystemTime::UNIX_EPOCH).snapshot();
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(used);
            let now = Snapshot { outline: Outline { used, ..told.outline.clone() }, ..told.clone() };
            is_only_used(Some(&Kept::new(Tail::default(), told)), Some(&now))
        };
        assert!(lost(100, 9) && !lost(100, 10));
        assert!(lost(86_400, 59) && !lost(86_400, 60));
    }
}
