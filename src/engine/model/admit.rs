//! Admission: a waiting request gets a slot and the promise of all the bytes it may come to need, or stays in
//! the queue. Room is made by evicting what no sequence uses; a place by preempting a sequence, which is
//! parked, waits, and continues where it was.
//!
//! Without preemption, the next request of a client that keeps one outstanding would wait until somebody
//! else's finishes, because its own place was given away the moment it was free.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Context, Reclaim, Resident, Room};
use crate::backend::{Backend, add_checkpoint};
use crate::cache::Hit;
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::sched::{Blocked, Candidate, Passer, Running, Ticket, Wanted, victim};

/// Tokens of room that a new sequence's slot has beyond its prompt, so that short answers need no move.
const HEADROOM_TOKENS: u32 = 64;

/// Time after which the device is asked again for what a sequence that has begun needs.
const DENIED_RETRY: Duration = Duration::from_secs(1);

/// What a sequence needs to begin.
#[derive(Clone, Copy)]
struct Need {
    /// Tokens of its first slot.
    tokens: u32,
    /// Bytes that it may grow by.
    growth_bytes: u64,
}

/// What became of a request that was considered.
enum Verdict {
    /// It started, or was refused.
    Done,
    /// It cannot start now; another may.
    Held,
    /// Nothing else can start in this tick: all places are taken, or these bytes are to be freed elsewhere.
    Stop(u64),
}

