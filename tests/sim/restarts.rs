//! The ends of a daemon's life: in order, by kill, by power failure, also amid a write; and the disk that is
//! full or broken for a while. After each the sessions are what was acknowledged, and clients go on.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;

use super::request::Known;
use super::saved::End;
use super::world::{MODELS, World};
use crate::engine::Command;
use crate::ids::SessionKey;
use crate::session::{Outline, Snapshot};
use crate::store::stepped::{FailingDisk, SteppedStore};

/// Time that a drain takes at most.
const DRAIN: Duration = Duration::from_secs(1);

/// Writes, syncs and changes of names of a step of the store, about.
const STEP_WRITES: u64 = 8;

impl World {
    /// Lets the store take a step, the disk break or mend, and the daemon end.
    pub(super) fn disk_tick(&mut self) {
        if self.random.once_in(3) {
            self.store_step();
        }
        if self.calm {
            return;
        }
        if self.random.once_in(100) {
            self.disk_fails = [0, 10, 40, 100][self.random.small(4) as usize];
            self.set_disk();
        }
        if self.random.once_in(200) {
            let end = [End::InOrder, End::Kill, End::PowerFailure][self.random.small(3) as usize];
            if self.random.once_in(2) {
                let writes = self.random.below(STEP_WRITES);
                self.store.disk.end_after(usize::try_from(writes).unwrap());
            }
            if end == End::InOrder {
                self.leave();
            } else if self.random.once_in(4) {
                self.store_step();
            }
            self.restart(end);
            if end == End::Kill && self.random.once_in(3) {
                // Of what the killed one wrote, not all was synced.
                self.live_on();
                self.restart(End::PowerFailure);
            }
        }
    }

    /// Lets a few things happen, and writes what changed.
    pub(super) fn live_on(&mut self) {
        for _ in 0..self.random.below(8) {
            self.something_happens();
            self.engine_tick();
        }
        self.store_step();
    }

    fn set_disk(&mut self) {
        let seed = self.random.below(1 << 32);
        self.store.disk.fail(self.disk_fails, seed);
    }

    /// Writes what has changed.
    pub(super) fn store_step(&mut self) {
        let told = self.store.step();
        self.check_told(&told);
        let reached = (!self.store.disk.has_ended()).then(|| (self.store.behind(), false));
        self.saved.note(told, reached);
    }

    /// Ends what runs, or lets it run until the limit, and leaves the folder.
    pub(super) fn leave(&mut self) {
        let (reply, mut drained) = oneshot::channel();
        self.engine.command(Command::Drain(DRAIN, reply));
        while drained.try_recv().is_err() {
            self.engine_tick();
            if self.random.once_in(3) {
                self.store_step();
            }
        }
        self.requests.clear();
        self.note_uses();
        let (told, left) = self.store.leave();
        self.check_told(&told);
        let reached = (!self.store.disk.has_ended()).then(|| (self.store.behind(), true));
        self.saved.note(told, reached);
        if left.is_ok() && self.disk_fails == 0 && !self.store.disk.has_ended() {
            self.saved.show_all();
        }
        assert!(left.is_ok() || self.disk_fails > 0 || self.store.disk.has_ended(), "{left:?}");
    }

    /// Ends the daemon and starts the next one. Returns the sessions that were found.
    pub(super) fn restart(&mut self, end: End) -> BTreeMap<SessionKey, Known> {
        *self.restarts.entry(end).or_default() += 1;
        let disk = match end {
            End::InOrder | End::Kill => self.store.disk.after_kill(),
            End::PowerFailure => self.store.disk.after_power_failure(self.random.below(1 << 32)),
        };
        let found = found(&disk, self);
        self.saved.check(&found, end, self.disk_fails == 0);
        let down = self.random.below(3000);
        self.pass(Duration::from_millis(down));
        self.begin_life();
        // A daemon whose disk fails does not start; the next try is on one that works.
        disk.fail(self.disk_fails, u64::from(self.ticks));
        let opened = SteppedStore::open(disk.clone(), &self.book).or_else(|error| {
            assert!(self.disk_fails > 0, "{error}");
            SteppedStore::open(disk.after_kill(), &self.book)
        });
        self.store = opened.unwrap().0;
        self.set_disk();
        let known = |is: &Snapshot| Known {
            tokens: is.contents.as_ref().unwrap().tokens.to_vec(),
            terms: is.outline.terms.clone(),
            used: is.outline.used,
            turn: None,
        };
        self.kept = found.iter().map(|(key, is)| (key.clone(), known(is))).collect();
        let found = self.kept.clone();
        self.check_sessions();
        for model in MODELS {
            self.load(model);
        }
        found
    }

    /// Reads a session's content, if nobody has used it since the start.
    pub(super) fn warm(&mut self, key: &SessionKey) {
        if let Some(id) = self.book.cold(key) {
            self.book.fill(key, id, Ok(self.store.load(key, id).unwrap()));
            if self.disk_fails == 0 && !self.store.disk.has_ended() {
                self.saved.show(key);
            }
        }
    }
}

/// Returns the sessions that a daemon finds on a disk.
fn found(disk: &FailingDisk, world: &World) -> BTreeMap<SessionKey, Snapshot> {
    // What it finds is not to change what the next one does.
    let book = world.new_book();
    let (store, stored) = SteppedStore::open(disk.after_kill(), &book).unwrap();
    let read = |(outline, damage): (Outline, Option<String>)| {
        assert_eq!(damage, None, "{} is damaged", outline.key);
        let contents = store.load(&outline.key, outline.id).unwrap();
        (outline.key.clone(), Snapshot { outline, contents: Some(contents) })
    };
    stored.into_iter().map(read).collect()
}
