//! Reads of sessions that nobody has used since the start. Of one session there is one read at a time,
//! whoever waits for it and whoever leaves; of all of them, no more bytes at once than the room takes. Nobody
//! is refused: a read that finds no room waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::Instrument as _;

use super::blocking;
use super::room::Room;
use crate::error::Error;
use crate::ids::SessionId;

/// Bytes that are read at once: two of the largest sessions by default, and no more files than MiB are open.
const BYTES_MAX: u64 = 128 << 20;

/// What a read came to; none while it runs.
type Outcome = watch::Receiver<Option<Result<(), Error>>>;

/// The reads that run.
pub(super) struct Reads {
    running: Mutex<BTreeMap<SessionId, Outcome>>,
    room: Room,
}

impl Default for Reads {
    fn default() -> Self {
        Self { running: Mutex::default(), room: Room::new(BYTES_MAX) }
    }
}

impl Reads {
    /// Returns what the read of a session comes to; `read` is run if there is none yet. It goes on when the
    /// caller leaves: others may wait for it.
    pub(super) async fn once(
        self: &Arc<Self>,
        id: SessionId,
        bytes: u64,
        read: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let mut outcome = self.join(id, bytes, read);
        let outcome = outcome.wait_for(Option::is_some).await;
        let ended = || Err(Error::Internal("the read of a session ended without an outcome".into()));
        outcome.map_or_else(|_| ended(), |outcome| outcome.clone().unwrap_or_else(ended))
    }

    fn join(
        self: &Arc<Self>,
        id: SessionId,
        bytes: u64,
        read: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> Outcome {
        let mut running = self.running();
        if let Some(outcome) = running.get(&id) {
            return outcome.clone();
        }
        let (tell, outcome) = watch::channel(None);
        running.insert(id, outcome.clone());
        drop(running);
        let reads = Arc::clone(self);
        let work = async move {
            let room = reads.room.take(bytes).await;
            let outcome = blocking(read).await;
            drop(room);
            reads.running().remove(&id);
            tell.send_replace(Some(outcome));
        };
        drop(tokio::spawn(work.in_current_span()));
        outcome
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<SessionId, Outcome>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn many_who_wait_for_a_session_have_it_read_once_also_when_the_first_of_them_leaves() {
        let reads = Arc::new(Reads::default());
        let count = Arc::new(AtomicUsize::new(0));
        let (go, gate) = mpsc::sync_channel::<()>(1);
        let gate = Arc::new(Mutex::new(gate));
        let wait = || {
            let (reads, count, gate) = (Arc::clone(&reads), Arc::clone(&count), Arc::clone(&gate));
            tokio::spawn(async move {
                let read = move || {
                    count.fetch_add(1, Ordering::SeqCst);
                    assert!(gate.lock().unwrap().recv().is_err());
                    Err(Error::Draining)
                };
                reads.once(SessionId(1), 5, read).await
            })
        };
        let first = wait();
        while count.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let others: Vec<_> = (0..20).map(|_| wait()).collect();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        drop(go);
        for other in others {
            assert_eq!(other.await.unwrap(), Err(Error::Draining));
        }
        assert_eq!(count.load(Ordering::SeqCst), 1);
        // What failed is read again by the next who wants it.
        assert_eq!(reads.once(SessionId(1), 5, || Ok(())).await, Ok(()));
        assert!(reads.running().is_empty());
    }

    #[tokio::test]
    async fn reads_at_once_are_of_limited_bytes_and_all_come() {
        let reads = Arc::new(Reads::default());
        let (open, open_max) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let half = BYTES_MAX / 2;
        let waiting: Vec<_> = (0..12)
            .map(|at| {
                let (reads, open) = (Arc::clone(&reads), Arc::clone(&open));
                let open_max = Arc::clone(&open_max);
                let bytes = if at % 4 == 0 { u64::MAX } else { half };
                tokio::spawn(async move {
                    let read = move || {
                        let now = open.fetch_add(1, Ordering::SeqCst) + 1;
                        open_max.fetch_max(now, Ordering::SeqCst);
                        std::thread::yield_now();
                        open.fetch_sub(1, Ordering::SeqCst);
                        Ok(())
                    };
                    reads.once(SessionId(at), bytes, read).await
                })
            })
            .collect();
        for read in waiting {
            assert_eq!(read.await.unwrap(), Ok(()));
        }
        assert!(open_max.load(Ordering::SeqCst) <= 2, "{open_max:?}");
    }
}
