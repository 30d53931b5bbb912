//! The bytes of requests from their arrival until they are prepared. A message claims its bytes before it is
//! read. The first bytes of a connection are its own: whatever others send, they never wait. The others come
//! from two pools, one of them kept from large messages. In each a connection has a limit, and free bytes go
//! to the connection that was served least; the rest waits at the sender. What waits for a download is set
//! aside, and keeps nobody out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::line::{Front, Line};
use super::waiting::RETRY;
use crate::error::Error;
use crate::ids::ConnectionId;
use crate::limits::Limits;

/// A message up to this costs less than the call that brings it, and claims nothing.
const TINY_BYTES: usize = 1 << 10;

/// A message up to this does not wait behind a longer one of its connection.
const SHORT_BYTES: usize = 64 << 10;

/// A message above this is large.
const LARGE_BYTES: usize = 1 << 20;

/// A connection's own bytes: two short messages, or a long chat, which does not wait behind a longer message
/// either.
const OWN_BYTES: usize = 128 << 10;

/// Part of each limit that is kept from large messages.
const KEPT_DIVISOR: usize = 4;

/// The bytes of all connections.
#[derive(Clone, Debug)]
pub(super) struct IntakeOfAll(Arc<Mutex<State>>);

/// The bytes of one connection.
#[derive(Clone, Debug)]
pub struct Intake {
    of_all: IntakeOfAll,
    connection: ConnectionId,
}

/// The claim of one call, from the length of its message until it is prepared; shared by those who make and
/// release it.
#[derive(Clone, Debug, Default)]
pub struct Claim(Arc<Mutex<Option<Grant>>>);

#[derive(Debug)]
struct State {
    own: Pool,
    kept: Pool,
    large: Pool,
    /// The bytes of calls that wait for a download: as many as of those that arrive.
    aside: Pool,
    line: Line<Size, Grant>,
}

/// Bytes that connections share.
#[derive(Debug)]
struct Pool {
    all: usize,
    free: usize,
    of_connection_max: usize,
    used: HashMap<ConnectionId, usize>,
}

/// Which pool bytes are of.
#[derive(Clone, Copy, Debug)]
enum Source {
    Own,
    Kept,
    Large,
    Aside,
}

/// The lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Size {
    Short,
    Chat,
    Middle,
    Large,
}

/// Bytes that a call has until it is dropped.
#[derive(Debug)]
struct Grant {
    of_all: IntakeOfAll,
    connection: ConnectionId,
    source: Source,
    bytes: usize,
    /// Those of its message: a message above a limit takes all of it, which is less.
    message_bytes: usize,
}

/// One whose turn it is.
struct Turn {
    go: oneshot::Sender<Grant>,
    connection: ConnectionId,
    source: Source,
    bytes: usize,
    message_bytes: usize,
}

impl IntakeOfAll {
    pub(super) fn new(limits: &Limits) -> Self {
        let Limits { receive_bytes_max: all, receive_bytes_per_connection_max: of_connection, .. } = *limits;
        let (kept, of_connection_kept) = (all / KEPT_DIVISOR, of_connection / KEPT_DIVISOR);
        Self(Arc::new(Mutex::new(State {
            own: Pool::new(usize::MAX, OWN_BYTES),
            kept: Pool::new(kept, of_connection_kept),
            large: Pool::new(all - kept, of_connection - of_connection_kept),
            aside: Pool::new(all, of_connection),
            line: Line::new(),
        })))
    }

    pub(super) fn connection(&self, connection: ConnectionId) -> Intake {
        Intake { of_all: self.clone(), connection }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives bytes to those whose turn it is. Who has left by then gives them back.
    fn call(&self) {
        while let Some(turn) = self.take() {
            let Turn { go, connection, source, bytes, message_bytes } = turn;
            drop(go.send(Grant { of_all: self.clone(), connection, source, bytes, message_bytes }));
        }
    }

    fn take(&self) -> Option<Turn> {
        self.state().take()
    }
}

impl Intake {
    /// Claims the bytes of a message that is about to be read; waits until they are free. A message above a
    /// limit takes all of it.
    pub async fn claim(self, bytes: usize, claim: Claim) {
        let Self { of_all, connection } = self;
        if bytes <= TINY_BYTES {
            return;
        }
        let lane = if bytes <= SHORT_BYTES {
            Size::Short
        } else if bytes <= OWN_BYTES {
            Size::Chat
        } else if bytes <= LARGE_BYTES {
            Size::Middle
        } else {
            Size::Large
        };
        loop {
            let called = of_all.state().line.join(Front { connection, lane, bytes });
            of_all.call();
            // The line forgets only who has left.
            if let Ok(grant) = called.await {
                *claim.grant() = Some(grant);
                return;
            }
        }
    }
}

impl Claim {
    /// Gives the bytes back.
    pub fn release(&self) {
        let grant = self.grant().take();
        drop(grant);
    }

