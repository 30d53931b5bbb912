//! A model in memory: its queue, its running sequences and their slots, its parked caches, and the step
//! that runs. One turn of it is: collect the step, commit its results (`step`), let go of what is gone, admit
//! what waits (`admit`), launch the next step, and only then talk to the readers.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::counters::Counters;
use super::sequence::Sequence;
use super::step::Launched;
use super::work::ResidentModel;
use crate::backend::{Backend, CHECKPOINTS_MAX, LoadSpec, ModelId, ModelShape};
use crate::cache::{Parked, Slots};
use crate::clock::Moment;
use crate::error::Error;
use crate::ids::{ClientId, SessionKey};
use crate::sched::{Pace, PaceLimits, Queue, Scheduler, Shares};

/// What a turn may use, decided by the engine for all models together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// Bytes that nobody uses or was promised.
    pub(super) free_bytes: u64,
    /// Bytes that KV caches can have at most: the budget less all weights.
    pub(super) kv_bytes_max: u64,
    /// Bytes that parked caches may keep.
    pub(super) idle_bytes_max: u64,
    /// How much a step may prefill.
    pub(super) pace: PaceLimits,
    /// Sequences that may run at once.
    pub(super) running_max: u32,
    /// Waiting that lifts a request by a priority class.
    pub(super) ageing: Duration,
}

/// A model that runs.
pub(super) struct Resident {
    pub(super) id: ModelId,
    pub(super) spec: LoadSpec,
    pub(super) shape: ModelShape,
    pub(super) loaded: SystemTime,
    pub(super) last_used: SystemTime,
    pub(super) queue: Queue<Sequence>,
    pub(super) running: BTreeMap<u64, Sequence>,
    pub(super) sequence_next: u64,
    pub(super) scheduler: Scheduler,
    pub(super) shares: Shares,
    pub(super) pace: Pace,
    pub(super) slots: Slots,
    pub(super) parked: Parked,
    /// The step that runs.
    pub(super) launched: Option<Launched>,
}

impl Resident {
    pub(super) fn new(id: ModelId, spec: LoadSpec, shape: ModelShape, loaded: SystemTime) -> Self {
        let slots = Slots::new(shape.context_length, shape.kv_bytes_per_token, shape.state_bytes);
        let parked = Parked::new(shape.kv_bytes_per_token, shape.state_bytes);
        Self {
            id,
            spec,
            shape,
            loaded,
            last_used: loaded,
            queue: Queue::default(),
            running: BTreeMap::new(),
            sequence_next: 0,
            scheduler: Scheduler::default(),
            shares: Shares::default(),
            pace: Pace::default(),
            slots,
            parked,
            launched: None,
        }
    }

    pub(super) fn enqueue(&mut self, mut sequence: Sequence) {
        if self.shape.state_bytes > 0 {
            sequence.plan_checkpoints();
        }
        let origin = &sequence.origin;
        self.shares.arrive(&origin.client);
        self.queue.push(origin.client.clone(), origin.priority, origin.arrived, sequence);
    }

