//! Waiting requests, by owner and priority: first come, first served within both.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{Owner, Priority, Shares};
use crate::clock::Moment;

/// A queue of `T`.
#[derive(Debug)]
pub struct Queue<T> {
    lanes: BTreeMap<(Owner, Priority), VecDeque<Waiting<T>>>,
    number_next: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    number: u64,
    since: Moment,
    item: T,
}

/// A request that waits in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Whose it is.
    pub owner: Owner,
    /// Its priority class now; 0 is the highest.
    pub class: u32,
    /// Time since when it waits.
    pub since: Moment,
    priority: Priority,
    number: u64,
}

impl Ticket {
    fn new<T>(lane: &(Owner, Priority), waiting: &Waiting<T>, class: u32) -> Self {
        let &Waiting { number, since, .. } = waiting;
        Self { owner: lane.0.clone(), class, since, priority: lane.1, number }
    }

    /// Returns whether an owner's requests of a priority wait in the same lane.
    #[must_use]
    pub fn has_lane(&self, owner: &Owner, priority: Priority) -> bool {
        self.owner == *owner && self.priority == priority
    }

    /// Returns the class that its caller asked for.
    #[must_use]
    pub fn own_class(&self) -> u32 {
        self.priority.own_class()
    }

    /// Returns whether both are of the same request.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new(), number_next: 0 }
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
    pub fn push(&mut self, owner: Owner, priority: Priority, since: Moment, item: T) {
        let number = self.number();
        self.lanes.entry((owner, priority)).or_default().push_back(Waiting { number, since, item });
    }

    /// Puts a preempted one back: it is the next of its lane.
    pub fn push_front(&mut self, owner: Owner, priority: Priority, since: Moment, item: T) {
        let number = self.number();
        self.lanes.entry((owner, priority)).or_default().push_front(Waiting { number, since, item });
    }

    fn number(&mut self) -> u64 {
        self.number_next += 1;
        self.number_next
    }

    /// Returns the next: the highest class, then the owner with the least, then the longest wait.
    #[must_use]
    pub fn head(&self, shares: &Shares, now: Moment, ageing: Duration) -> Option<Ticket> {
        let fronts = self.lanes.iter().filter_map(|(lane, waiting)| Some((lane, waiting.front()?)));
        let rank = |(lane, front): &(&(Owner, Priority), &Waiting<T>)| {
            (lane.1.class(front.since, now, ageing), shares.rank(&lane.0), front.since)
        };
        let (lane, front) = fronts.min_by_key(rank)?;
        Some(Ticket::new(lane, front, lane.1.class(front.since, now, ageing)))
    }

    /// Returns all in the order of [`Queue::head`]. Nobody comes before those who wait in front of it in its
    /// lane.
    #[must_use]
    pub fn order(&self, shares: &Shares, now: Moment, ageing: Duration) -> Vec<Ticket> {
        let mut order = Vec::with_capacity(self.len());
        for (lane, waiting) in &self.lanes {
            let rank = shares.rank(&lane.0);
            let mut last = (0, Moment::default());
            for waiting in waiting {
                let class = lane.1.class(waiting.since, now, ageing);
                last = last.max((class, waiting.since));
                order.push(((last.0, rank, last.1), Ticket::new(lane, waiting, class)));
            }
        }
        order.sort_by_key(|(rank, _)| *rank);
        order.into_iter().map(|(_, ticket)| ticket).collect()
    }

    /// Returns a ticket with its class of now; None if its request no longer waits.
    #[must_use]
    pub fn renewed(&self, ticket: &Ticket, now: Moment, ageing: Duration) -> Option<Ticket> {
        let lane = (ticket.owner.clone(), ticket.priority);
        let waiting = self.lanes.get(&lane)?.iter().find(|waiting| waiting.number == ticket.number)?;
        Some(Ticket::new(&lane, waiting, lane.1.class(waiting.since, now, ageing)))
    }

