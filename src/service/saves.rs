//! The sessions on disk, as the use cases see them: a change is acknowledged when it is saved, and a session
//! that nobody has used since the start is read first.

use std::io;
use std::sync::{Arc, OnceLock};

use super::blocking;
use super::reads::Reads;
use super::sessions::TurnHold;
use crate::error::Error;
use crate::ids::{SessionId, SessionKey};
use crate::session::SessionBook;
use crate::store::{Durability, LoadError, OpenStore, Store, Stored};

/// The store of the sessions, once there is one.
#[derive(Clone, Default)]
pub(super) struct Saves {
    store: Arc<OnceLock<Store>>,
    reads: Arc<Reads>,
}

/// What of the sessions is on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveStats {
    /// Whether they are stored at all.
    pub enabled: bool,
    /// Whether all of them are on disk as they are.
    pub durable: bool,
    /// Sessions whose last change could not be written; told to the owner of the daemon alone.
    pub unwritten_sessions: u32,
}

impl Saves {
    /// Takes in the sessions that were found, and writes what changes from now on; on a full disk `make_way`
    /// is asked to free bytes, and whether it does.
    pub(super) fn begin(
        &self,
        sessions: &Arc<SessionBook<TurnHold>>,
        (open, stored): (OpenStore, Vec<Stored>),
        durability: Durability,
        make_way: impl Fn(u64) -> bool + Send + 'static,
    ) -> io::Result<()> {
        sessions.number_from(open.first_number());
        sessions.restore(stored);
        let book = Arc::clone(sessions);
        let now = move |key: &SessionKey| book.snapshot(key);
        let store = open.start(durability, Arc::clone(sessions.changes()), now, make_way)?;
        // Only the first is taken; a second would be closed at once.
        drop(self.store.set(store));
        Ok(())
    }

    /// Returns when all changes of a session so far may be acknowledged.
    pub(super) async fn saved(&self, key: &SessionKey) {
        if let Some(store) = self.store.get() {
            store.saved(key).await;
        }
    }

    /// Reads a session's content into memory if it is not there.
    pub(super) async fn warm(
        &self,
        sessions: &Arc<SessionBook<TurnHold>>,
        key: &SessionKey,
    ) -> Result<(), Error> {
        let Some(id) = sessions.cold(key) else { return Ok(()) };
        let bytes = self.store.get().map_or(0, |store| store.file_bytes(key));
        let (saves, sessions, key) = (self.clone(), Arc::clone(sessions), key.clone());
        self.reads.once(id, bytes, move || saves.read(&sessions, &key, id)).await
    }

    /// Reads a session's content. It blocks.
    fn read(&self, sessions: &SessionBook<TurnHold>, key: &SessionKey, id: SessionId) -> Result<(), Error> {
        let loaded = match self.store.get() {
            Some(store) => store.load(key, id),
            None => Err(LoadError::Damaged("sessions are not stored".into())),
        };
        match loaded {
            Ok(contents) => sessions.fill(key, id, Ok(contents)),
            Err(LoadError::Damaged(why)) => {
                tracing::warn!(session = %key, why, "a stored session is damaged");
                sessions.fill(key, id, Err(why));
            }
            Err(LoadError::Io(error)) => {
                tracing::warn!(session = %key, %error, "a stored session cannot be read now");
                let (session, why) = (key.name.clone(), error.to_string());
                return Err(Error::SessionUnreadable { session, why });
            }
        }
        Ok(())
    }

    /// Returns what is on disk.
    pub(super) fn stats(&self, is_owner: bool) -> SaveStats {
        let behind = self.store.get().map(|store| store.written().behind);
        SaveStats {
            enabled: behind.is_some(),
            durable: behind == Some(0),
            unwritten_sessions: behind.filter(|_| is_owner).unwrap_or(0),
        }
    }

    /// Writes what is left; nothing is written after it.
    pub(super) async fn finish(&self) {
        if let Some(store) = self.store.get() {
            store.finish().await;
        }
    }

    /// Writes what is left and gives the folder back.
    pub(super) async fn end(&self) -> Result<(), Error> {
        let saves = self.clone();
        blocking(move || {
            saves.store.get().into_iter().for_each(Store::close);
            Ok(())
        })
        .await
    }
}
