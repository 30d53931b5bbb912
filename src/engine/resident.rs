//! A model in memory: its queue, its running sequences and their slots, its parked caches, and the step
//! that runs. One turn of it is: collect the step, commit its results, let go of what is gone, admit what
//! waits, launch the next step, and only then talk to the readers.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::counters::Counters;
use super::sequence::Sequence;
use super::work::{Finish, ResidentModel};
use crate::backend::{Backend, LoadSpec, ModelId, ModelShape, SlotId, Span, Step};
use crate::cache::{Hit, Parked, ParkedCache, Slots};
use crate::clock::Moment;
use crate::error::Error;
use crate::sched::{Queue, Runnable, Scheduler};

/// Tokens of room that a new sequence's slot has beyond its prompt, so that short answers need no move.
const HEADROOM_TOKENS: u32 = 64;

/// What a turn may use, decided by the engine for all models together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// Bytes that nobody uses or was promised.
    pub(super) free_bytes: u64,
    /// Bytes that KV caches can have at most: the budget less all weights.
    pub(super) kv_bytes_max: u64,
    /// Bytes that parked caches may keep.
    pub(super) idle_bytes_max: u64,
    /// Tokens that one step may prefill.
    pub(super) prefill_tokens: u32,
    /// Sequences that may run at once.
    pub(super) running_max: u32,
}

/// A model that runs.
pub(super) struct Resident {
    pub(super) id: ModelId,
    pub(super) spec: LoadSpec,
    pub(super) shape: ModelShape,
    pub(super) loaded: SystemTime,
    pub(super) last_used: SystemTime,
    queue: Queue<Sequence>,
    running: BTreeMap<u64, Sequence>,
    sequence_next: u64,
    scheduler: Scheduler,
    slots: Slots,
    parked: Parked,
    /// The spans of the step that runs: sequence and tokens.
    launched: Option<Vec<(u64, u32)>>,
}