    /// Sets the bytes aside for a wait that may take hours: others' messages have them meanwhile.
    ///
    /// # Errors
    /// `WaitingBytes`, if too many are set aside already.
    pub(super) fn set_aside(&self) -> Result<(), Error> {
        let grant = self.grant().take();
        let aside = grant.map(Grant::set_aside).transpose()?;
        *self.grant() = aside;
        Ok(())
    }

    fn grant(&self) -> MutexGuard<'_, Option<Grant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Grant {
    fn set_aside(mut self) -> Result<Self, Error> {
        let of_all = self.of_all.clone();
        let bytes = of_all.state().aside.claim(self.connection, self.message_bytes)?;
        let (from, taken) = (self.source, self.bytes);
        (self.source, self.bytes) = (Source::Aside, bytes);
        of_all.state().pool(from).give_back(self.connection, taken);
        of_all.call();
        Ok(self)
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.of_all.state().pool(self.source).give_back(self.connection, self.bytes);
        self.of_all.call();
    }
}

impl State {
    /// Takes bytes for whoever is next. Where a pool has too few for the one whose turn it is, the others
    /// wait behind it: it would never get them otherwise.
    fn take(&mut self) -> Option<Turn> {
        let (front, source) = self.next()?;
        let go = self.line.call(front)?;
        let bytes = self.pool(source).take(front);
        Some(Turn { go, connection: front.connection, source, bytes, message_bytes: front.bytes })
    }

    fn next(&mut self) -> Option<(Front<Size>, Source)> {
        let Self { own, kept, large, aside: _, line } = self;
        if let Some(front) = line.next(|front| front.bytes <= OWN_BYTES && own.has_left(front)) {
            return Some((front, Source::Own));
        }
        for (pool, source) in [(kept, Source::Kept), (large, Source::Large)] {
            let is_for = |front: Front<Size>| (front.lane == Size::Large) == matches!(source, Source::Large);
            let next = line.next(|front| is_for(front) && pool.has_left(front));
            if let Some(front) = next.filter(|front| pool.taken_by(*front) <= pool.free) {
                return Some((front, source));
            }
        }
        None
    }

    fn pool(&mut self, source: Source) -> &mut Pool {
        match source {
            Source::Own => &mut self.own,
            Source::Kept => &mut self.kept,
            Source::Large => &mut self.large,
            Source::Aside => &mut self.aside,
        }
    }
}

impl Pool {
    fn new(all: usize, of_connection: usize) -> Self {
        Self { all, free: all, of_connection_max: of_connection.min(all), used: HashMap::new() }
    }

    /// Takes the bytes of a message that does not wait for them; returns their number.
    fn claim(&mut self, connection: ConnectionId, message_bytes: usize) -> Result<usize, Error> {
        let full = |limit, value: usize| {
            let value = u64::try_from(value).unwrap_or(u64::MAX);
            Err(Error::WaitingBytes { limit, value, retry_after: RETRY })
        };
        let bytes = message_bytes.min(self.of_connection_max);
        if self.used_by(connection) + bytes > self.of_connection_max {
            return full("receive_bytes_per_connection_max", self.of_connection_max);
        }
        if bytes > self.free {
            return full("receive_bytes_max", self.all);
        }
        self.add(connection, bytes);
        Ok(bytes)
    }

    /// Returns what a message takes.
    fn taken_by(&self, front: Front<Size>) -> usize {
        front.bytes.min(self.of_connection_max)
    }

    /// Returns whether the connection's limit leaves room for one of its messages.
    fn has_left(&self, front: Front<Size>) -> bool {
        self.used_by(front.connection) + self.taken_by(front) <= self.of_connection_max
    }

    fn used_by(&self, connection: ConnectionId) -> usize {
        self.used.get(&connection).copied().unwrap_or(0)
    }

    fn take(&mut self, front: Front<Size>) -> usize {
        let bytes = self.taken_by(front);
        self.add(front.connection, bytes);
        bytes
    }

    fn add(&mut self, connection: ConnectionId, bytes: usize) {
        self.free -= bytes;
        *self.used.entry(connection).or_default() += bytes;
    }

    fn give_back(&mut self, connection: ConnectionId, bytes: usize) {
        self.free += bytes;
        if let Some(used) = self.used.get_mut(&connection) {
            *used -= bytes;
            if *used == 0 {
                self.used.remove(&connection);
            }
        }
    }
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
