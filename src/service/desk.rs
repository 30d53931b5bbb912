//! The desk: where prompts are rendered and tokenized, before the engine knows of them. It has few places,
//! and every piece of work takes one anew, so that nobody waits for more than the pieces that are being
//! done. A free place goes to the connection that was served least. A caller that is gone gives up its place
//! with the piece that is being done.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::line::{Front, Line};
use crate::ids::ConnectionId;

/// A piece above this is long: one place is kept for others.
const LONG_BYTES: usize = 256 << 10;

/// What a piece costs beyond its bytes.
const PIECE_BYTES_MIN: usize = 1 << 10;

/// The places, and who waits for one.
#[derive(Debug)]
pub(super) struct Desk(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    /// Places that long pieces may still take.
    free_for_long: usize,
    /// In lanes: whether the piece is long.
    line: Line<bool, Place>,
}

/// A place at the desk, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    desk: Arc<Desk>,
    is_long: bool,
}

impl Desk {
    /// Returns a desk with `places`; None chooses by the number of processors.
    pub(super) fn new(places: Option<u64>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let free = places.map_or((processors / 2).max(2), |places| usize::try_from(places).unwrap_or(1));
        Self(Mutex::new(State { free, free_for_long: (free - 1).max(1), line: Line::new() }))
    }

    /// Waits for a place for a piece of `bytes`.
    pub(super) async fn place(self: &Arc<Self>, connection: ConnectionId, bytes: usize) -> Place {
        let (lane, bytes) = (bytes > LONG_BYTES, bytes.max(PIECE_BYTES_MIN));
        loop {
            let called = self.state().line.join(Front { connection, lane, bytes });
            self.call();
            // The line forgets only who has left.
            if let Ok(place) = called.await {
                return place;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls those whose turn it is. Who has left by then gives the place back.
    fn call(self: &Arc<Self>) {
        while let Some((go, is_long)) = self.take() {
            drop(go.send(Place { desk: Arc::clone(self), is_long }));
        }
    }

    /// Takes a place for whoever is next.
    fn take(&self) -> Option<(oneshot::Sender<Place>, bool)> {
        let State { free, free_for_long, line } = &mut *self.state();
        if *free == 0 {
            return None;
        }
        let next = line.next(|front| !front.lane || *free_for_long > 0)?;
        let go = line.call(next)?;
        *free -= 1;
        *free_for_long -= usize::from(next.lane);
        Some((go, next.lane))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut state = self.desk.state();
            state.free += 1;
            state.free_for_long += usize::from(self.is_long);
        }
        self.desk.call();
    }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
