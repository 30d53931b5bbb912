//! Time comes in through one door: every part that needs the time holds a [`Clock`], so that tests can pass a
//! simulated one. No other file reads the system's clocks.

use std::ops::Sub;
use std::time::{Duration, Instant, SystemTime};

/// A monotonic point in time, as the duration since the clock's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// Returns the moment `since_start` after the clock's start.
    #[must_use]
    pub const fn at(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Returns the time since the clock's start.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// Returns the moment `delay` later; saturates.
    #[must_use]
    pub const fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }
}

impl Sub for Moment {
    type Output = Duration;

    /// Returns the time from `earlier` to `self`; zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// A source of time.
pub trait Clock: Send + Sync {
    /// Returns the monotonic time.
    fn now(&self) -> Moment;

    /// Returns the wall-clock time; for display, and for leases, which go on while the machine sleeps.
    fn wall(&self) -> SystemTime;
}

/// The clocks of the operating system.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// Creates a clock whose monotonic time starts at zero.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "this is the door through which time comes in")]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }

    #[allow(clippy::disallowed_methods, reason = "this is the door through which time comes in")]
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}
