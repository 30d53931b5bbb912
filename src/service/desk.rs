//! The desk: where prompts are rendered and tokenized, before the engine knows of them. It has few places,
//! and every piece of work takes one anew, so that nobody waits for more than the pieces that are being
//! done. A free place goes to the connection that was served least; a client may invent names, but not
//! connections. A caller that is gone gives up its place with the piece that is being done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

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
    /// Bytes that the connection served last had been served before.
    now: u64,
    /// By connection: bytes that it was served, where above `now`. A newcomer starts at `now`.
    served: HashMap<ConnectionId, u64>,
    /// In the order of arrival.
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    connection: ConnectionId,
    bytes: usize,
    go: oneshot::Sender<()>,
}

/// A place at the desk, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    desk: Arc<Desk>,
    is_long: bool,
}

/// One who waits for a place; gives it back if it comes too late.
struct Waiter {
    desk: Arc<Desk>,
    is_long: bool,
    called: oneshot::Receiver<()>,
}

impl Desk {
    /// Returns a desk with `places`; None chooses by the number of processors.
    pub(super) fn new(places: Option<u64>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let free = places.map_or((processors / 2).max(2), |places| usize::try_from(places).unwrap_or(1));
        let (served, waiting) = (HashMap::new(), Vec::new());
        Self(Mutex::new(State { free, free_for_long: (free - 1).max(1), now: 0, served, waiting }))
    }

    /// Waits for a place for a piece of `bytes`.
    pub(super) async fn place(self: &Arc<Self>, connection: ConnectionId, bytes: usize) -> Place {
        let (go, called) = oneshot::channel();
        let is_long = bytes > LONG_BYTES;
        {
            let mut state = self.state();
            state.waiting.push(Waiting { connection, bytes: bytes.max(PIECE_BYTES_MIN), go });
            state.call();
        }
        let mut waiter = Waiter { desk: Arc::clone(self), is_long, called };
        // The desk keeps who waits until it calls them.
        let _ = (&mut waiter.called).await;
        Place { desk: Arc::clone(self), is_long }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, is_long: bool) {
        let mut state = self.state();
        state.free += 1;
        state.free_for_long += usize::from(is_long);
        state.call();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.desk.give_back(self.is_long);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        // A call that was heard is a place by now.
        if self.called.try_recv().is_ok() {
            self.desk.give_back(self.is_long);
        }
    }
}

impl State {
    /// Calls those whose turn it is.
    fn call(&mut self) {
        self.waiting.retain(|waiting| !waiting.go.is_closed());
        while let Some(next) = self.next() {
            let Waiting { connection, bytes, go } = self.waiting.remove(next);
            if go.send(()).is_err() {
                continue;
            }
            self.free -= 1;
            self.free_for_long -= usize::from(bytes > LONG_BYTES);
            self.now = self.served_of(connection);
            self.served.insert(connection, self.now + bytes as u64);
            let now = self.now;
            self.served.retain(|_, served| *served > now);
        }
    }

    /// Returns whose turn it is: of those that fit, the first of the connection served least.
    fn next(&self) -> Option<usize> {
        let fits =
            |waiting: &Waiting| self.free > 0 && (waiting.bytes <= LONG_BYTES || self.free_for_long > 0);
        let fitting = self.waiting.iter().enumerate().filter(|(_, waiting)| fits(waiting));
        fitting.min_by_key(|(at, waiting)| (self.served_of(waiting.connection), *at)).map(|(at, _)| at)
    }

    fn served_of(&self, connection: ConnectionId) -> u64 {
        self.served.get(&connection).copied().unwrap_or(self.now)
    }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
