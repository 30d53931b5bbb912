//! Requests of a model from arrival to end: which are refused, which wait, and which end because nobody waits
//! for them any more.

use super::{Context, Resident};
use crate::backend::Backend;
use crate::clock::Moment;
use crate::engine::api::{Counters, Finish};
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::sched::Waiter;

impl Resident {
    /// Adds a request to the queue.
    pub(crate) fn enqueue(&mut self, mut sequence: Sequence) {
        if self.shape.state_bytes > 0 {
            sequence.plan_checkpoints();
        }
        let origin = &sequence.origin;
        self.shares.arrive(&origin.owner);
        self.queue.push(origin.owner.clone(), origin.priority, origin.arrived, sequence);
    }

    /// Returns its waiting requests.
    pub(crate) fn waiters(&self) -> impl Iterator<Item = Waiter<'_>> {
        self.queue.values().map(|sequence| Waiter {
            owner: &sequence.origin.owner,
            priority: sequence.origin.priority,
            since: sequence.origin.arrived,
            has_begun: sequence.has_begun(),
            choices: sequence.choices(),
        })
    }

    /// Returns those that will wait: the other choices of sequences whose prompt is being computed.
    pub(crate) fn promised_waiters(&self) -> impl Iterator<Item = Waiter<'_>> {
        self.running.values().filter(|sequence| sequence.choices() > 1).map(|sequence| Waiter {
            owner: &sequence.origin.owner,
            priority: sequence.origin.priority,
            since: sequence.origin.arrived,
            has_begun: true,
            choices: sequence.choices() - 1,
        })
    }

    /// Takes in the other choices of a sequence that has computed their prompt: they are the next of its
    /// lane. Returns whether one goes on, for which what the sequence has is to be parked.
    pub(super) fn take_forks<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        forks: Vec<(Sequence, Option<Result<Finish, Error>>)>,
    ) -> bool {
        let goes_on = forks.iter().any(|(_, outcome)| outcome.is_none());
        let mut over = Vec::new();
        // The last one first: each goes before those that wait.
        for (fork, outcome) in forks.into_iter().rev() {
            self.shares.arrive(&fork.origin.owner);
            match outcome {
                Some(outcome) => over.push((fork, outcome)),
                None => {
                    let origin = &fork.origin;
                    self.queue.push_front(origin.owner.clone(), origin.priority, fork.since, fork);
                }
            }
        }
        over.into_iter().for_each(|(fork, outcome)| self.leave(cx, fork, outcome));
        goes_on
    }

    /// Ends those waiting requests, in the order of [`Self::waiters`], that `goes` says.
    pub(crate) fn turn_away<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        mut goes: impl FnMut() -> bool,
        error: &Error,
    ) {
        for sequence in self.queue.take_if(|_| goes()) {
            self.leave(cx, sequence, Err(error.clone()));
        }
    }

    /// Returns an error for a request whose deadline is out of reach.
    pub(crate) fn out_of_reach(&mut self, sequence: &Sequence, now: Moment) -> Option<Error> {
        let available = sequence.origin.deadline? - now;
        let cached = self.parked.longest(&sequence.key, &sequence.transcript, sequence.reusable_max());
        let prefill = sequence.pending() - cached;
        let needed = self.pace.time_to_prefill(prefill)?;
        (needed > available).then(|| {
            self.pace.doubt();
            Error::DeadlineUnmeetable { needed, available }
        })
    }

    /// Ends what nobody waits for any more: callers that left or do not read, deadlines that passed.
    pub(crate) fn drop_abandoned<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let (limit, now) = (cx.settings.slow_reader, cx.now);
        let verdict = |sequence: &Sequence| {
            if sequence.origin.is_orphaned() {
                Some(Error::Cancelled("the session was deleted".into()))
            } else if sequence.is_abandoned() {
                Some(Error::Cancelled("the caller went away".into()))
            } else if sequence.origin.deadline.is_some_and(|deadline| deadline <= now) {
                Some(Error::Deadline)
            } else {
                let stalled = sequence.stalled().is_some_and(|since| since.after(limit) <= now);
                stalled.then_some(Error::SlowReader { limit })
            }
        };
        for sequence in self.queue.take_if(|sequence| verdict(sequence).is_some()) {
            let outcome = Err(verdict(&sequence).unwrap_or(Error::Deadline));
            self.leave(cx, sequence, outcome);
        }
        let gone =
            self.running.iter().filter_map(|(&id, sequence)| Some((id, Err(verdict(sequence)?)))).collect();
        self.end(cx, gone)
    }

    /// Ends a sequence that holds no slot.
    pub(super) fn leave<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        sequence: Sequence,
        outcome: Result<Finish, Error>,
    ) {
        self.shares.leave(&sequence.origin.owner);
        if sequence.is_private() && !self.is_shared(&sequence) {
            self.forget_own(cx, &sequence);
        }
        if sequence.is_first() {
            cx.counters.ended(&outcome);
        }
        sequence.end(outcome, cx.now);
    }

    /// Returns whether another choice of its request may go on from its own caches.
    fn is_shared(&self, sequence: &Sequence) -> bool {
        self.running.values().chain(self.queue.values()).any(|other| other.key == sequence.key)
    }

    /// Ends running sequences, last slots first so that few have to move.
    pub(super) fn end<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        mut ended: Vec<(u64, Result<Finish, Error>)>,
    ) -> Result<(), Error> {
        ended.sort_by_key(|(id, _)| {
            std::cmp::Reverse(self.running.get(id).and_then(|sequence| sequence.slot))
        });
        for (id, outcome) in ended {
            let Some(sequence) = self.running.remove(&id) else { continue };
            self.shares.stop(&sequence.origin.owner);
            let is_sound = !matches!(outcome, Err(Error::NonFiniteLogits));
            let freed = self.give_up_slot(cx, &sequence, is_sound && !sequence.is_private());
            self.leave(cx, sequence, outcome);
            freed?;
        }
        Ok(())
    }

    /// Ends everything with one error, without asking the backend.
    pub(crate) fn fail_all(&mut self, counters: &mut Counters, error: &Error, now: Moment) {
        let running = std::mem::take(&mut self.running).into_values();
        for sequence in self.queue.take_if(|_| true).into_iter().chain(running) {
            let outcome = Err(error.clone());
            if sequence.is_first() {
                counters.ended(&outcome);
            }
            sequence.end(outcome, now);
        }
        self.shares = crate::sched::Shares::default();
    }
}
