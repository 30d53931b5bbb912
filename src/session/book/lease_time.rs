//! The time by which leases run.

use std::time::SystemTime;

/// The time by which leases run: wall time whose backward steps are left out. It goes on while the machine
/// sleeps, which monotonic time does not. No lease ends early because the clock was set back, and after that
/// leases run on at once instead of waiting for the clock to catch up.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseTime {
    /// The wall time at the last reading.
    told: SystemTime,
    now: SystemTime,
}

impl LeaseTime {
    /// Returns a time that begins with the wall time.
    pub(super) fn new(told: SystemTime) -> Self {
        Self { told, now: told }
    }

    /// Reads it anew, given the wall time.
    pub(super) fn read(&mut self, told: SystemTime) -> SystemTime {
        let step = told.duration_since(self.told).unwrap_or_default();
        self.told = told;
        self.now = self.now.checked_add(step).unwrap_or(self.now);
        self.now
    }

    /// Returns the lease time of a wall time as it is now.
    pub(super) fn of_wall(self, wall: SystemTime) -> SystemTime {
        let ahead = self.now.duration_since(self.told).unwrap_or_default();
        wall.checked_add(ahead).unwrap_or(wall)
    }
}
