//! New connections. Anybody who reaches a port can open connections and say nothing; so a connection takes
//! one of the places of `connections_max` only with its first admitted call. Until then it is a newcomer:
//! newcomers have a limit of their own, the oldest goes when it is reached, and each has a time limit.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use crate::error::Error;

/// When a caller that found no place should try again.
const PLACE_RETRY: Duration = Duration::from_secs(1);

/// The places of a listener's connections.
#[derive(Clone, Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    count: u32,
}

/// Whether a connection has a place.
#[derive(Debug)]
pub struct Standing {
    places: Places,
    place: OnceLock<OwnedSemaphorePermit>,
}

/// Connections without a place, oldest first.
#[derive(Debug)]
pub(super) struct Newcomers {
    count_max: usize,
    waiting: VecDeque<(Weak<Standing>, AbortHandle)>,
}

impl Places {
    pub(super) fn new(count: u32) -> Self {
        Self { free: Arc::new(Semaphore::new(count as usize)), count }
    }

    /// Returns the standing of a new connection.
    pub(super) fn newcomer(&self) -> Arc<Standing> {
        Arc::new(Standing { places: self.clone(), place: OnceLock::new() })
    }
}

impl Standing {
    /// Takes a place for a connection that makes an admitted call, if it has none.
    pub(super) fn establish(&self) -> Result<(), Error> {
        if self.is_established() {
            return Ok(());
        }
        let Ok(place) = Arc::clone(&self.places.free).try_acquire_owned() else {
            let value = u64::from(self.places.count);
            return Err(Error::TooManyOpen { limit: "connections_max", value, retry_after: PLACE_RETRY });
        };
        // Of two first calls at once one is faster; the other's place is free again.
        drop(self.place.set(place));
        Ok(())
    }

    pub(super) fn is_established(&self) -> bool {
        self.place.get().is_some()
    }
}

impl Newcomers {
    pub(super) fn new(count_max: u32) -> Self {
        Self { count_max: count_max as usize, waiting: VecDeque::new() }
    }

    /// Adds a connection that `task` serves; ends the oldest newcomer if there are too many.
    pub(super) fn add(&mut self, standing: Weak<Standing>, task: AbortHandle) {
        self.waiting.retain(|(standing, task)| {
            !task.is_finished() && standing.upgrade().is_some_and(|standing| !standing.is_established())
        });
        while self.waiting.len() >= self.count_max {
            let Some((_, oldest)) = self.waiting.pop_front() else { break };
            tracing::debug!("connections_unproven_max: the oldest connection without a call is closed");
            oldest.abort();
        }
        self.waiting.push_back((standing, task));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once_by_a_connection_and_returned_with_it() {
        let places = Places::new(1);
        let (first, second) = (places.newcomer(), places.newcomer());
        first.establish().unwrap();
        first.establish().unwrap();
        let refused = second.establish().unwrap_err();
        assert_eq!(refused.to_string(), "connections_max: 1 are open already");
        drop(first);
        second.establish().unwrap();
    }

    #[tokio::test]
    async fn the_oldest_newcomer_makes_room_and_those_with_a_place_stay() {
        let (places, mut newcomers) = (Places::new(9), Newcomers::new(2));
        let (mut standings, mut tasks) = (Vec::new(), Vec::new());
        for number in 0..5 {
            let (standing, task) = (places.newcomer(), tokio::spawn(std::future::pending::<()>()));
            newcomers.add(Arc::downgrade(&standing), task.abort_handle());
            if number == 0 {
                standing.establish().unwrap();
            }
            standings.push(standing);
            tasks.push(task);
        }
        for cut in &mut tasks[1..3] {
            assert!(cut.await.unwrap_err().is_cancelled());
        }
        for kept in [0, 3, 4] {
            assert!(!tasks[kept].is_finished());
        }
    }
}
