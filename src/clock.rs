//! Time, through one door. Everything that asks what time it is holds a [`Clock`], so that a simulated
//! one can stand in; this is the only file that reads the system's clocks.

use std::ops::Sub;
use std::time::{Duration, Instant, SystemTime};

/// A point on a clock's monotonic line, counted from the clock's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// The moment `since_start` after the clock's start.
    #[must_use]
    pub const fn at(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// Time since the clock's start.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// The moment `delay` later; stays at the end of time rather than overflow.
    #[must_use]
    pub const fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }
}

impl Sub for Moment {
    type Output = Duration;

    /// Time from `earlier` to `self`; zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Tells the time.
pub trait Clock: Send + Sync {
    /// Now, on the monotonic line.
    fn now(&self) -> Moment;

    /// Now, as people count it; only for what is shown to them.
    fn wall(&self) -> SystemTime;
}

/// The machine's clocks.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic line starts now.
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
