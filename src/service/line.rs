//! Those who wait for something scarce, a place at the desk or bytes of the intake. Next is the connection
//! that was served least; a client may invent names, but not connections. Those of a connection wait in
//! lanes, each in the order of arrival, so that some of them do not wait behind what only others need. Who
//! leaves is forgotten.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::sync::oneshot;

use crate::ids::ConnectionId;

/// A line of those who wait for a `T`, in lanes of the kinds `L`.
#[derive(Debug)]
pub(super) struct Line<L, T> {
    /// Bytes that the connection served last had been served before.
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
        let go = self.lanes.get_mut(&(connection, lane))?.pop_front()?.go;
        self.now = self.served_of(connection);
        self.served.insert(connection, self.now + bytes as u64);
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