    /// Returns a waiting item.
    #[must_use]
    pub fn peek(&self, ticket: &Ticket) -> Option<&T> {
        let lane = self.lanes.get(&(ticket.owner.clone(), ticket.priority))?;
        lane.iter().find(|waiting| waiting.number == ticket.number).map(|waiting| &waiting.item)
    }

    /// Removes and returns a waiting item.
    pub fn pop(&mut self, ticket: &Ticket) -> Option<T> {
        let lane = (ticket.owner.clone(), ticket.priority);
        let waiting = self.lanes.get_mut(&lane)?;
        let place = waiting.iter().position(|waiting| waiting.number == ticket.number)?;
        let item = waiting.remove(place).map(|waiting| waiting.item);
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
    use crate::sched::owner::owner;

    const AGEING: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Moment {
        Moment::at(Duration::from_secs(seconds))
    }

    /// Takes everything at once; each client's share grows as it is served.
    fn drain(queue: &mut Queue<i32>, now: Moment) -> Vec<i32> {
        let mut shares = Shares::default();
        for client in ["a", "b", "c"] {
            shares.arrive(&owner(client));
        }
        std::iter::from_fn(|| {
            let head = queue.head(&shares, now, AGEING)?;
            shares.start(&head.owner);
            queue.pop(&head)
        })
        .collect()
    }

    #[test]
    fn the_client_with_the_least_goes_first_and_each_is_served_in_order() {
        let mut queue = Queue::default();
        for (place, (client, item)) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5)].iter().enumerate() {
            queue.push(owner(client), Priority::Normal, at(place as u64), *item);
        }
        assert_eq!(drain(&mut queue, at(5)), [1, 4, 5, 2, 3]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_higher_class_goes_first_and_waiting_lifts_a_class() {
        let fill = || {
            let mut queue = Queue::default();
            queue.push(owner("a"), Priority::Background, at(0), 1);
            queue.push(owner("b"), Priority::Normal, at(1), 2);
            queue.push(owner("c"), Priority::Interactive, at(15), 3);
            queue
        };
        assert_eq!(drain(&mut fill(), at(15)), [2, 3, 1]);
        assert_eq!(drain(&mut fill(), at(20)), [1, 2, 3]);
    }

    #[test]
    fn the_order_is_that_of_the_heads_and_keeps_to_the_lanes() {
        let mut queue = Queue::default();
        queue.push(owner("a"), Priority::Normal, at(0), 1);
        queue.push(owner("a"), Priority::Normal, at(1), 2);
        queue.push(owner("b"), Priority::Interactive, at(2), 3);
        queue.push(owner("c"), Priority::Normal, at(3), 4);
        // Preempted just now: it is still before those of its lane.
        queue.push_front(owner("c"), Priority::Normal, at(5), 5);
        let order = queue.order(&Shares::default(), at(5), AGEING);
        let items: Vec<i32> = order.iter().map(|ticket| *queue.peek(ticket).unwrap()).collect();
        assert_eq!(items, [3, 1, 2, 5, 4]);
        assert!(order[0].is(&queue.head(&Shares::default(), at(5), AGEING).unwrap()));
        assert_eq!(queue.pop(&order[2]), Some(2), "from behind another");
        assert_eq!((queue.pop(&order[2]), queue.len()), (None, 4));
        assert_eq!(queue.renewed(&order[2], at(5), AGEING), None);
        assert_eq!(queue.renewed(&order[1], at(15), AGEING).map(|ticket| ticket.class), Some(0));
    }

    #[test]
    fn what_is_taken_out_does_not_come_up_and_the_rest_keeps_its_order() {
        let mut queue = Queue::default();
        for item in 0..5 {
            queue.push(owner("a"), Priority::Normal, at(0), item);
        }
        queue.push_front(owner("a"), Priority::Normal, at(0), 6);
        assert_eq!(queue.take_if(|item| item % 2 == 1), [1, 3]);
        assert_eq!(drain(&mut queue, at(0)), [6, 0, 2, 4]);
    }
}