    pub(super) fn queued(&self) -> u32 {
        u32::try_from(self.queue.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn queued_of(&self, client: &ClientId) -> u32 {
        u32::try_from(self.queue.len_of(client)).unwrap_or(u32::MAX)
    }

    pub(super) fn running(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.launched.is_none()
    }

    /// Why a request that arrives now should not wait: its deadline is out of reach.
    pub(super) fn out_of_reach(&mut self, sequence: &Sequence, now: Moment) -> Option<Error> {
        let available = sequence.origin.deadline? - now;
        let cached =
            self.parked.longest(&sequence.origin.principal, &sequence.tokens, sequence.reusable_max());
        let prefill = sequence.pending() - cached;
        let needed = self.pace.time_to_prefill(prefill)?;
        (needed > available).then(|| {
            self.pace.doubt();
            Error::DeadlineUnmeetable { needed, available }
        })
    }

    /// Bytes it holds: weights, slabs, parked caches.
    pub(super) fn bytes(&self) -> u64 {
        self.shape.weight_bytes + self.slots.bytes() + self.parked.bytes()
    }

    /// Bytes that its running sequences may still come to need.
    pub(super) fn promised_bytes(&self) -> u64 {
        let growth = |sequence: &Sequence| {
            let capacity = sequence.slot.map_or(0, |slot| self.slots.capacity_of(slot));
            self.growth_bytes(sequence, capacity)
        };
        self.running.values().map(growth).sum()
    }

    /// Bytes that could be dropped without harm: parked caches and empty slabs.
    pub(super) fn droppable_bytes(&self) -> u64 {
        self.parked.bytes() + self.slots.empty_bytes()
    }

    /// Bytes of the slot that a sequence moves to when it outgrows one of that capacity: it moves once, to one
    /// for all that it may come to hold. And of its checkpoints.
    pub(super) fn growth_bytes(&self, sequence: &Sequence, capacity: u32) -> u64 {
        let finally = sequence.tokens_max().min(self.shape.context_length);
        let slot = if finally > capacity { self.slots.slot_bytes(finally) } else { 0 };
        slot + self.checkpoint_bytes()
    }

    /// Bytes of the checkpoints that a running sequence may have.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        self.shape.state_bytes * CHECKPOINTS_MAX as u64
    }

    /// Lets go of what nobody waits for any more: callers that left or do not read, deadlines that passed.
    pub(super) fn drop_abandoned<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        limit: Duration,
        now: Moment,
    ) -> Result<(), Error> {
        let verdict = |sequence: &Sequence| {
            if sequence.is_abandoned() {
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
            self.leave(sequence, outcome, counters, now);
        }
        let gone: Vec<_> =
            self.running.iter().filter_map(|(&id, sequence)| Some((id, Err(verdict(sequence)?)))).collect();
        self.end(backend, counters, gone, now)
    }

    /// A sequence that holds no slot ends.
    pub(super) fn leave(
        &mut self,
        sequence: Sequence,
        outcome: Result<super::work::Finish, Error>,
        counters: &mut Counters,
        now: Moment,
    ) {
        self.shares.leave(&sequence.origin.client);
        counters.ended(&outcome);
        sequence.end(outcome, now);
    }

    /// Ends everything with one error; the backend is not asked any more.
    pub(super) fn fail_all(&mut self, counters: &mut Counters, error: &Error, now: Moment) {
        let running = std::mem::take(&mut self.running).into_values();
        for sequence in self.queue.take_if(|_| true).into_iter().chain(running) {
            let outcome = Err(error.clone());
            counters.ended(&outcome);
            sequence.end(outcome, now);
        }
        self.shares = Shares::default();
    }

    /// Sends what committed steps brought, and keeps parked caches below their limit.
    pub(super) fn settle<B: Backend>(
        &mut self,
        backend: &mut B,
        idle_bytes_max: u64,
        now: Moment,
    ) -> Result<(), Error> {
        // One that had to give way may have output that its reader had no room for.
        for sequence in self.running.values_mut().chain(self.queue.values_mut()) {
            sequence.flush(now);
        }
        let over = self.parked.bytes().saturating_sub(idle_bytes_max);
        if over > 0 {
            for parked in self.parked.evict(over, None) {
                backend.drop_parked(self.id, parked)?;
            }
        }
        Ok(())
    }

    /// Drops the caches of a session that is gone.
    pub(super) fn forget<B: Backend>(&mut self, backend: &mut B, session: &SessionKey) -> Result<(), Error> {
        self.parked.forget(session).into_iter().try_for_each(|parked| backend.drop_parked(self.id, parked))
    }

    pub(super) fn describe(&self) -> ResidentModel {
        let count = |condition: fn(&Sequence) -> bool| {
            let meeting = self.running.values().filter(|sequence| condition(sequence)).count();
            u32::try_from(meeting).unwrap_or(u32::MAX)
        };
        ResidentModel {
            model: self.spec.model.clone(),
            revision: self.spec.revision.clone(),
            computes_in: self.shape.computes_in.clone(),
            parameter_count: self.shape.parameter_count,
            weight_bytes: self.shape.weight_bytes,
            kv_slab_bytes: self.slots.bytes(),
            kv_idle_bytes: self.parked.bytes(),
            kv_bytes_per_token: self.shape.kv_bytes_per_token,
            kv_reserved_bytes: self.promised_bytes(),
            running_sequences: self.running(),
            prefilling_sequences: count(Sequence::is_prefilling),
            stalled_sequences: count(Sequence::is_paused),
            queued_sequences: self.queued(),
            loaded: self.loaded,
            last_used: self.last_used,
            slabs: self.slots.classes(),
        }
    }
}
