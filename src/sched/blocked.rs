//! The request that waits for memory, and who may pass it. Requests that fit pass as long as it can start
//! once those have ended that ran before it: either they end no later than these may, or what they hold
//! leaves room for it. So small requests do not wait for memory that they do not need, and a large one is not
//! starved.
//!
//! While models in use have to leave for it, whatever fits passes: it could not start anyway, and what waits
//! keeps its model in use as well. It waits for the calls that came before it, and is refused when later ones
//! keep such a model in use. One that had begun when the budget shrank is owed what it was promised: it goes
//! first, is not refused, and starts when nothing else runs, whatever the budget.
//!
//! There is one such request at a time, whatever the number of models: the highest class, then the longest
//! wait. A higher class passes it without condition; ageing ends that.

use std::collections::BTreeMap;

use super::Ticket;
use crate::ids::ModelName;

/// A request that waits for memory.
#[derive(Clone, Debug)]
pub struct Blocked {
    /// Its model.
    pub model: ModelName,
    /// Its place in the queue.
    pub ticket: Ticket,
    /// What it waits for.
    pub wanted: Wanted,
    /// Sequences with a number from this one on started after it was blocked.
    pub passed_from: u64,
    /// A model with a request that may pass, and bytes that are to be free for that.
    pub passer: Option<(ModelName, u64)>,
    /// Models whose requests wait for models to leave as well, in this tick, and the bytes of their weights.
    pub others: BTreeMap<ModelName, u64>,
}

/// What a blocked request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes that it needs to start, its slot among them.
    pub needed_bytes: u64,
    /// Bytes that are to be free: the same without what is open for it already.
    pub missing_bytes: u64,
    /// Most bytes that there can be room for, once all models have left that may.
    pub kv_bytes_max: u64,
    /// Bytes of its model's weights, if that may have to leave for others.
    pub weight_bytes: u64,
    /// Whether models in use have to leave first.
    pub waits_for_models: bool,
    /// Whether it does so though it has begun, which is to be possible for it to the end.
    pub is_owed: bool,
}

/// What runs, as a blocked request sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Bytes that are held by, and promised to, the sequences that passed it.
    pub passed_bytes: u64,
    /// Most tokens that one of the others may still draw.
    pub tokens_left: u32,
}

/// A request that would pass.
#[derive(Clone, Copy, Debug)]
pub struct Passer {
    /// Its priority class.
    pub class: u32,
    /// Tokens that it may still run, its prompt included.
    pub tokens: u32,
    /// Bytes that would be held by it, or promised to it.
    pub bytes: u64,
}

impl Claims {
    /// Adds those of another model.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            passed_bytes: self.passed_bytes + other.passed_bytes,
            tokens_left: self.tokens_left.max(other.tokens_left),
        }
    }
}

impl Blocked {
    /// Returns whether another request that cannot start should be the blocked one instead.
    #[must_use]
    pub fn yields_to(&self, other: &Ticket, is_owed: bool) -> bool {
        let own = (!self.wanted.is_owed, self.ticket.class, self.ticket.since);
        (!is_owed, other.class, other.since) < own
    }

    /// Returns whether whatever fits may start before it.
    #[must_use]
    pub fn lets_all_pass(&self) -> bool {
        self.wanted.waits_for_models && !self.wanted.is_owed
    }

    /// Returns whether a request of another model may wait for models to leave as well, which keeps its own
    /// in use: one of the two has to be able to start while the models of all that wait stay.
    pub fn lets_wait(&mut self, model: &ModelName, wanted: Wanted) -> bool {
        let others = self.others.iter().filter(|(other, _)| *other != model).map(|(_, bytes)| bytes);
        let others: u64 = others.sum();
        let can_start = |first: Wanted, second: Wanted| {
            first.needed_bytes + second.weight_bytes + others <= first.kv_bytes_max
        };
        let is_owed = self.wanted.is_owed || wanted.is_owed;
        let waits = is_owed || can_start(self.wanted, wanted) || can_start(wanted, self.wanted);
        if waits {
            self.others.insert(model.clone(), wanted.weight_bytes);
        }
        waits
    }

    /// Returns the bytes that passers may hold besides, of `kv_bytes_max` that all sequences may have.
    #[must_use]
    pub fn spare_bytes(&self, claims: Claims, kv_bytes_max: u64) -> u64 {
        if self.lets_all_pass() {
            return u64::MAX;
        }
        kv_bytes_max.saturating_sub(claims.passed_bytes + self.wanted.needed_bytes)
    }

