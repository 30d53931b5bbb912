//! A sign of life of the engine's thread: the number of its turn. If one does not end, the thread hangs in
//! the device or in a driver, which nothing else shows: the thread is there, and its commands wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts turns: odd while one goes on, even while the thread waits for a command. The thread writes it, the
/// edge reads it.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// Notes that a turn begins.
    pub fn begin(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store(count + 1 + count % 2, Ordering::Relaxed);
    }

    /// Notes that the thread waits for a command.
    pub fn wait(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store(count + count % 2, Ordering::Relaxed);
    }

    /// Returns the turn that goes on, if one does.
    #[must_use]
    pub fn turn(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|count| count % 2 == 1)
    }
}
