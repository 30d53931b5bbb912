//! Notices an engine whose thread hangs: health then says NOT_SERVING, so that a supervisor learns of it, and
//! SERVING again if the thread goes on.

use std::convert::Infallible;
use std::time::Duration;

use crate::clock::{Clock, Moment};
use crate::engine::EngineHandle;
use crate::rpc::Health;

/// Interval between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The turn that was seen last, and when it was first seen.
#[derive(Debug, Default)]
struct Seen {
    turn: Option<u64>,
    since: Moment,
}

/// Watches until it is dropped.
pub(super) async fn watch(
    engine: &EngineHandle,
    health: &Health,
    clock: &dyn Clock,
    limit: Duration,
) -> Infallible {
    let (mut seen, mut hung) = (Seen::default(), false);
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        looks.tick().await;
        let hangs = seen.hangs(engine.turn(), clock.now(), limit);
        if hangs == hung {
            continue;
        }
        hung = hangs;
        if hangs {
            tracing::error!(?limit, "engine_stall_s: the engine's thread hangs");
        } else {
            tracing::warn!("the engine's thread goes on");
        }
        health.set(!hangs).await;
    }
}

impl Seen {
    /// Returns whether the turn that goes on has gone on for longer than `limit`.
    fn hangs(&mut self, turn: Option<u64>, now: Moment, limit: Duration) -> bool {
        if turn != self.turn {
            *self = Self { turn, since: now };
        }
        turn.is_some() && now - self.since > limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_turn_that_does_not_end_is_a_hang() {
        let mut seen = Seen::default();
        let mut hangs = |turn, second| {
            let now = Moment::at(Duration::from_secs(second));
            seen.hangs(turn, now, Duration::from_secs(10))
        };
        assert!(!hangs(None, 100), "waiting for work");
        assert!(!hangs(Some(1), 200));
        assert!(!hangs(Some(1), 210));
        assert!(hangs(Some(1), 211));
        assert!(!hangs(Some(3), 212), "the next turn has its own time");
        assert!(hangs(Some(3), 300));
        assert!(!hangs(None, 301));
    }
}
