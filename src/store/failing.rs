//! A disk in memory that fails when it is told to. After a kill it has what was written; after a power
//! failure what was synced, and by chance some of what was not: whole and partial writes, names in their
//! order. As on Linux, what a failed sync did not write is not written by a later one either, unless it is
//! written anew.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, Room};

/// Bytes that a disk writes at once or not at all; few, so that small files tear too.
const SECTOR_BYTES: usize = 16;

/// A small generator of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    /// Returns a number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit.max(1)
    }
}

/// The disk; its clones are the same one.
#[derive(Clone)]
pub(crate) struct FailingDisk(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
struct State {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// What names are since the last sync, one change after the other.
    later_names: Vec<BTreeMap<String, u64>>,
    made: u64,
    writes: usize,
    failure: Failure,
    /// Whether it says that it synced, and did not.
    lies: bool,
    chance: Chance,
    /// Bytes of the disk.
    total_bytes: u64,
}

#[derive(Clone, Debug, Default)]
struct Content {
    cached: Vec<u8>,
    durable: Vec<u8>,
    /// Bytes at its start that a failed sync left as they were, and later ones take for written.
    skipped: usize,
}

/// When writes fail.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Failure {
    Never,
    /// After this many of them, for good.
    After(usize),
    /// Each with this chance in a hundred.
    Percent(usize),
}

impl FailingDisk {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            later_names: Vec::new(),
            made: 0,
            writes: 0,
            failure: Failure::Never,
            lies: false,
            chance: Chance(1),
            total_bytes: 1 << 40,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Makes it a disk of `total_bytes`, which are only told: no write fails for them.
    pub(super) fn set_total_bytes(&self, total_bytes: u64) {
        self.state().total_bytes = total_bytes;
    }

    /// Ends every write after `writes` more.
    pub(crate) fn end_after(&self, writes: usize) {
        let mut state = self.state();
        state.failure = Failure::After(state.writes + writes);
    }

    /// Fails writes by chance; 0 percent mends it.
    pub(crate) fn fail(&self, percent: usize, seed: u64) {
        let mut state = self.state();
        (state.failure, state.chance) = (Failure::Percent(percent), Chance(seed));
    }

    /// Says from now on that it synced, and does not.
    pub(crate) fn lie(&self) {
        self.state().lies = true;
    }

    /// Returns the number of writes, syncs and changes of names.
    pub(crate) fn writes(&self) -> usize {
        self.state().writes
    }

    /// Returns whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        let state = self.state();
        matches!(state.failure, Failure::After(writes) if state.writes > writes)
    }

    /// Returns the disk as the next daemon finds it after this one was killed: the system goes on, so all
    /// that was written is there, and no more durable than before.
    pub(crate) fn after_kill(&self) -> Self {
        let mut state = State { failure: Failure::Never, ..self.state().clone() };
        // What a sync failed to write before it came, a daemon cannot know.
        state.files.values_mut().for_each(|content| content.skipped = 0);
        Self(Arc::new(Mutex::new(state)))
    }

    /// Returns the disk as the next daemon finds it after a power failure.
    pub(crate) fn after_power_failure(&self, seed: u64) -> Self {
        let mut state = self.state().clone();
        let mut chance = Chance(seed);
        let kept = chance.below(state.later_names.len() + 1);
        state.names = match kept.checked_sub(1) {
            Some(last) => state.later_names[last].clone(),
            None => state.durable_names.clone(),
        };
        for content in state.files.values_mut() {
            content.cached = torn(content, &mut chance);
        }
        state.settle();
        Self(Arc::new(Mutex::new(state)))
    }

    /// Returns the names of its files, and their sizes.
    pub(super) fn sizes(&self) -> Vec<(String, usize)> {
        let state = self.state();
        let size = |id: &u64| state.files[id].cached.len();
        state.names.iter().map(|(name, id)| (name.clone(), size(id))).collect()
    }

    /// Changes a file's bytes as nothing but damage does.
    pub(super) fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let id = state.names[name];
        change(&mut state.files.get_mut(&id).unwrap().cached);
        state.settle();
    }

    /// Gives two files each other's name.
    pub(super) fn swap(&self, one: &str, other: &str) {
        let mut state = self.state();
        let ids = (state.names[one], state.names[other]);
        state.names.insert(one.into(), ids.1);
        state.names.insert(other.into(), ids.0);
        state.settle();
    }
}

