//! Room for files that are read into memory at once, counted in pieces of a MiB; who finds none waits, in the
//! order of arrival.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a piece; a smaller file is as good as this much work.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes that may be read at once.
#[derive(Debug)]
pub(super) struct Room {
    free: Arc<Semaphore>,
    pieces_max: u32,
}

/// A part of it, until it is dropped.
#[derive(Debug)]
pub(super) struct RoomTaken {
    /// None if nobody counts any more.
    _pieces: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// Returns room for `bytes_max`.
    pub(super) fn new(bytes_max: u64) -> Self {
        let pieces_max = u32::try_from(bytes_max / PIECE_BYTES).unwrap_or(u32::MAX).max(1);
        Self { free: Arc::new(Semaphore::new(pieces_max as usize)), pieces_max }
    }

    /// Waits until there is room for a file; one that is larger than all of it is read alone.
    pub(super) async fn take(&self, bytes: u64) -> RoomTaken {
        let pieces = u32::try_from(bytes.div_ceil(PIECE_BYTES)).unwrap_or(u32::MAX);
        let taken = Arc::clone(&self.free).acquire_many_owned(pieces.clamp(1, self.pieces_max)).await;
        // It is never closed.
        RoomTaken { _pieces: taken.ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_at_once_have_no_more_bytes_than_there_is_room_for_but_for_one_that_is_larger() {
        let room = Arc::new(Room::new(10 * PIECE_BYTES));
        let small: Vec<_> = [1, 9 * PIECE_BYTES].into_iter().map(|bytes| room.take(bytes)).collect();
        let mut taken = Vec::new();
        for one in small {
            taken.push(one.await);
        }
        assert_eq!(room.free.available_permits(), 0);
        let waiting = Arc::clone(&room);
        let whole = tokio::spawn(async move { waiting.take(u64::MAX).await });
        tokio::task::yield_now().await;
        assert!(!whole.is_finished());
        drop(taken);
        let whole = whole.await.unwrap();
        assert_eq!(room.free.available_permits(), 0);
        drop(whole);
        assert_eq!(room.free.available_permits(), 10);
    }
}
