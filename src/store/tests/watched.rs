//! A disk that is watched, and fails in one place.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::store::disk::{Disk, NEW, Room};
use crate::store::failing::FailingDisk;

/// A disk in memory behind a door that counts, and fails where it is told to.
#[derive(Clone)]
pub(super) struct WatchedDisk {
    disk: FailingDisk,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    /// Bytes of each file that were written since it was synced.
    unsynced: BTreeMap<String, usize>,
    seen: Seen,
    on_write: Option<OnWrite>,
}

/// Is called with the name of a file.
type OnWrite = Arc<dyn Fn(&str) + Send + Sync>;

/// What fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Names,
    Read(String),
    Write(String),
    Sync(String),
    /// There is no room for a whole file.
    NewFiles,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) bytes_read: usize,
    pub(super) unsynced_bytes_max: usize,
}

impl WatchedDisk {
    pub(super) fn new(disk: FailingDisk) -> Self {
        Self { disk, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Fails in these places from now on.
    pub(super) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults = faults.into_iter().collect();
    }

    /// Calls `act` with the name of each file before it is written.
    pub(super) fn on_write(&self, act: impl Fn(&str) + Send + Sync + 'static) {
        self.state().on_write = Some(Arc::new(act));
    }

    pub(super) fn seen(&self) -> Seen {
        self.state().seen
    }

    fn refuse(&self, fault: &Fault, why: io::ErrorKind) -> io::Result<()> {
        if self.state().faults.contains(fault) { Err(why.into()) } else { Ok(()) }
    }
}

impl Disk for WatchedDisk {
    fn names(&self) -> io::Result<Vec<String>> {
        self.refuse(&Fault::Names, io::ErrorKind::Other)?;
        self.disk.names()
    }

    fn size(&self, name: &str) -> io::Result<u64> {
        self.refuse(&Fault::Read(name.into()), io::ErrorKind::PermissionDenied)?;
        self.disk.size(name)
    }

    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        self.refuse(&Fault::Read(name.into()), io::ErrorKind::PermissionDenied)?;
        let read = self.disk.read(name, at, bytes)?;
        self.state().seen.bytes_read += read.len();
        Ok(read)
    }

    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()> {
        let act = self.state().on_write.clone();
        act.into_iter().for_each(|act| act(name));
        let is_refused = self.refuse(&Fault::Write(name.trim_end_matches(NEW).into()), io::ErrorKind::Other);
        if name.ends_with(NEW) && self.refuse(&Fault::NewFiles, io::ErrorKind::StorageFull).is_err() {
            // As much of it as there is room for.
            self.disk.write(name, at, &bytes[..bytes.len() / 2])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        is_refused?;
        self.disk.write(name, at, bytes)?;
        let mut state = self.state();
        *state.unsynced.entry(name.into()).or_default() += bytes.len();
        let unsynced = state.unsynced.values().sum();
        state.seen.unsynced_bytes_max = state.seen.unsynced_bytes_max.max(unsynced);
        Ok(())
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.refuse(&Fault::Sync(name.trim_end_matches(NEW).into()), io::ErrorKind::Other)?;
        self.disk.sync(name)?;
        self.state().unsynced.remove(name);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.disk.sync_names()
    }

    fn room(&self) -> io::Result<Room> {
        self.disk.room()
    }
}
