//! Admission: a request that waits gets a slot and the promise of all the bytes it may come to need, or
//! goes on waiting. Memory is made of what nobody uses; a place is made by a sequence that has to give way,
//! which is parked, waits, and goes on where it was.
//!
//! Without giving way, the next request of a client that keeps one outstanding would wait until somebody
//! else's finishes, because its own place was given away the moment it was free.

use super::counters::Counters;
use super::resident::{Allowance, Resident};
use super::sequence::Sequence;
use crate::backend::{Backend, SlotId, add_checkpoint};
use crate::cache::Hit;
use crate::clock::Moment;
use crate::error::Error;
use crate::sched::{Candidate, Head, Running, victim};

/// Tokens of room that a new sequence's slot has beyond its prompt, so that short answers need no move.
const HEADROOM_TOKENS: u32 = 64;

impl Resident {
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
        while let Some(head) = self.queue.head(&self.shares, now, allowance.ageing) {
            let Some(next) = self.queue.peek(&head) else { break };
            let (tokens, growth) = self.first_slot(next, allowance.kv_bytes_max);
            let needed_bytes = growth + self.slots.slot_bytes(tokens);
            if needed_bytes > allowance.kv_bytes_max {
                let Some(refused) = self.queue.pop(&head) else { break };
                let error = Error::KvTooLarge { needed_bytes, available_bytes: allowance.kv_bytes_max };
                self.leave(refused, Err(error), counters, now);
                continue;
            }
            if self.running() >= allowance.running_max {
                let limit = free + self.bytes() + self.promised_bytes();
                if !self.make_way(backend, counters, &head, now)? {
                    break;
                }
                // Its promise is free again, its parked copy is not.
                let overdraft = (self.bytes() + self.promised_bytes()).saturating_sub(limit);
                if overdraft > 0 {
                    self.give_back(backend, overdraft, None)?;
                }
                free = limit.saturating_sub(self.bytes() + self.promised_bytes());
                continue;
            }
            let hit = self.parked.find(&next.origin.principal, &next.tokens, next.reusable_max(), now);
            let mut missing = self.room_for(backend, &mut free, (tokens, growth), hit)?;
            if missing > 0 && self.running.is_empty() {
                missing = self.room_for(backend, &mut free, (tokens, growth), None)?;
            }
            if missing > 0 {
                return Ok(missing);
            }
            let Some(mut sequence) = self.queue.pop(&head) else { break };
            sequence.class = head.class;
            let before = self.bytes();
            counters.cached_tokens_total += self.start(backend, sequence, (tokens, free - growth), now)?;
            free = free.saturating_sub(self.bytes() - before + growth);
        }
        Ok(0)
    }

    /// Takes the place of a running sequence away, if one has to give way to the request.
    fn make_way<B: Backend>(
        &mut self,
        backend: &mut B,
        counters: &mut Counters,
        head: &Head,
        now: Moment,
    ) -> Result<bool, Error> {
        let candidate = Candidate { client: &head.client, class: head.class };
        // A score keeps no cache: it would begin anew. And those of a lane run in their order.
        let running = self.running.iter().filter(|(_, sequence)| {
            sequence.leaves_cache() && !head.has_lane(&sequence.origin.client, sequence.origin.priority)
        });
        let running = running.map(|(&id, sequence)| Running {
            sequence: id,
            client: &sequence.origin.client,
            class: sequence.class,
        });
        let Some(id) = victim(&self.shares, candidate, running) else { return Ok(false) };
        let Some(mut sequence) = self.running.remove(&id) else { return Ok(false) };
        counters.preemptions_total += 1;
        self.shares.stop(&sequence.origin.client);
        self.give_up_slot(backend, &sequence, true, now)?;
        sequence.flush(now);
        sequence.slot = None;
        sequence.computed = 0;
        let origin = &sequence.origin;
        self.queue.push_front(origin.client.clone(), origin.priority, now, sequence);
        Ok(true)
    }

    /// Tokens of the slot that a sequence begins in, and the bytes that it may grow by. It begins in a slot for what it
    /// has, or, where there could never be room for that one and the next, in its last.
    fn first_slot(&self, sequence: &Sequence, kv_bytes_max: u64) -> (u32, u64) {
        let finally = sequence.tokens_max().min(self.shape.context_length);
        let headroom = (sequence.computed + sequence.pending()).saturating_add(HEADROOM_TOKENS);
        let tokens = headroom.min(finally);
        let growth = self.growth_bytes(sequence, self.slots.capacity_for(tokens));
        if growth + self.slots.slot_bytes(tokens) > kv_bytes_max {
            (finally, self.checkpoint_bytes())
        } else {
            (tokens, growth)
        }
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
            self.close_empty(backend)?;
        }
        Ok(before - self.bytes())
    }

    /// Gives back the slabs that nobody uses.
    pub(super) fn close_empty<B: Backend>(&mut self, backend: &mut B) -> Result<(), Error> {
        self.slots.close_empty().into_iter().try_for_each(|slab| backend.close_slab(self.id, slab))
    }

    /// Gives a sequence a slot of so many tokens, with what a parked cache has of its own; returns how many.
    fn start<B: Backend>(
        &mut self,
        backend: &mut B,
        mut sequence: Sequence,
        (tokens, free_bytes): (u32, u64),
        now: Moment,
    ) -> Result<u64, Error> {
        let id = self.sequence_next;
        self.sequence_next += 1;
        let slot = self.take_slot(backend, id, tokens, free_bytes)?;
        sequence.slot = Some(slot);
        let (owner, most) = (&sequence.origin.principal, sequence.reusable_max());
        let hit = self.parked.find(owner, &sequence.tokens, most, now);
        let cached = hit.map_or(0, |hit| hit.tokens);
        sequence.checkpoints.clear();
        if let Some(hit) = hit {
            backend.restore(self.id, hit.id, cached, slot)?;
            for checkpoint in self.parked.checkpoints_up_to(hit.id, cached) {
                add_checkpoint(&mut sequence.checkpoints, checkpoint);
            }
        }
        sequence.computed = cached;
        let counted = if sequence.start(cached, now) { u64::from(cached) } else { 0 };
        self.shares.start(&sequence.origin.client);
        self.running.insert(id, sequence);
        Ok(counted)
    }

    pub(super) fn take_slot<B: Backend>(
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
}
