//! Those who wait for something scarce, a place at the desk or bytes of the intake. Next is the connection
//! that was served least; a client may invent names, but not connections. Those of a connection wait in
//! lanes, each in the order of arrival, so that some of them do not wait behind what only others need. Who
//! leaves is forgotten.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::sync::oneshot;

use crate::ids::ConnectionId;

/// Connections whose share is remembered; connections come and go.
const REMEMBERED_MAX: usize = 1024;

/// A line of those who wait for a `T`, in lanes of the kinds `L`.
#[derive(Debug)]
pub(super) struct Line<L, T> {
    /// Bytes that whoever waits has been served at least.
    now: u64,
    /// By connection: bytes that it was served, where above `now`. A newcomer starts at `now`.
    served: HashMap<ConnectionId, u64>,
    /// None is empty.
    lanes: BTreeMap<(ConnectionId, L), VecDeque<Waiting<T>>>,
    arrivals: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    /// Its number in the order of arrival.
    arrival: u64,
    bytes: usize,
    go: oneshot::Sender<T>,
}

/// The first of a lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Front<L> {
    /// Whose it is.
    pub(super) connection: ConnectionId,
    /// Its lane.
    pub(super) lane: L,
    /// What it needs.
    pub(super) bytes: usize,
}

impl<L: Copy + Ord, T> Line<L, T> {
    pub(super) fn new() -> Self {
        Self { now: 0, served: HashMap::new(), lanes: BTreeMap::new(), arrivals: 0 }
    }

    /// Adds one at the end of its lane; returns where it gets what it waits for.
    pub(super) fn join(&mut self, front: Front<L>) -> oneshot::Receiver<T> {
        let Front { connection, lane, bytes } = front;
        let (go, called) = oneshot::channel();
        self.arrivals += 1;
        let lane = self.lanes.entry((connection, lane)).or_default();
        lane.retain(|waiting| !waiting.go.is_closed());
        lane.push_back(Waiting { arrival: self.arrivals, bytes, go });
        called
    }

    /// Returns whose turn it is of the firsts of their lanes that meet the condition.
    pub(super) fn next(&mut self, may: impl Fn(Front<L>) -> bool) -> Option<Front<L>> {
        self.lanes.retain(|_, lane| {
            while lane.front().is_some_and(|waiting| waiting.go.is_closed()) {
                lane.pop_front();
            }
            !lane.is_empty()
        });
        let fronts = self.lanes.iter().filter_map(|(&(connection, lane), waiting)| {
            let first = waiting.front()?;
            Some((Front { connection, lane, bytes: first.bytes }, first.arrival))
        });
        let next = fronts.filter(|(front, _)| may(*front));
        next.min_by_key(|(front, arrival)| (self.served_of(front.connection), *arrival))
            .map(|(front, _)| front)
    }

    /// Takes the first of a lane out; its connection is served by it.
    pub(super) fn call(&mut self, front: Front<L>) -> Option<oneshot::Sender<T>> {
        let Front { connection, lane, bytes } = front;
        // Of all that wait, those of whom the condition took none too: their turn is still to come.
        let least = self.lanes.keys().map(|(waiting, _)| self.served_of(*waiting)).min();
        let go = self.lanes.get_mut(&(connection, lane))?.pop_front()?.go;
        self.served.insert(connection, self.served_of(connection) + bytes as u64);
        self.now = least.unwrap_or(self.now);
        if self.served.len() > REMEMBERED_MAX {
            // Those who were served least are newcomers from here on.
            let mut served: Vec<u64> = self.served.values().copied().collect();
            self.now = *served.select_nth_unstable(REMEMBERED_MAX / 2).1;
        }
        let now = self.now;
        self.served.retain(|_, served| *served > now);
        Some(go)
    }

    /// Returns the number of those that wait, some of which may have left.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lanes.values().map(VecDeque::len).sum()
    }

    fn served_of(&self, connection: ConnectionId) -> u64 {
        self.served.get(&connection).copied().unwrap_or(self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of a connection that waits in a lane.
    fn front(connection: u64, lane: u8, bytes: usize) -> Front<u8> {
        Front { connection: ConnectionId(connection), lane, bytes }
    }

    /// Serves whoever is next in a lane; returns whose it was.
    fn serve(line: &mut Line<u8, ()>, lane: u8) -> u64 {
        let next = line.next(|front| front.lane == lane).unwrap();
        line.call(next).unwrap();
        next.connection.0
    }

    #[test]
    fn one_who_is_served_from_another_pool_does_not_make_those_who_wait_equal() {
        let mut line = Line::new();
        let mut waiting = Vec::new();
        let mut join = |line: &mut Line<u8, ()>, front| waiting.push(line.join(front));
        // The third connection has had much of the second lane, the first a little of the first one.
        join(&mut line, front(3, 1, 16_000));
        assert_eq!(serve(&mut line, 1), 3);
        join(&mut line, front(1, 0, 8_000));
        assert_eq!(serve(&mut line, 0), 1);
        join(&mut line, front(1, 0, 1_000));
        join(&mut line, front(2, 0, 1_000));
        join(&mut line, front(3, 1, 1_000));
        assert_eq!(serve(&mut line, 1), 3);
        assert_eq!(serve(&mut line, 0), 2);
        assert_eq!(serve(&mut line, 0), 1);
    }

    #[test]
    fn connections_that_came_once_are_forgotten() {
        let mut line = Line::new();
        for connection in 0..10_000 {
            let _waiting = line.join(front(connection, 0, 2_000));
            assert_eq!(serve(&mut line, 0), connection);
            assert!(line.served.len() <= REMEMBERED_MAX);
        }
    }
}
