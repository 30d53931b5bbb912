//! Requests that wait: first come first served within a client, clients in turn.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::ClientId;

/// A queue of `T` by client.
#[derive(Debug)]
pub struct Queue<T> {
    waiting: BTreeMap<ClientId, VecDeque<T>>,
    served: Option<ClientId>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), served: None }
    }
}

impl<T> Queue<T> {
    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds one at its client's end.
    pub fn push(&mut self, client: ClientId, item: T) {
        self.waiting.entry(client).or_default().push_back(item);
    }

    /// The one whose turn it is.
    #[must_use]
    pub fn peek(&self) -> Option<&T> {
        self.waiting.get(self.next_client()?)?.front()
    }

    /// Takes the one whose turn it is; the next client is then in turn.
    pub fn pop(&mut self) -> Option<T> {
        let client = self.next_client()?.clone();
        let queue = self.waiting.get_mut(&client)?;
        let item = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&client);
        }
        self.served = Some(client);
        item
    }

    /// Takes out all that meet a condition.
    pub fn take_if(&mut self, mut condition: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for queue in self.waiting.values_mut() {
            let (gone, kept): (VecDeque<T>, VecDeque<T>) = queue.drain(..).partition(|item| condition(item));
            taken.extend(gone);
            *queue = kept;
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
        taken
    }

    fn next_client(&self) -> Option<&ClientId> {
        let after =
            self.served.as_ref().and_then(|served| self.waiting.keys().find(|client| *client > served));
        after.or_else(|| self.waiting.keys().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns_and_each_is_served_in_order() {
        let mut queue = Queue::default();
        for (client, item) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5)] {
            queue.push(ClientId::from(client), item);
        }
        let order: Vec<i32> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [1, 4, 5, 2, 3]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_is_taken_out_does_not_come_up() {
        let mut queue = Queue::default();
        for item in 0..4 {
            queue.push(ClientId::from("a"), item);
        }
        assert_eq!(queue.take_if(|item| item % 2 == 0), [0, 2]);
        assert_eq!((queue.len(), queue.peek()), (2, Some(&1)));
    }
}
