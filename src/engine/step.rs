//! A model's step: what it takes of whom, its launch, and what becomes of its results.

use super::counters::Counters;
use super::resident::{Allowance, Resident};
use super::sequence::Sequence;
use super::work::Finish;
use crate::backend::{Backend, SlotId, Span, SpanResult, Step, add_checkpoint};
use crate::cache::CacheEntry;
use crate::clock::{Clock, Moment};
use crate::error::Error;
use crate::sched::Runnable;

/// A step that runs.
pub(super) struct Launched {
    /// Its spans: sequence and tokens.
    spans: Vec<(u64, u32)>,
    at: Moment,
}

impl Resident {
    /// Waits for the step that runs, if any, and commits it.
    pub(super) fn collect<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        clock: &dyn Clock,
    ) -> Result<(), Error> {
        let Some(Launched { spans, at }) = self.launched.take() else { return Ok(()) };
        let results = backend.collect(self.id)?;
        let now = clock.now();
        let (mut decoding, mut prefilled) = (0, 0);
        let mut ended = Vec::new();
        for ((id, tokens), result) in spans.into_iter().zip(results) {
            if tokens == 1 {
                decoding += 1;
            } else {
                prefilled += tokens;
            }
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            counters.committed(tokens, &result);
            let drawn = u32::from(matches!(result, SpanResult::Token(..)));
            self.shares.serve(&sequence.origin.client, if tokens > 1 { tokens } else { 0 }, drawn);
            let outcome = sequence.commit(tokens, result, now);
            if let (Some(slot), true) = (sequence.slot, sequence.is_at_checkpoint()) {
                backend.checkpoint(self.id, slot, sequence.computed)?;
                add_checkpoint(&mut sequence.checkpoints, sequence.computed);
            }
            if let Some(outcome) = outcome {
                ended.push((id, outcome));
            }
        }
        self.pace.observe(decoding, prefilled, now - at);
        self.end(backend, counters, ended, now)
    }

    /// Ends running sequences, last slots first so that few have to move.
    pub(super) fn end<B: Backend>(
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
            self.shares.stop(&sequence.origin.client);
            let sound = !matches!(outcome, Err(Error::NonFiniteLogits));
            let freed = self.give_up_slot(backend, &sequence, sound, now);
            self.leave(sequence, outcome, counters, now);
            freed?;
        }
        Ok(())
    }

    /// Parks what a sequence computed, if it is worth it, and frees its slot.
    pub(super) fn give_up_slot<B: Backend>(
        &mut self,
        backend: &mut B,
        sequence: &Sequence,
        sound: bool,
        now: Moment,
    ) -> Result<(), Error> {
        let Some(slot) = sequence.slot else { return Ok(()) };
        let owner = &sequence.origin.principal;
        let computed = &sequence.tokens[..sequence.computed as usize];
        let checkpoints = (self.shape.state_bytes > 0).then(|| sequence.all_checkpoints());
        let covered = self.parked.covers(owner, computed, checkpoints.as_deref());
        if sound && sequence.leaves_cache() && !computed.is_empty() && !covered {
            let parked = backend.park(self.id, slot, sequence.computed)?;
            let cache = CacheEntry {
                id: parked,
                owner: owner.clone(),
                session: sequence.origin.session.clone(),
                tokens: computed.to_vec(),
                checkpoints,
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

    /// Launches the next step, if any sequence has tokens to run. Says whether there is one.
    pub(super) fn launch<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        allowance: Allowance,
        clock: &dyn Clock,
    ) -> Result<bool, Error> {
        let runnable: Vec<Runnable<'_>> = self
            .running
            .iter()
            .filter(|(_, state)| !state.is_paused())
            .map(|(&sequence, state)| Runnable {
                sequence,
                client: &state.origin.client,
                class: state.class,
                pending: state.pending(),
                span_max: state.span_max(),
            })
            .collect();
        let decoding = runnable.iter().any(|run| run.pending == 1);
        let least = self.shape.prefill_tokens_min;
        let prefill_tokens = self.pace.prefill_tokens(decoding, least, allowance.pace);
        let planned = self.scheduler.plan(&runnable, prefill_tokens);
        if planned.is_empty() {
            return Ok(false);
        }
        for &(id, tokens) in &planned {
            self.grow(backend, id, tokens)?;
        }
        let mut spans: Vec<(u64, Span)> =
            planned.iter().filter_map(|&(id, tokens)| Some((id, self.span(id, tokens)?))).collect();
        spans.sort_by_key(|(_, span)| (span.tokens.len() > 1, span.slot));
        let (ids, spans): (Vec<u64>, Vec<Span>) = spans.into_iter().unzip();
        let lengths = spans.iter().map(|span| u32::try_from(span.tokens.len()).unwrap_or(u32::MAX));
        let launched = Launched { spans: ids.into_iter().zip(lengths).collect(), at: clock.now() };
        backend.launch(self.id, &Step { spans })?;
        counters.steps_total += 1;
        self.last_used = clock.wall();
        self.launched = Some(launched);
        Ok(true)
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

    /// Moves a sequence to the slot that was promised when it was admitted, if its next span does not fit the one
    /// it has.
    fn grow<B: Backend>(&mut self, backend: &mut B, id: u64, tokens: u32) -> Result<(), Error> {
        let Some(sequence) = self.running.get(&id) else { return Ok(()) };
        let (Some(from), computed) = (sequence.slot, sequence.computed) else { return Ok(()) };
        let needed = computed + tokens;
        if self.slots.capacity_of(from) >= needed {
            return Ok(());
        }
        let finally = sequence.tokens_max().min(self.shape.context_length).max(needed);
        let to = self.take_slot(backend, id, finally, 0)?;
        backend.copy_slot(self.id, from, to, computed)?;
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.slot = Some(to);
        }
        self.free_slot(backend, from, computed)
    }
}