    /// Returns whether another request may start before it.
    #[must_use]
    pub fn lets_pass(&self, passer: Passer, claims: Claims, kv_bytes_max: u64) -> bool {
        passer.class < self.ticket.class
            || passer.tokens <= claims.tokens_left
            || passer.bytes <= self.spare_bytes(claims, kv_bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Moment;
    use crate::sched::owner::owner;
    use crate::sched::{Priority, Queue, Shares};

    fn ticket(priority: Priority, since: u64) -> Ticket {
        let mut queue = Queue::default();
        let since = Moment::at(Duration::from_secs(since));
        queue.push(owner("c"), priority, since, ());
        queue.head(&Shares::default(), since, Duration::from_secs(10)).unwrap()
    }

    fn blocked() -> Blocked {
        let ticket = ticket(Priority::Normal, 5);
        let wanted = Wanted {
            needed_bytes: 400,
            missing_bytes: 100,
            kv_bytes_max: 600,
            weight_bytes: 100,
            waits_for_models: false,
            is_owed: false,
        };
        Blocked { model: "m".into(), ticket, wanted, passed_from: 1, passer: None, others: BTreeMap::new() }
    }

    #[test]
    fn while_models_have_to_leave_whatever_fits_passes() {
        let mut blocked = blocked();
        blocked.wanted.waits_for_models = true;
        let passer = Passer { class: 2, tokens: 1000, bytes: 600 };
        assert!(blocked.lets_pass(passer, Claims::default(), 600));
        assert_eq!(blocked.spare_bytes(Claims::default(), 600), u64::MAX);
    }

    fn passes(class: u32, tokens: u32, bytes: u64) -> bool {
        let claims = Claims { passed_bytes: 100, tokens_left: 50 };
        blocked().lets_pass(Passer { class, tokens, bytes }, claims, 600)
    }

    #[test]
    fn a_passer_ends_in_time_or_leaves_room() {
        assert!(passes(1, 50, 600), "it ends before those that ran already may");
        assert!(passes(1, 51, 100), "it leaves room");
        assert!(!passes(1, 51, 101));
        assert!(!passes(2, 51, 101));
        assert!(passes(0, 51, 101), "it is of a higher class");
    }

    #[test]
    fn nobody_of_its_class_passes_one_that_is_owed_for_longer_than_others_run() {
        let mut owed = blocked();
        (owed.wanted.waits_for_models, owed.wanted.is_owed) = (true, true);
        let claims = Claims { passed_bytes: 0, tokens_left: 50 };
        let passes = |class, tokens| owed.lets_pass(Passer { class, tokens, bytes: 1 }, claims, 300);
        assert!(passes(1, 50) && passes(0, 51) && !passes(1, 51));
    }

    #[test]
    fn of_those_that_wait_for_models_one_can_start_while_the_models_of_all_stay() {
        let wants = |needed_bytes, weight_bytes| Wanted { needed_bytes, weight_bytes, ..blocked().wanted };
        // The blocked one leaves 200 bytes beside it.
        assert!(blocked().lets_wait(&"n".into(), wants(600, 200)));
        assert!(!blocked().lets_wait(&"n".into(), wants(600, 201)), "each would wait for the other");
        assert!(blocked().lets_wait(&"n".into(), wants(500, 300)), "it can start first");
        let mut third = blocked();
        assert!(
            third.lets_wait(&"n".into(), wants(600, 150)) && third.lets_wait(&"n".into(), wants(600, 150))
        );
        assert!(!third.lets_wait(&"o".into(), wants(450, 100)), "neither can beside the other two");
        third.wanted.is_owed = true;
        assert!(third.lets_wait(&"o".into(), wants(450, 100)), "it starts when nothing runs");
    }

    #[test]
    fn the_one_that_is_owed_is_waited_for_then_the_higher_class_then_the_longer_wait() {
        let yields = |priority, since| blocked().yields_to(&ticket(priority, since), false);
        assert!(yields(Priority::Interactive, 9) && yields(Priority::Normal, 4));
        assert!(!yields(Priority::Normal, 5), "to itself");
        assert!(!yields(Priority::Background, 1));
        let background = ticket(Priority::Background, 9);
        assert!(blocked().yields_to(&background, true));
        let mut owed = blocked();
        owed.wanted.is_owed = true;
        assert!(!owed.yields_to(&ticket(Priority::Interactive, 1), false));
    }
}
