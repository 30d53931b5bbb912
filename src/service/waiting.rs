//! Requests that wait for their model to be downloaded or loaded: they are not in the engine's queue yet, so
//! they are limited as it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::engine::EngineSettings;
use crate::error::Error;
use crate::ids::ConnectionId;

/// When to try again after too many waited: a load takes seconds.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// Those who wait, by connection.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<HashMap<ConnectionId, u32>>);

/// One who waits, until it is dropped.
#[derive(Debug)]
pub(super) struct Wait {
    of_all: Arc<Waiting>,
    connection: ConnectionId,
}

impl Waiting {
    /// Adds one of a connection.
    ///
    /// # Errors
    /// `QueueFull`, if as many wait as may in the queue.
    pub(super) fn enter(
        self: &Arc<Self>,
        connection: ConnectionId,
        settings: &EngineSettings,
    ) -> Result<Wait, Error> {
        let mut waiting = self.waiting();
        let full = |limit, value| Err(Error::QueueFull { limit, value, retry_after: RETRY });
        if waiting.values().sum::<u32>() >= settings.queue_length_max {
            return full("queue_length_max", settings.queue_length_max);
        }
        let own = waiting.entry(connection).or_default();
        if *own >= settings.queue_length_per_client_max {
            return full("queue_length_per_client_max", settings.queue_length_per_client_max);
        }
        *own += 1;
        Ok(Wait { of_all: Arc::clone(self), connection })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<ConnectionId, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut waiting = self.of_all.waiting();
        if let Some(own) = waiting.get_mut(&self.connection) {
            *own -= 1;
            if *own == 0 {
                waiting.remove(&self.connection);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_load_is_limited_by_connection_and_in_all() {
        let settings = EngineSettings {
            queue_length_max: 3,
            queue_length_per_client_max: 2,
            ..EngineSettings::default()
        };
        let waiting = Arc::new(Waiting::default());
        let enter = |connection| waiting.enter(ConnectionId(connection), &settings);
        let limit = |refused: Result<Wait, Error>| match refused {
            Err(Error::QueueFull { limit, .. }) => limit,
            other => panic!("{other:?}"),
        };
        let (first, _second) = (enter(1).unwrap(), enter(1).unwrap());
        assert_eq!(limit(enter(1)), "queue_length_per_client_max");
        let other = enter(2).unwrap();
        assert_eq!(limit(enter(3)), "queue_length_max");
        drop(first);
        let _third = enter(1).unwrap();
        drop(other);
        assert!(!waiting.waiting().contains_key(&ConnectionId(2)));
    }
}
