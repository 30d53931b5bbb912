//! Places for those who save sessions on request: few at once, of each owner one, so that whoever asks for
//! many waits for them and others do not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;
use crate::ids::Principal;
use crate::service::waiting::RETRY;

/// Sessions that are saved at once: each may have its bytes twice in memory until it is written.
const SAVES_MAX: usize = 2;

/// Name of the limit of those of one owner.
const LIMIT: &str = "session_saves_max";

/// Who saves, and who waits for that.
#[derive(Debug)]
pub(super) struct Places {
    of_all: Arc<Semaphore>,
    owners: Mutex<HashMap<Principal, Own>>,
    per_owner_max: u32,
}

/// An owner's.
#[derive(Debug)]
struct Own {
    place: Arc<Semaphore>,
    /// Number of those who wait or save.
    count: u32,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _own: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
    _entry: Entry,
}

/// One who waits or saves.
#[derive(Debug)]
struct Entry {
    places: Arc<Places>,
    owner: Principal,
}

impl Places {
    /// Returns places of which one owner may want `per_owner_max` at once.
    pub(super) fn new(per_owner_max: u32) -> Self {
        Self { of_all: Arc::new(Semaphore::new(SAVES_MAX)), owners: Mutex::default(), per_owner_max }
    }

    /// Waits for a place.
    ///
    /// # Errors
    /// `QueueFull`, if as many of the owner's wait as may.
    pub(super) async fn enter(self: &Arc<Self>, owner: &Principal) -> Result<Place, Error> {
        let (entry, own) = self.join(owner)?;
        let closed = |_| Error::Internal("places to save are closed".into());
        let own = own.acquire_owned().await.map_err(closed)?;
        let of_all = Arc::clone(&self.of_all).acquire_owned().await.map_err(closed)?;
        Ok(Place { _own: own, _of_all: of_all, _entry: entry })
    }

    fn join(self: &Arc<Self>, owner: &Principal) -> Result<(Entry, Arc<Semaphore>), Error> {
        let mut owners = self.owners();
        let new = || Own { place: Arc::new(Semaphore::new(1)), count: 0 };
        let count = owners.get(owner).map_or(0, |own| own.count);
        if count >= self.per_owner_max {
            return Err(Error::QueueFull { limit: LIMIT, value: self.per_owner_max, retry_after: RETRY });
        }
        let own = owners.entry(owner.clone()).or_insert_with(new);
        own.count += 1;
        let entry = Entry { places: Arc::clone(self), owner: owner.clone() };
        Ok((entry, Arc::clone(&own.place)))
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<Principal, Own>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut owners = self.places.owners();
        if let Some(own) = owners.get_mut(&self.owner) {
            own.count -= 1;
            if own.count == 0 {
                owners.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits as long as others have something to do.
    async fn settled() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_saves_many_sessions_waits_for_them_and_nobody_else_does() {
        let places = Arc::new(Places::new(8));
        let enter = |owner: &str| {
            let (places, owner) = (Arc::clone(&places), Principal::from(owner));
            tokio::spawn(async move { places.enter(&owner).await })
        };
        let first: Vec<_> = (0..8).map(|_| enter("a")).collect();
        settled().await;
        assert_eq!(first.iter().filter(|waiting| waiting.is_finished()).count(), 1);
        let full = Error::QueueFull { limit: LIMIT, value: 8, retry_after: RETRY };
        assert_eq!(enter("a").await.unwrap().unwrap_err(), full);
        // The second place is for somebody else, and the next one too.
        let b = enter("b").await.unwrap().unwrap();
        let c = enter("c");
        settled().await;
        assert!(!c.is_finished());
        drop(b);
        let c = c.await.unwrap().unwrap();
        // Who leaves while it waits is forgotten, and those of an owner come in their order.
        let mut first = first.into_iter();
        let mut place = first.next().unwrap().await.unwrap().unwrap();
        let left = first.next().unwrap();
        left.abort();
        assert!(left.await.unwrap_err().is_cancelled());
        for waiting in first {
            drop(place);
            place = waiting.await.unwrap().unwrap();
        }
        drop((place, c));
        assert!(places.owners().is_empty());
        assert_eq!(places.of_all.available_permits(), SAVES_MAX);
    }
}
