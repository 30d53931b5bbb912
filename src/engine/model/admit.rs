//! Admission: a waiting request gets a slot and the promise of all the bytes it may come to need, or stays in
//! the queue. Room is made by evicting what no sequence uses; a place by preempting a sequence, which is
//! parked, waits, and continues where it was.
//!
//! Without preemption, the next request of a client that keeps one outstanding would wait until somebody
//! else's finishes, because its own place was given away the moment it was free.

use super::{Context, Reclaim, Resident, Room};
use crate::backend::{Backend, add_checkpoint};
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::sched::{Candidate, Head, Running, victim};

/// Tokens of room that a new sequence's slot has beyond its prompt, so that short answers need no move.
const HEADROOM_TOKENS: u32 = 64;

/// What a sequence needs to begin.
#[derive(Clone, Copy)]
struct Need {
    /// Tokens of its first slot.
    tokens: u32,
    /// Bytes that it may grow by.
    growth_bytes: u64,
}

impl Resident {
    /// Starts waiting requests as far as there is room. A request that could not even run alone is refused.
    /// Returns the bytes that are missing for the request at the head of the queue.
    pub(crate) fn admit<B: Backend>(&mut self, cx: &mut Context<'_, B>, room: Room) -> Result<u64, Error> {
        let mut free = room.free_bytes;
        while let Some(head) = self.queue.head(&self.shares, cx.now, cx.settings.priority_ageing) {
            let Some(next) = self.queue.peek(&head) else { break };
            let need = self.need(next, room.kv_bytes_max);
            let needed_bytes = need.growth_bytes + self.slots.slot_bytes(need.tokens);
            if needed_bytes > room.kv_bytes_max {
                let Some(refused) = self.queue.pop(&head) else { break };
                let error = Error::KvTooLarge { needed_bytes, available_bytes: room.kv_bytes_max };
                self.leave(cx, refused, Err(error));
                continue;
            }
            if self.running() >= cx.settings.running_sequences_max {
                let limit = free + self.bytes() + self.promised_bytes();
                if !self.preempt(cx, &head)? {
                    break;
                }
                // Its promise is free again, its parked copy is not.
                free = limit.saturating_sub(self.bytes() + self.promised_bytes());
                continue;
            }
            let hit = self.parked.find(&next.key, &next.transcript, next.reusable_max(), cx.now);
            let mut missing = self.make_room(cx, &mut free, need, Reclaim::EmptySlabs)?;
            if missing > 0 && room.others_empty_bytes > 0 {
                return Ok(missing.min(room.others_empty_bytes));
            }
            if missing > 0 {
                missing = self.make_room(cx, &mut free, need, Reclaim::AllBut(hit))?;
            }
            if missing > 0 && self.running.is_empty() {
                missing = self.make_room(cx, &mut free, need, Reclaim::AllBut(None))?;
            }
            if missing > 0 {
                return Ok(missing);
            }
            let Some(mut sequence) = self.queue.pop(&head) else { break };
            sequence.class = head.class;
            let before = self.bytes();
            self.start(cx, sequence, need.tokens, free - need.growth_bytes)?;
            free = free.saturating_sub(self.bytes() - before + need.growth_bytes);
        }
        Ok(0)
    }

    /// Preempts a running sequence if one should give its place to the request at the head. Returns whether
    /// it did.
    fn preempt<B: Backend>(&mut self, cx: &mut Context<'_, B>, head: &Head) -> Result<bool, Error> {
        let candidate = Candidate { client: &head.client, class: head.class };
        // A score leaves no cache: it would begin anew. And those of a lane run in their order.
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
        cx.counters.preemptions_total += 1;
        self.shares.stop(&sequence.origin.client);
        self.give_up_slot(cx, &sequence, true)?;
        sequence.flush(cx.now);
        sequence.slot = None;
        sequence.computed = 0;
        let origin = &sequence.origin;
        self.queue.push_front(origin.client.clone(), origin.priority, cx.now, sequence);
        Ok(true)
    }

    /// Returns what a sequence needs to begin. It begins in a slot for what it has, or, where there could
    /// never be room for that one and the next, in its last.
    fn need(&self, sequence: &Sequence, kv_bytes_max: u64) -> Need {
        let finally = sequence.tokens_max().min(self.shape.context_length);
        let headroom = (sequence.computed + sequence.pending()).saturating_add(HEADROOM_TOKENS);
        let tokens = headroom.min(finally);
        let growth_bytes = self.growth_bytes(sequence, self.slots.capacity_for(tokens));
        if growth_bytes + self.slots.slot_bytes(tokens) > kv_bytes_max {
            Need { tokens: finally, growth_bytes: self.checkpoint_bytes() }
        } else {
            Need { tokens, growth_bytes }
        }
    }

    /// Makes room for a sequence by freeing what no sequence uses. Returns the bytes that are missing.
    fn make_room<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        free: &mut u64,
        need: Need,
        what: Reclaim,
    ) -> Result<u64, Error> {
        loop {
            let slot = if self.slots.has_free(need.tokens) { 0 } else { self.slots.slot_bytes(need.tokens) };
            let missing = (need.growth_bytes + slot).saturating_sub(*free);
            if missing == 0 {
                return Ok(0);
            }
            let freed = self.give_back(cx, missing, what)?;
            if freed == 0 {
                return Ok(missing);
            }
            *free += freed;
        }
    }

    /// Starts a sequence: allocates a slot of `tokens` and restores the longest cached prefix into it.
    fn start<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        mut sequence: Sequence,
        tokens: u32,
        free_bytes: u64,
    ) -> Result<(), Error> {
        let id = self.sequence_next;
        self.sequence_next += 1;
        let slot = self.take_slot(cx, id, tokens, free_bytes)?;
        sequence.slot = Some(slot);
        let most = sequence.reusable_max();
        let hit = self.parked.find(&sequence.key, &sequence.transcript, most, cx.now);
        let cached = hit.map_or(0, |hit| hit.tokens);
        sequence.checkpoints.clear();
        if let Some(hit) = hit {
            cx.backend.restore(self.id, hit.id, cached, slot)?;
            for checkpoint in self.parked.checkpoints_up_to(hit.id, cached) {
                add_checkpoint(&mut sequence.checkpoints, checkpoint);
            }
        }
        sequence.computed = cached;
        if sequence.start(cached, cx.now) {
            cx.counters.cached_tokens_total += u64::from(cached);
        }
        self.shares.start(&sequence.origin.client);
        self.running.insert(id, sequence);
        Ok(())
    }
}