/// Returns what of a file's content a power failure leaves.
fn torn(content: &Content, chance: &mut Chance) -> Vec<u8> {
    let Content { cached, durable, skipped: _ } = content;
    if cached == durable {
        return durable.clone();
    }
    let sizes =
        [durable.len(), cached.len(), chance.below(cached.len() + 1).max(durable.len().min(cached.len()))];
    let size = sizes[chance.below(3)];
    let mut left = durable.clone();
    left.resize(size, 0);
    for sector in (0..size).step_by(SECTOR_BYTES) {
        let end = size.min(sector + SECTOR_BYTES).min(cached.len());
        if sector < end && chance.below(2) == 0 {
            left[sector..end].copy_from_slice(&cached[sector..end]);
        }
    }
    left
}

impl State {
    /// Makes all that there is durable, on a disk that works.
    fn settle(&mut self) {
        for Content { cached, durable, skipped } in self.files.values_mut() {
            durable.clone_from(cached);
            *skipped = 0;
        }
        self.durable_names.clone_from(&self.names);
        self.later_names.clear();
        self.failure = Failure::Never;
    }

    /// Counts a write; fails if it is to.
    fn write(&mut self) -> io::Result<()> {
        self.writes += 1;
        let fails = match self.failure {
            Failure::Never => false,
            Failure::After(writes) => self.writes > writes,
            Failure::Percent(percent) => self.chance.below(100) < percent,
        };
        if fails { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn content(&mut self, name: &str) -> io::Result<&mut Content> {
        let id = self.names.get(name).ok_or(ErrorKind::NotFound)?;
        self.files.get_mut(id).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn change_names(&mut self, change: impl FnOnce(&mut BTreeMap<String, u64>)) {
        change(&mut self.names);
        self.later_names.push(self.names.clone());
    }
}

impl Disk for FailingDisk {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn size(&self, name: &str) -> io::Result<u64> {
        Ok(self.state().content(name)?.cached.len() as u64)
    }

    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        let content = &state.content(name)?.cached;
        let at = usize::try_from(at).unwrap().min(content.len());
        Ok(content[at..content.len().min(at + bytes)].to_vec())
    }

    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let written = state.write();
        if !state.names.contains_key(name) {
            let id = state.made;
            state.made += 1;
            state.files.insert(id, Content::default());
            state.change_names(|names| _ = names.insert(name.into(), id));
        }
        let part = if written.is_ok() { bytes.len() } else { state.chance.below(bytes.len() + 1) };
        let (content, at) = (state.content(name)?, usize::try_from(at).unwrap());
        content.cached.resize(at, 0);
        content.cached.extend(&bytes[..part]);
        content.skipped = content.skipped.min(at);
        written
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        let mut chance = state.chance.clone();
        let written = state.write();
        if state.lies {
            return written;
        }
        let content = state.content(name)?;
        if written.is_ok() {
            content.durable.resize(content.skipped, 0);
            content.durable.extend(&content.cached[content.skipped..]);
        } else {
            (content.durable, content.skipped) = (torn(content, &mut chance), content.cached.len());
        }
        written
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.write()?;
        let id = *state.names.get(from).ok_or(ErrorKind::NotFound)?;
        state.change_names(|names| {
            names.remove(from);
            names.insert(to.into(), id);
        });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.write()?;
        state.change_names(|names| _ = names.remove(name));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state();
        state.write()?;
        state.durable_names = state.names.clone();
        state.later_names.clear();
        Ok(())
    }

    fn room(&self) -> io::Result<Room> {
        let state = self.state();
        let used: usize = state.names.values().map(|id| state.files[id].cached.len()).sum();
        Ok(Room { free_bytes: state.total_bytes.saturating_sub(used as u64), total_bytes: state.total_bytes })
    }
}
