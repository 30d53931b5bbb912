//! Snapshots on a disk in memory, written when a test says so: for those who drive the engine by hand.

use super::writer::{Known, Writer};
use super::{SnapshotSettings, Snapshots};
use crate::ids::{Principal, SessionId};
use crate::store::failing::FailingDisk;

/// The disk, and the writer that has no thread.
pub(crate) struct ByHand {
    disk: FailingDisk,
    writer: Writer,
}

impl ByHand {
    /// Returns snapshots on an empty disk.
    pub(crate) fn new(
        settings: SnapshotSettings,
        known: impl Fn(SessionId) -> Option<Principal> + Send + 'static,
    ) -> (Snapshots, Self) {
        Self::on(FailingDisk::new(), settings, Box::new(known))
    }

    fn on(disk: FailingDisk, settings: SnapshotSettings, known: Known) -> (Snapshots, Self) {
        let (snapshots, writer) = Snapshots::on(Box::new(disk.clone()), settings, known);
        (snapshots, Self { disk, writer })
    }

    /// Writes all that waits, after a look at the folder if there was none yet.
    pub(crate) fn work(&self) {
        self.writer.work();
    }

    /// Fails writes by chance; 0 percent mends the disk.
    pub(crate) fn fail(&self, percent: usize, seed: u64) {
        self.disk.fail(percent, seed);
    }

    /// Changes a byte of every file, where there is one.
    pub(crate) fn damage(&self, at: usize) {
        for (name, _) in self.disk.sizes() {
            self.disk.damage(&name, |bytes| bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1));
        }
    }

    /// Returns the bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.disk.sizes().iter().map(|(_, size)| *size as u64).sum()
    }

    /// Returns what the next daemon finds after this one was killed, or after a power failure.
    pub(crate) fn restarted(
        &self,
        power_failure: Option<u64>,
        settings: SnapshotSettings,
        known: impl Fn(SessionId) -> Option<Principal> + Send + 'static,
    ) -> (Snapshots, Self) {
        let disk = match power_failure {
            Some(seed) => self.disk.after_power_failure(seed),
            None => self.disk.after_kill(),
        };
        Self::on(disk, settings, Box::new(known))
    }
}
