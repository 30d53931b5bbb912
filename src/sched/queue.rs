//! Waiting requests, by client and priority: first come, first served within both.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{Priority, Shares};
use crate::clock::Moment;
use crate::ids::ClientId;

/// A queue of `T`.
#[derive(Debug)]
pub struct Queue<T> {
    lanes: BTreeMap<(ClientId, Priority), VecDeque<Waiting<T>>>,
}

#[derive(Debug)]
struct Waiting<T> {
    since: Moment,
    item: T,
}

/// The next request of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its client.
    pub client: ClientId,
    /// Its priority class now; 0 is the highest.
    pub class: u32,
    priority: Priority,
}

impl Head {
    /// Returns whether a client's requests of a priority wait in the same lane.
    #[must_use]
    pub fn has_lane(&self, client: &ClientId, priority: Priority) -> bool {
        self.client == *client && self.priority == priority
    }
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new() }
    }
}

impl<T> Queue<T> {
    /// Returns the number of waiting items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lanes.values().map(VecDeque::len).sum()
    }

    /// Returns whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Adds one at the end of its lane.
    pub fn push(&mut self, client: ClientId, priority: Priority, since: Moment, item: T) {
        self.lanes.entry((client, priority)).or_default().push_back(Waiting { since, item });
    }

    /// Puts a preempted one back: it is the next of its lane.
    pub fn push_front(&mut self, client: ClientId, priority: Priority, since: Moment, item: T) {
        self.lanes.entry((client, priority)).or_default().push_front(Waiting { since, item });
    }

    /// Returns the next: the highest class, then the client with the least, then the longest wait.
    #[must_use]
    pub fn head(&self, shares: &Shares, now: Moment, ageing: Duration) -> Option<Head> {
        let fronts = self.lanes.iter().filter_map(|(lane, waiting)| Some((lane, waiting.front()?)));
        let rank = |((client, priority), front): &(&(ClientId, Priority), &Waiting<T>)| {
            (priority.class(front.since, now, ageing), shares.rank(client), front.since)
        };
        let ((client, priority), front) = fronts.min_by_key(rank)?;
        let class = priority.class(front.since, now, ageing);
        Some(Head { client: client.clone(), class, priority: *priority })
    }

    /// Returns the item of the next.
    #[must_use]
    pub fn peek(&self, head: &Head) -> Option<&T> {
        self.lanes.get(&(head.client.clone(), head.priority))?.front().map(|waiting| &waiting.item)
    }

    /// Removes and returns the next.
    pub fn pop(&mut self, head: &Head) -> Option<T> {
        let lane = (head.client.clone(), head.priority);
        let waiting = self.lanes.get_mut(&lane)?;
        let item = waiting.pop_front().map(|waiting| waiting.item);
        if waiting.is_empty() {
            self.lanes.remove(&lane);
        }
        item
    }

    /// Returns all waiting items, in the order in which [`Self::take_if`] goes through them.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.lanes.values().flatten().map(|waiting| &waiting.item)
    }

    /// Returns all waiting items, to be changed in place.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.lanes.values_mut().flatten().map(|waiting| &mut waiting.item)
    }

    /// Removes and returns all that meet a condition.
    pub fn take_if(&mut self, mut condition: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for lane in self.lanes.values_mut() {
            for _ in 0..lane.len() {
                let Some(waiting) = lane.pop_front() else { break };
                if condition(&waiting.item) {
                    taken.push(waiting.item);
                } else {
                    lane.push_back(waiting);
                }
            }
        }
        self.lanes.retain(|_, lane| !lane.is_empty());
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGEING: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Moment {
        Moment::at(Duration::from_secs(seconds))
    }

    /// Takes everything at once; each client's share grows as it is served.
    fn drain(queue: &mut Queue<i32>, now: Moment) -> Vec<i32> {
        let mut shares = Shares::default();
        for client in ["a", "b", "c"] {
            shares.arrive(&ClientId::from(client));
        }
        std::iter::from_fn(|| {
            let head = queue.head(&shares, now, AGEING)?;
            shares.start(&head.client);
            queue.pop(&head)
        })
        .collect()
    }

    #[test]
    fn the_client_with_the_least_goes_first_and_each_is_served_in_order() {
        let mut queue = Queue::default();
        for (place, (client, item)) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5)].iter().enumerate() {
            queue.push(ClientId::from(*client), Priority::Normal, at(place as u64), *item);
        }
        assert_eq!(drain(&mut queue, at(5)), [1, 4, 5, 2, 3]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_higher_class_goes_first_and_waiting_lifts_a_class() {
        let fill = || {
            let mut queue = Queue::default();
            queue.push(ClientId::from("a"), Priority::Background, at(0), 1);
            queue.push(ClientId::from("b"), Priority::Normal, at(1), 2);
            queue.push(ClientId::from("c"), Priority::Interactive, at(15), 3);
            queue
        };
        assert_eq!(drain(&mut fill(), at(15)), [2, 3, 1]);
        assert_eq!(drain(&mut fill(), at(20)), [1, 2, 3]);
    }

    #[test]
    fn what_is_taken_out_does_not_come_up_and_the_rest_keeps_its_order() {
        let mut queue = Queue::default();
        for item in 0..5 {
            queue.push(ClientId::from("a"), Priority::Normal, at(0), item);
        }
        queue.push_front(ClientId::from("a"), Priority::Normal, at(0), 6);
        assert_eq!(queue.take_if(|item| item % 2 == 1), [1, 3]);
        assert_eq!(drain(&mut queue, at(0)), [6, 0, 2, 4]);
    }
}
