//! Who runs next. Pure: it sees plain facts of what waits and runs, and decides who is admitted, who is
//! preempted, and how many tokens of each the next step takes.
//!
//! Of the waiting requests, the higher priority class goes first (a class rises with waiting), then whoever
//! has least: the fewest running sequences, then the least service, compared by principal, then by
//! connection, then by client. So they share a model max-min fairly, whatever they ask for and call
//! themselves. One that must wait for memory lets others pass as long as it starts no later for it.

mod allowance;
mod blocked;
mod crowd;
mod curve;
mod estimate;
mod owner;
mod pace;
mod plan;
mod queue;
mod runnable;
mod shares;
mod timeline;
mod turns;
#[cfg(test)]
mod turns_tests;
mod worth;

pub use allowance::{Allowance, Demand};
pub use blocked::{Blocked, Claims, Passer, Wanted};
pub use crowd::{Entry, Waiter, enter};
pub use owner::Owner;
pub use pace::{Pace, PaceLimits, StepLoad};
pub use plan::{Planning, StepBounds, demand};
pub use queue::{Queue, Ticket};
pub use runnable::Runnable;
pub use shares::{Candidate, Rank, Running, Shares, victim};
pub use timeline::Timeline;
pub use turns::Turns;
pub use worth::is_worth_saving;

use std::time::Duration;

use crate::clock::Moment;

/// Precedence of a request; the lesser one goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Latency-sensitive: a user waits for each token.
    Interactive,
    /// The default.
    #[default]
    Normal,
    /// Batch work that may be preempted.
    Background,
}

impl Priority {
    /// Returns the class of a request of this priority that waits since `since`: it rises by one with every
    /// `ageing`.
    #[must_use]
    pub fn class(self, since: Moment, now: Moment, ageing: Duration) -> u32 {
        let own = self.own_class();
        let risen = (now - since).as_nanos() / ageing.as_nanos().max(1);
        own - u32::try_from(risen).unwrap_or(own).min(own)
    }

    /// Returns the class of a request of this priority that does not wait.
    #[must_use]
    pub fn own_class(self) -> u32 {
        match self {
            Self::Interactive => 0,
            Self::Normal => 1,
            Self::Background => 2,
        }
    }
}