impl Resident {
    /// Starts waiting requests as far as there is room. One that could not even run alone is refused; one
    /// that waits for memory lets others pass, see [`Blocked`]. Returns the bytes that other models are to
    /// free.
    pub(crate) fn admit<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        mut room: Room,
    ) -> Result<u64, Error> {
        while let Some(head) = self.queue.head(&self.shares, cx.now, cx.settings.priority_ageing) {
            let verdict = match self.consider(cx, &head, &mut room)? {
                Verdict::Held => self.consider_others(cx, &head, &mut room)?,
                verdict => verdict,
            };
            match verdict {
                Verdict::Done => {}
                Verdict::Held => break,
                Verdict::Stop(missing) => return Ok(missing),
            }
        }
        Ok(0)
    }

    /// Considers those behind the head, until one starts.
    fn consider_others<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        head: &Ticket,
        room: &mut Room,
    ) -> Result<Verdict, Error> {
        for ticket in self.queue.order(&self.shares, cx.now, cx.settings.priority_ageing) {
            if ticket.is(head) {
                continue;
            }
            match self.consider(cx, &ticket, room)? {
                Verdict::Held => {}
                verdict => return Ok(verdict),
            }
        }
        Ok(Verdict::Held)
    }

    /// Starts a request if there is room for it and it may pass the blocked one.
    fn consider<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        ticket: &Ticket,
        room: &mut Room,
    ) -> Result<Verdict, Error> {
        let Some(waiting) = self.queue.peek(ticket) else { return Ok(Verdict::Held) };
        let has_begun = waiting.has_begun();
        if has_begun && self.denied_until.is_some_and(|until| cx.now < until) {
            return Ok(Verdict::Held);
        }
        let need = self.need(waiting, room.kv_bytes_now);
        let needed_bytes = need.growth_bytes + self.slots.slot_bytes(need.tokens);
        if needed_bytes > room.kv_bytes_max && !has_begun {
            let error = Error::KvTooLarge { needed_bytes, available_bytes: room.kv_bytes_max };
            self.refuse(cx, ticket, &error);
            return Ok(Verdict::Done);
        }
        let has_place = self.running() < cx.settings.running_sequences_max;
        let victim = if has_place { None } else { self.victim(ticket) };
        if !has_place && victim.is_none() {
            return Ok(Verdict::Stop(0));
        }
        let missing_bytes = self.missing(need, victim);
        let waits_for_models = needed_bytes > room.kv_bytes_now;
        let is_owed = has_begun && waits_for_models;
        let wanted = Wanted {
            needed_bytes,
            missing_bytes,
            kv_bytes_max: room.kv_bytes_max,
            weight_bytes: if room.is_pinned { 0 } else { self.shape.weight_bytes },
            waits_for_models,
            is_owed,
        };
        // What was promised is kept, though the budget has become too small for it, once nothing else runs.
        let is_first = cx.blocked.as_ref().is_some_and(|blocked| self.is_blocked(blocked, ticket));
        let is_owed = is_owed && is_first && room.is_quiet && self.running.is_empty();
        if waits_for_models && !is_owed {
            return Ok(self.wait_for_models(cx, ticket, wanted, *room));
        }
        let reclaimable = room.free_bytes + self.reclaimable_bytes() + room.elsewhere_bytes;
        if missing_bytes > reclaimable && !is_owed {
            self.note_blocked(cx, ticket, wanted);
            return Ok(Verdict::Held);
        }
        let Some(spare_bytes) = self.may_pass(cx, ticket, need, *room) else { return Ok(Verdict::Held) };
        if let Some(victim) = victim {
            self.preempt(cx, victim, room)?;
        }
        let missing = self.free_for(cx, ticket, need, room)?;
        if missing > room.elsewhere_bytes && victim.is_none() && !is_owed {
            // Of what was open for it, an empty slab may have been closed.
            self.note_blocked(cx, ticket, Wanted { missing_bytes: self.missing(need, None), ..wanted });
            return Ok(Verdict::Held);
        }
        if missing > 0 && !(is_owed && room.elsewhere_bytes == 0) {
            return Ok(Verdict::Stop(missing));
        }
        let Some(mut sequence) = self.take(cx, ticket) else { return Ok(Verdict::Held) };
        (sequence.class, sequence.since) = (ticket.class, ticket.since);
        let before = self.bytes();
        let spare_bytes = spare_bytes.min(room.free_bytes.saturating_sub(need.growth_bytes));
        match self.start(cx, sequence, need.tokens, spare_bytes)? {
            Ok(()) => {
                let taken = self.bytes() - before + need.growth_bytes;
                room.free_bytes = room.free_bytes.saturating_sub(taken);
                Ok(Verdict::Done)
            }
            Err((sequence, error)) => self.denied(cx, (sequence, error), need, room),
        }
    }

    /// Decides on a sequence for whose slot the device has no memory: what is only cached goes for it.
    /// Without that it is refused, or waits if it has begun.
    fn denied<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        (sequence, error): (Sequence, Error),
        need: Need,
        room: &mut Room,
    ) -> Result<Verdict, Error> {
        if self.reclaimable_bytes() + room.elsewhere_bytes == 0 && !sequence.has_begun() {
            self.leave(cx, sequence, Err(error));
            return Ok(Verdict::Done);
        }
        let origin = &sequence.origin;
        self.queue.push_front(origin.owner.clone(), origin.priority, sequence.since, sequence);
        let needed_bytes = self.slots.slot_bytes(need.tokens);
        let freed = self.give_back(cx, needed_bytes, Reclaim::AllBut(None))?;
        room.free_bytes += freed;
        if freed > 0 {
            return Ok(Verdict::Done);
        }
        if room.elsewhere_bytes > 0 {
            return Ok(Verdict::Stop(needed_bytes));
        }
        self.denied_until = Some(cx.now.after(DENIED_RETRY));
        Ok(Verdict::Held)
    }

    /// Lets a request wait for models in use to leave. It is refused if another one waits that has more
    /// right, and neither could start while the models of all that wait stay.
    fn wait_for_models<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        ticket: &Ticket,
        wanted: Wanted,
        room: Room,
    ) -> Verdict {
        self.note_blocked(cx, ticket, wanted);
        let model = self.spec.model();
        let other =
            cx.blocked.as_mut().filter(|other| other.wanted.waits_for_models && other.model != *model);
        let Some(other) = other else { return Verdict::Held };
        if other.lets_wait(model, wanted) {
            return Verdict::Held;
        }
        let (needed_bytes, in_the_way) = (wanted.needed_bytes, vec![other.model.clone()]);
        let error = Error::KvCrowded { needed_bytes, available_bytes: room.kv_bytes_now, in_the_way };
        self.refuse(cx, ticket, &error);
        Verdict::Done
    }

    /// Ends a waiting request with an error.
    pub(crate) fn refuse<B: Backend>(&mut self, cx: &mut Context<'_, B>, ticket: &Ticket, error: &Error) {
        if let Some(refused) = self.take(cx, ticket) {
            self.leave(cx, refused, Err(error.clone()));
        }
    }

    /// Returns whether a request should rather compute anew what `hit` has than wait for more memory: it has
    /// waited for as long as that takes, or nobody is left to wait for.
    fn has_waited_out<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        ticket: &Ticket,
        hit: Option<Hit>,
        room: Room,
    ) -> bool {
        let worth = hit.and_then(|hit| self.pace.prefill(hit.tokens, true)).unwrap_or_default();
        let blocked = cx.blocked.as_ref().filter(|blocked| self.is_blocked(blocked, ticket));
        let none_left =
            |blocked: &Blocked| room.claims.and(self.claims(blocked.passed_from)).tokens_left == 0;
        self.running.is_empty() || cx.now - ticket.since >= worth || blocked.is_some_and(none_left)
    }

    /// Frees what a request needs: empty slabs of all models first, then parked caches, if possible without
    /// the one that it would start from. Returns the bytes that are missing.
    fn free_for<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        ticket: &Ticket,
        need: Need,
        room: &mut Room,
    ) -> Result<u64, Error> {
        let Some(waiting) = self.queue.peek(ticket) else { return Ok(0) };
        let hit = self.parked.find(&waiting.key, &waiting.transcript, waiting.reusable_max(), cx.now);
        let mut missing = self.make_room(cx, &mut room.free_bytes, need, Reclaim::EmptySlabs)?;
        if missing > 0 && room.others_empty_bytes > 0 {
            return Ok(missing.min(room.others_empty_bytes));
        }
        if missing > 0 {
            missing = self.make_room(cx, &mut room.free_bytes, need, Reclaim::AllBut(hit))?;
        }
        if missing > 0 && self.has_waited_out(cx, ticket, hit, *room) {
            missing = self.make_room(cx, &mut room.free_bytes, need, Reclaim::AllBut(None))?;
        }
        Ok(missing)
    }

    /// Takes a request out of the queue. If it was the blocked one, none is.
    fn take<B: Backend>(&mut self, cx: &mut Context<'_, B>, ticket: &Ticket) -> Option<Sequence> {
        cx.blocked.take_if(|blocked| self.is_blocked(blocked, ticket));
        self.queue.pop(ticket)
    }

    fn is_blocked(&self, blocked: &Blocked, ticket: &Ticket) -> bool {
        blocked.model == *self.spec.model() && blocked.ticket.is(ticket)
    }

    /// Notes that a request waits for memory, unless another one does with more right.
    fn note_blocked<B: Backend>(&self, cx: &mut Context<'_, B>, ticket: &Ticket, wanted: Wanted) {
        match cx.blocked {
            // The budget may have changed, and with it where it begins.
            Some(blocked) if self.is_blocked(blocked, ticket) => blocked.wanted = wanted,
            Some(blocked) if !blocked.yields_to(ticket, wanted.is_owed) => {
                if blocked.lets_all_pass() && !wanted.waits_for_models {
                    let missing = || (self.spec.model().clone(), wanted.missing_bytes);
                    blocked.passer.get_or_insert_with(missing);
                }
            }
            Some(_) | None => {
                let (model, passed_from) = (self.spec.model().clone(), *cx.sequence_next);
                let ticket = ticket.clone();
                let (passer, others) = (None, BTreeMap::new());
                *cx.blocked = Some(Blocked { model, ticket, wanted, passed_from, passer, others });
            }
        }
    }

    /// Returns the bytes that a slab opened for a request may take, or None if the request may not pass the
    /// blocked one.
    fn may_pass<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        ticket: &Ticket,
        need: Need,
        room: Room,
    ) -> Option<u64> {
        let Some(blocked) = cx.blocked.as_ref().filter(|blocked| !self.is_blocked(blocked, ticket)) else {
            return Some(u64::MAX);
        };
        let slot_bytes = match self.slots.slab_for(need.tokens) {
            None => self.slots.slot_bytes(need.tokens),
            Some(slab) if self.passed_slabs(blocked.passed_from).contains(&slab) => 0,
            Some(slab) => self.slots.bytes_of(slab),
        };
        let passer = Passer {
            class: ticket.class,
            tokens: self.queue.peek(ticket)?.tokens_max(),
            bytes: need.growth_bytes + slot_bytes,
        };
        let claims = room.claims.and(self.claims(blocked.passed_from));
        let spare_bytes = blocked.spare_bytes(claims, room.kv_bytes_now).saturating_sub(need.growth_bytes);
        blocked.lets_pass(passer, claims, room.kv_bytes_now).then_some(spare_bytes)
    }

    /// Returns the running sequence that should give its place to a waiting request, if any.
    fn victim(&self, ticket: &Ticket) -> Option<u64> {
        let candidate = Candidate { owner: &ticket.owner, class: ticket.class, priority: ticket.own_class() };
        // A score leaves no cache: it would begin anew. And those of a lane run in their order.
        let running = self.running.iter().filter(|(_, sequence)| {
            sequence.leaves_cache() && !ticket.has_lane(&sequence.origin.owner, sequence.origin.priority)
        });
        let running = running.map(|(&id, sequence)| Running {
            sequence: id,
            owner: &sequence.origin.owner,
            class: sequence.class,
            priority: sequence.origin.priority.own_class(),
        });
        victim(&self.shares, candidate, running)
    }

    /// Preempts a running sequence: it is parked, and waits for a place.
    fn preempt<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        id: u64,
        room: &mut Room,
    ) -> Result<(), Error> {
        let limit = room.free_bytes + self.bytes() + self.promised_bytes();
        self.suspend(cx, id)?;
        // Its promise is free again, its parked copy is not.
        room.free_bytes = limit.saturating_sub(self.bytes() + self.promised_bytes());
        Ok(())
    }

    /// Parks a running sequence, and puts it back into the queue.
    pub(super) fn suspend<B: Backend>(&mut self, cx: &mut Context<'_, B>, id: u64) -> Result<(), Error> {
        let Some(mut sequence) = self.running.remove(&id) else { return Ok(()) };
        cx.counters.preemptions_total += 1;
        self.shares.stop(&sequence.origin.owner);
        self.give_up_slot(cx, &sequence, true)?;
        sequence.flush(cx.now);
        sequence.slot = None;
        sequence.computed = 0;
        let origin = &sequence.origin;
        self.queue.push_front(origin.owner.clone(), origin.priority, cx.now, sequence);
        Ok(())
    }

    /// Returns the bytes that a sequence needs beyond what is open, once `victim` has given up its place.
    fn missing(&self, need: Need, victim: Option<u64>) -> u64 {
        let victim = victim.and_then(|id| self.running.get(&id));
        let slot = victim.and_then(|victim| victim.slot);
        let capacity = slot.map_or(0, |slot| self.slots.capacity_of(slot));
        let given_up = victim.map_or(0, |victim| self.growth_bytes(victim, capacity));
        if self.slots.has_free(need.tokens) || capacity == self.slots.capacity_for(need.tokens) {
            return need.growth_bytes.saturating_sub(given_up);
        }
        // A slab that nobody else is in can be closed.
        let neighbours = self
            .running
            .values()
            .filter_map(|other| other.slot)
            .filter(|of| Some(of.slab) == slot.map(|s| s.slab));
        let slab = slot.filter(|_| neighbours.count() == 1).map_or(0, |slot| self.slots.bytes_of(slot.slab));
        (need.growth_bytes + self.slots.slot_bytes(need.tokens)).saturating_sub(given_up + slab)
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
    ///
    /// # Errors
    /// The outer one means that the model is lost; the inner one returns the sequence, for whose slot the
    /// device has no memory.
    fn start<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        mut sequence: Sequence,
        tokens: u32,
        free_bytes: u64,
    ) -> Result<Result<(), (Sequence, Error)>, Error> {
        let id = *cx.sequence_next;
        *cx.sequence_next += 1;
        let most = sequence.reusable_max();
        let hit = self.parked.find(&sequence.key, &sequence.transcript, most, cx.now);
        let slot = match self.take_restored(cx, id, (tokens, free_bytes), hit)? {
            Ok(slot) => slot,
            Err(error) => return Ok(Err((sequence, error))),
        };
        sequence.slot = Some(slot);
        let cached = hit.map_or(0, |hit| hit.tokens);
        sequence.checkpoints.clear();
        if let Some(hit) = hit {
            for checkpoint in self.parked.checkpoints_up_to(hit.id, cached) {
                add_checkpoint(&mut sequence.checkpoints, checkpoint);
            }
        }
        sequence.claim_caches(id);
        sequence.computed = cached;
        if sequence.start(cached, cx.now) {
            cx.counters.cached_tokens_total += u64::from(cached);
        }
        self.shares.start(&sequence.origin.owner);
        self.running.insert(id, sequence);
        Ok(Ok(()))
    }
}