impl Resident {
    pub(super) fn new(id: ModelId, spec: LoadSpec, shape: ModelShape, loaded: SystemTime) -> Self {
        let slots = Slots::new(shape.context_length, shape.kv_bytes_per_token);
        let parked = Parked::new(shape.kv_bytes_per_token);
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
            slots,
            parked,
            launched: None,
        }
    }

    pub(super) fn enqueue(&mut self, sequence: Sequence) {
        self.queue.push(sequence.origin.client.clone(), sequence);
    }

    pub(super) fn queued(&self) -> u32 {
        u32::try_from(self.queue.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn running(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.launched.is_none()
    }

    /// Bytes it holds: weights, slabs, parked caches.
    pub(super) fn bytes(&self) -> u64 {
        self.shape.weight_bytes + self.slots.bytes() + self.parked.bytes()
    }

    /// Bytes that its running sequences may still come to need.
    pub(super) fn promised_bytes(&self) -> u64 {
        self.running
            .values()
            .map(|sequence| self.growth_bytes(sequence.tokens_max(), self.held_tokens(sequence)))
            .sum()
    }

    /// Bytes that could be dropped without harm: parked caches and empty slabs.
    pub(super) fn droppable_bytes(&self) -> u64 {
        self.parked.bytes() + self.slots.empty_bytes()
    }

    fn held_tokens(&self, sequence: &Sequence) -> u32 {
        sequence.computed + sequence.pending()
    }

    /// Bytes of the slot that a sequence moves to when it outgrows the one for `now` tokens.
    fn growth_bytes(&self, finally: u32, now: u32) -> u64 {
        let finally = finally.min(self.shape.context_length);
        let grows = self.slots.capacity_for(finally) > self.slots.capacity_for(now);
        if grows { self.slots.slot_bytes(finally) } else { 0 }
    }

    /// Waits for the step that runs, if any, and commits it.
    pub(super) fn collect<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        now: Moment,
    ) -> Result<(), Error> {
        let Some(spans) = self.launched.take() else { return Ok(()) };
        let results = backend.collect(self.id)?;
        let mut ended = Vec::new();
        for ((id, tokens), result) in spans.into_iter().zip(results) {
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            counters.committed(tokens, &result);
            if let Some(outcome) = sequence.commit(tokens, result, now) {
                ended.push((id, outcome));
            }
        }
        self.end(backend, counters, ended, now)
    }

    /// Ends running sequences, last slots first so that few have to move.
    fn end<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        mut ended: Vec<(u64, Result<Finish, Error>)>,
        now: Moment,
    ) -> Result<(), Error> {
        ended.sort_by_key(|(id, _)| {
            std::cmp::Reverse(self.running.get(id).and_then(|sequence| sequence.slot))
        });
        for (id, outcome) in ended {
            let Some(sequence) = self.running.remove(&id) else { continue };
            counters.ended(&outcome);
            let sound = !matches!(outcome, Err(Error::NonFiniteLogits));
            let freed = self.give_up_slot(backend, &sequence, sound, now);
            sequence.end(outcome, now);
            freed?;
        }
        Ok(())
    }

    /// Parks what a sequence computed, if it is worth it, and frees its slot.
    fn give_up_slot<B: Backend>(
        &mut self,
        backend: &mut B,
        sequence: &Sequence,
        sound: bool,
        now: Moment,
    ) -> Result<(), Error> {
        let Some(slot) = sequence.slot else { return Ok(()) };
        let owner = &sequence.origin.principal;
        let computed = &sequence.tokens[..sequence.computed as usize];
        if sound && sequence.leaves_cache() && !computed.is_empty() && !self.parked.covers(owner, computed) {
            let parked = backend.park(self.id, slot, sequence.computed)?;
            let cache = ParkedCache {
                id: parked,
                owner: owner.clone(),
                session: sequence.origin.session.clone(),
                tokens: computed.to_vec(),
                used: now,
            };
            for superfluous in self.parked.insert(cache) {
                backend.drop_parked(self.id, superfluous)?;
            }
        }
        self.free_slot(backend, slot, sequence.computed)
    }

    /// Clears and frees a slot; the slab's last used one moves into the hole.
    fn free_slot<B: Backend>(&mut self, backend: &mut B, slot: SlotId, used: u32) -> Result<(), Error> {
        backend.clear_slot(self.id, slot, used)?;
        let Some((owner, from)) = self.slots.release(slot) else { return Ok(()) };
        let Some(moved) = self.running.get_mut(&owner) else { return Ok(()) };
        moved.slot = Some(slot);
        if moved.computed > 0 {
            backend.copy_slot(self.id, from, slot, moved.computed)?;
            backend.clear_slot(self.id, from, moved.computed)?;
        }
        Ok(())
    }

    /// Lets go of what nobody waits for any more: callers that left, deadlines that passed.
    pub(super) fn drop_abandoned<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        now: Moment,
    ) -> Result<(), Error> {
        let verdict = |sequence: &Sequence| {
            if sequence.is_abandoned() {
                Some(Error::Cancelled("the caller went away".into()))
            } else {
                sequence.origin.deadline.filter(|&deadline| deadline <= now).map(|_| Error::Deadline)
            }
        };
        for sequence in self.queue.take_if(|sequence| verdict(sequence).is_some()) {
            let outcome = Err(verdict(&sequence).unwrap_or(Error::Deadline));
            counters.ended(&outcome);
            sequence.end(outcome, now);
        }
        let gone: Vec<_> =
            self.running.iter().filter_map(|(&id, sequence)| Some((id, Err(verdict(sequence)?)))).collect();
        self.end(backend, counters, gone, now)
    }

    /// Ends everything with one error; the backend is not asked any more.
    pub(super) fn fail_all(&mut self, counters: &mut Counters, error: &Error, now: Moment) {
        let running = std::mem::take(&mut self.running).into_values();
        for sequence in self.queue.take_if(|_| true).into_iter().chain(running) {
            let outcome = Err(error.clone());
            counters.ended(&outcome);
            sequence.end(outcome, now);
        }
    }

    /// Starts waiting requests as far as there is room. A request that could not even run alone is refused.
    /// Returns the bytes that are missing for the one whose turn it is.
    pub(super) fn admit<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        allowance: Allowance,
        now: Moment,
    ) -> Result<u64, Error> {
        let mut free = allowance.free_bytes;
        while self.running() < allowance.running_max {
            let Some(next) = self.queue.peek() else { break };
            let tokens = self.start_tokens(next);
            let growth = self.growth_bytes(next.tokens_max(), tokens);
            let alone = growth + self.slots.slot_bytes(tokens);
            if alone > allowance.kv_bytes_max {
                let Some(refused) = self.queue.pop() else { break };
                let error =
                    Error::KvTooLarge { needed_bytes: alone, available_bytes: allowance.kv_bytes_max };
                counters.ended(&Err(error.clone()));
                refused.end(Err(error), now);
                continue;
            }
            let hit = self.parked.find(&next.origin.principal, &next.tokens, now);
            let mut missing = self.room_for(backend, &mut free, (tokens, growth), hit)?;
            if missing > 0 && self.running.is_empty() {
                missing = self.room_for(backend, &mut free, (tokens, growth), None)?;
            }
            if missing > 0 {
                return Ok(missing);
            }
            let Some(sequence) = self.queue.pop() else { break };
            let before = self.bytes();
            counters.cached_tokens_total += self.start(backend, sequence, free - growth, now)?;
            free = free.saturating_sub(self.bytes() - before + growth);
        }
        Ok(0)
    }

    fn start_tokens(&self, sequence: &Sequence) -> u32 {
        let headroom = self.held_tokens(sequence).saturating_add(HEADROOM_TOKENS);
        headroom.min(sequence.tokens_max()).min(self.shape.context_length)
    }

    /// Makes room for a sequence of so many tokens that may grow by so many bytes, by dropping what nobody
    /// uses but the cache that it will start from. Returns the bytes that are missing.
    fn room_for<B: Backend>(
        &mut self,
        backend: &mut B,
        free: &mut u64,
        (tokens, growth): (u32, u64),
        spare: Option<Hit>,
    ) -> Result<u64, Error> {
        loop {
            let slot = if self.slots.has_free(tokens) { 0 } else { self.slots.slot_bytes(tokens) };
            let missing = (growth + slot).saturating_sub(*free);
            if missing == 0 {
                return Ok(0);
            }
            let freed = self.give_back(backend, missing, spare)?;
            if freed == 0 {
                return Ok(missing);
            }
            *free += freed;
        }
    }

    /// Gives back at least so many bytes, if they can be had without harm: parked caches first, the least
    /// recently used before others, then empty slabs. Returns the bytes that were freed.
    pub(super) fn give_back<B: Backend>(
        &mut self,
        backend: &mut B,
        bytes: u64,
        spare: Option<Hit>,
    ) -> Result<u64, Error> {
        let before = self.bytes();
        for parked in self.parked.evict(bytes, spare.map(|hit| hit.id)) {
            backend.drop_parked(self.id, parked)?;
        }
        if before - self.bytes() < bytes {
            for slab in self.slots.close_empty() {
                backend.close_slab(self.id, slab)?;
            }
        }
        Ok(before - self.bytes())
    }

    /// Gives a sequence a slot, with what a parked cache has of its tokens; returns how many.
    fn start<B: Backend>(
        &mut self,
        backend: &mut B,
        mut sequence: Sequence,
        free_bytes: u64,
        now: Moment,
    ) -> Result<u64, Error> {
        let id = self.sequence_next;
        self.sequence_next += 1;
        let tokens = self.start_tokens(&sequence);
        let slot = self.take_slot(backend, id, tokens, free_bytes)?;
        sequence.slot = Some(slot);
        let hit = self.parked.find(&sequence.origin.principal, &sequence.tokens, now);
        let cached = hit.map_or(0, |hit| sequence.reusable(hit.tokens));
        if let (Some(hit), 1..) = (hit, cached) {
            backend.restore(self.id, hit.id, cached, slot)?;
        }
        sequence.computed = cached;
        sequence.start(cached, now);
        self.running.insert(id, sequence);
        Ok(u64::from(cached))
    }

    fn take_slot<B: Backend>(
        &mut self,
        backend: &mut B,
        owner: u64,
        tokens: u32,
        free_bytes: u64,
    ) -> Result<SlotId, Error> {
        let grant = self.slots.acquire(owner, tokens, self.queued() + 1, free_bytes);
        if let Some((capacity, slots)) = grant.open {
            backend.open_slab(self.id, grant.slot.slab, capacity, slots)?;
        }
        Ok(grant.slot)
    }

    /// Launches the next step, if any sequence has tokens to run.
    pub(super) fn launch<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        allowance: Allowance,
        wall: SystemTime,
    ) -> Result<(), Error> {
        let runnable: Vec<Runnable<'_>> = self
            .running
            .iter()
            .map(|(&sequence, state)| Runnable {
                sequence,
                client: &state.origin.client,
                pending: state.pending(),
                span_max: state.span_max(),
            })
            .collect();
        let planned = self.scheduler.plan(&runnable, allowance.prefill_tokens);
        if planned.is_empty() {
            return Ok(());
        }
        for &(id, tokens) in &planned {
            self.grow(backend, id, tokens)?;
        }
        let mut spans: Vec<(u64, Span)> =
            planned.iter().filter_map(|&(id, tokens)| Some((id, self.span(id, tokens)?))).collect();
        spans.sort_by_key(|(_, span)| (span.tokens.len() > 1, span.slot));
        let (ids, spans): (Vec<u64>, Vec<Span>) = spans.into_iter().unzip();
        let lengths = spans.iter().map(|span| u32::try_from(span.tokens.len()).unwrap_or(u32::MAX));
        let launched = ids.into_iter().zip(lengths).collect();
        backend.launch(self.id, &Step { spans })?;
        counters.steps_total += 1;
        self.last_used = wall;
        self.launched = Some(launched);
        Ok(())
    }

    fn span(&self, id: u64, tokens: u32) -> Option<Span> {
        let sequence = self.running.get(&id)?;
        let range = sequence.computed as usize..(sequence.computed + tokens) as usize;
        Some(Span {
            slot: sequence.slot?,
            start: sequence.computed,
            tokens: sequence.tokens[range].to_vec(),
            output: sequence.span_output(tokens),
        })
    }

    /// Moves a sequence to a larger slot if its next span does not fit the one it has. The bytes were
    /// promised when it was admitted.
    fn grow<B: Backend>(&mut self, backend: &mut B, id: u64, tokens: u32) -> Result<(), Error> {
        let Some(sequence) = self.running.get(&id) else { return Ok(()) };
        let (Some(from), computed) = (sequence.slot, sequence.computed) else { return Ok(()) };
        let needed = computed + tokens;
        if self.slots.capacity_of(from) >= needed {
            return Ok(());
        }
        let wanted = needed.saturating_add(HEADROOM_TOKENS).min(self.shape.context_length).max(needed);
        let to = self.take_slot(backend, id, wanted, 0)?;
        backend.copy_slot(self.id, from, to, computed)?;
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.slot = Some(to);
        }
        self.free_slot(backend, from, computed)
    }

    /// Sends what committed steps brought, and keeps parked caches below their limit.
    pub(super) fn settle<B: Backend>(&mut self, backend: &mut B, allowance: Allowance) -> Result<(), Error> {
        for sequence in self.running.values_mut() {
            sequence.flush();
        }
        let over = self.parked.bytes().saturating_sub(allowance.idle_bytes_max);
        if over > 0 {
            for parked in self.parked.evict(over, None) {
                backend.drop_parked(self.id, parked)?;
            }
        }
        Ok(())
    }

    /// Drops the caches of a session that is gone.
    pub(super) fn forget<B: Backend>(
        &mut self,
        backend: &mut B,
        session: &crate::ids::SessionKey,
    ) -> Result<(), Error> {
        self.parked.forget(session).into_iter().try_for_each(|parked| backend.drop_parked(self.id, parked))
    }

    pub(super) fn describe(&self) -> ResidentModel {
        ResidentModel {
            model: self.spec.model.clone(),
            revision: self.spec.revision.clone(),
            computes_in: self.shape.computes_in.clone(),
            parameter_count: self.shape.parameter_count,
            weight_bytes: self.shape.weight_bytes,
            kv_slab_bytes: self.slots.bytes(),
            kv_idle_bytes: self.parked.bytes(),
            kv_bytes_per_token: self.shape.kv_bytes_per_token,
            running_sequences: self.running(),
            queued_sequences: self.queued(),
            loaded: self.loaded,
            last_used: self.last_used,
            slabs: self.slots.classes(),
        }
    }
}
