//! Where a model's KV caches are: sequences get slots, outgrow them and give them up; what they computed is
//! parked; and what no sequence uses is evicted.

use std::sync::Arc;
use std::time::Duration;

use super::{Context, Reclaim, Resident};
use crate::backend::{Backend, Base, ParkedId, Parking, Restoring, SlotId};
use crate::cache::{CacheEntry, CacheKey, Cut, Hit, Leftover, Rank, Transcript};
use crate::clock::Moment;
use crate::engine::api::{CachedAsk, CachedKv};
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::ids::SessionKey;

/// Time that a free slot keeps what it has for whoever continues it: tools and scripts answer sooner. Who
/// gets the slot before has to wait until it is cleared.
const LEFTOVER_TIME: Duration = Duration::from_secs(5);

impl Resident {
    /// Allocates a slot of `tokens` for a sequence, and opens a slab for it if none has one.
    ///
    /// # Errors
    /// The device's, which has no memory for it.
    pub(super) fn take_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        owner: u64,
        tokens: u32,
        free_bytes: u64,
    ) -> Result<SlotId, Error> {
        let grant = self.slots.acquire(owner, tokens, self.queued() + 1, free_bytes);
        let Some((capacity, slots)) = grant.open else { return Ok(grant.slot) };
        let slab = grant.slot.slab;
        // Without the slots that nobody has asked for, it may fit.
        let mut open = |slots| {
            cx.backend
                .open_slab(self.id, slab, capacity, slots)
                .map(|()| slots)
                .inspect_err(|error| tracing::warn!(%error, capacity, slots, "a KV slab was not opened"))
        };
        match open(slots).or_else(|error| if slots > 1 { open(1) } else { Err(error) }) {
            Ok(slots) => {
                self.slots.shrink(slab, slots);
                Ok(grant.slot)
            }
            Err(error) => {
                self.slots.close(slab);
                Err(error)
            }
        }
    }

    /// Allocates a slot of `tokens` for a sequence that starts with a cache, and restores it; one that still
    /// has it is taken over, unless a request waits for memory.
    ///
    /// # Errors
    /// The outer one means that the model is lost, the inner one that the device has no memory for it.
    pub(super) fn take_restored<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        owner: u64,
        (tokens, free_bytes): (u32, u64),
        hit: Option<Hit>,
    ) -> Result<Result<SlotId, Error>, Error> {
        // A larger slot than it needs, held for longer, may be what that request waits for.
        let free = hit.filter(|_| cx.blocked.is_none());
        if let Some(hit) = free
            && let Some((slot, Leftover { id, tokens: held, since: _ })) =
                self.slots.take_over(owner, tokens, hit)
        {
            cx.backend.restore(self.id, Restoring { id, tokens: hit.tokens, slot, held, used: held })?;
            return Ok(Ok(slot));
        }
        let slot = match self.take_slot(cx, owner, tokens, free_bytes) {
            Ok(slot) => slot,
            Err(error) => return Ok(Err(error)),
        };
        let Some(Hit { id, tokens }) = hit else {
            self.clear_leftover(cx, slot)?;
            return Ok(Ok(slot));
        };
        let used = self.slots.take_leftover(slot).map_or(0, |leftover| leftover.tokens);
        cx.backend.restore(self.id, Restoring { id, tokens, slot, held: 0, used })?;
        Ok(Ok(slot))
    }

    /// Clears a slot of what its last owner left in it.
    fn clear_leftover<B: Backend>(&mut self, cx: &mut Context<'_, B>, slot: SlotId) -> Result<(), Error> {
        let leftover = self.slots.take_leftover(slot);
        leftover.map_or(Ok(()), |leftover| cx.backend.clear_slot(self.id, slot, leftover.tokens))
    }

    /// Clears free slots of what is left in them, where the parked cache is gone or nobody has continued it
    /// for a while: so it does not outlast a deleted session, and the slot's next owner need not wait for it.
    pub(crate) fn clear_leftovers<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let (parked, now) = (&self.parked, cx.now);
        let is_outdated =
            |leftover: &Leftover| !parked.holds(leftover.id) || leftover.since.after(LEFTOVER_TIME) <= now;
        let outdated = self.slots.take_leftovers(is_outdated);
        outdated.into_iter().try_for_each(|(slot, tokens)| cx.backend.clear_slot(self.id, slot, tokens))
    }

    /// Moves a sequence to the slot that was promised when it was admitted, if its next span does not fit the
    /// one it has. Returns false if the device has no memory for it.
    pub(super) fn grow<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        id: u64,
        tokens: u32,
    ) -> Result<bool, Error> {
        let Some(sequence) = self.running.get(&id) else { return Ok(true) };
        let (Some(from), computed) = (sequence.slot, sequence.computed) else { return Ok(true) };
        let needed = computed + tokens;
        if self.slots.capacity_of(from) >= needed {
            return Ok(true);
        }
        let finally = sequence.tokens_max().min(self.shape.context_length).max(needed);
        let mut to = self.take_slot(cx, id, finally, 0);
        if to.is_err() && self.give_back(cx, self.slots.slot_bytes(finally), Reclaim::AllBut(None))? > 0 {
            to = self.take_slot(cx, id, finally, 0);
        }
        let Ok(to) = to else { return Ok(false) };
        self.clear_leftover(cx, to)?;
        cx.backend.copy_slot(self.id, from, to, computed)?;
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.slot = Some(to);
        }
        self.free_slot(cx, from, computed)?;
        Ok(true)
    }

    /// Frees a sequence's slot. What it computed is parked first, unless it is not to be
    /// kept, another parked cache covers it, or there is no room for it.
    pub(super) fn give_up_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        sequence: &Sequence,
        keep: bool,
    ) -> Result<(), Error> {
        let (Some(slot), computed) = (sequence.slot, sequence.computed) else { return Ok(()) };
        let number = self.parked.number();
        let Some(cache) = self.to_park(sequence, number, cx.now).filter(|_| keep) else {
            return self.free_slot(cx, slot, computed);
        };
        let parking = Parking { id: cache.id, slot, tokens: computed, base: None };
        if let Some(parking) = self.make_room_beside(cx, (parking, true), &cache)? {
            if let Err(error) = cx.backend.park(self.id, parking) {
                // The next turn computes anew.
                tracing::warn!(%error, tokens = computed, "a KV cache was not parked");
                return self.free_slot(cx, slot, computed);
            }
            let leftover = Leftover { id: cache.id, tokens: computed, since: cx.now };
            self.keep_parked(cx, cache, parking.base)?;
            return self.leave_slot(cx, slot, leftover);
        }
        if !self.slots.is_alone(slot) {
            return self.free_slot(cx, slot, computed);
        }
        let base = self.parked.cut(&cache, false).map(|cut| cut.base);
        let parked = cx.backend.park_slab(self.id, Parking { base, ..parking });
        self.slots.close(slot.slab);
        if let Err(error) = parked {
            tracing::warn!(%error, tokens = computed, "a slab did not become a KV cache");
            return cx.backend.close_slab(self.id, slot.slab);
        }
        self.keep_parked(cx, cache, base)
    }

    /// Returns the cache that a sequence would leave; None if it leaves none, or another one covers it.
    fn to_park(&self, sequence: &Sequence, id: ParkedId, now: Moment) -> Option<CacheEntry> {
        let Sequence { key, transcript, computed, .. } = sequence;
        let checkpoints = (self.shape.state_bytes > 0).then(|| sequence.all_checkpoints());
        let covered = self.parked.covers(key, transcript, *computed, checkpoints.as_deref());
        if !sequence.leaves_cache() || *computed == 0 || covered {
            return None;
        }
        Some(CacheEntry {
            id,
            key: key.clone(),
            session: sequence.origin.session.clone(),
            rank: sequence.origin.rank(),
            transcript: transcript.first(*computed as usize),
            checkpoints,
            used: now,
        })
    }

    /// Parks what a running sequence has computed, for others that go on from there; it keeps its slot. Where
    /// there is no room for that, they compute it again.
    pub(super) fn share<B: Backend>(&mut self, cx: &mut Context<'_, B>, id: u64) -> Result<(), Error> {
        let number = self.parked.number();
        let Some(sequence) = self.running.get(&id) else { return Ok(()) };
        let (Some(slot), tokens) = (sequence.slot, sequence.computed) else { return Ok(()) };
        let Some(cache) = self.to_park(sequence, number, cx.now) else { return Ok(()) };
        let parking = Parking { id: number, slot, tokens, base: None };
        let Some(parking) = self.make_room_beside(cx, (parking, false), &cache)? else { return Ok(()) };
        if let Err(error) = cx.backend.park(self.id, parking) {
            tracing::warn!(%error, tokens, "a prompt was not parked");
            return Ok(());
        }
        // Its checkpoints went with the cache.
        self.running.get_mut(&id).into_iter().for_each(|sequence| sequence.checkpoints.clear());
        self.keep_parked(cx, cache, parking.base)
    }

    /// Takes in a cache that was parked; drops those that it makes redundant, and those beyond the limit.
    fn keep_parked<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        cache: CacheEntry,
        base: Option<Base>,
    ) -> Result<(), Error> {
        let redundant = self.parked.insert(cache, base);
        self.drop_parked(cx, redundant.into_iter())?;
        let extra = self.parked.keep(cx.settings.kv_idle_caches_max);
        self.drop_evicted(cx, &extra)
    }

    /// Decides what a cache shares, and makes room for the rest of it beside the slot that it is copied from:
    /// empty slabs are closed first, then caches go in the order of their eviction. The one that it shares
    /// goes last: the slot has its tokens as well. Returns None if there is no room, or if the slot's slab
    /// has no other use and may become the cache instead.
    fn make_room_beside<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        (parking, may_take_slab): (Parking, bool),
        cache: &CacheEntry,
    ) -> Result<Option<Parking>, Error> {
        let mut may_split = true;
        loop {
            let cut = self.parked.cut(cache, may_split);
            let base = cut.map(|cut| cut.base);
            let bytes_max = cx.bytes_max;
            let missing = |model: &Self, bytes: u64| {
                (model.bytes() + model.promised_bytes() + bytes).saturating_sub(bytes_max)
            };
            let added = self.parked.bytes_added(cache, base);
            self.close_empty(cx, missing(self, added))?;
            let short = missing(self, added);
            if short > 0 {
                let alone = self.parked.bytes_added(cache, None);
                let has_room = missing(self, alone) <= self.parked.bytes();
                if may_take_slab && self.slots.is_alone(parking.slot) || !has_room {
                    return Ok(None);
                }
                // Another one may have most of its tokens then, or a state to be shared is gone.
                self.evict_beside(cx, short, base)?;
                continue;
            }
            let parking = Parking { base, ..parking };
            let Some(Cut { copied_tokens: copied @ 1.., base }) = cut else { return Ok(Some(parking)) };
            // Nothing is evicted for a copy that is there for a moment.
            let copied = u64::from(copied) * self.shape.kv_bytes_per_token;
            if missing(self, copied) == 0 && self.split(cx, base) {
                return Ok(Some(parking));
            }
            may_split = false;
        }
    }

    /// Evicts parked caches of at least `bytes`, or all but the base; that one if it is the last.
    fn evict_beside<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        base: Option<Base>,
    ) -> Result<(), Error> {
        let mut evicted = self.parked.evict(bytes, base.map(|base| base.id));
        if evicted.is_empty() {
            evicted = self.parked.evict(bytes, None);
        }
        self.drop_parked(cx, evicted.into_iter())
    }

    /// Cuts a segment in two. Returns false if the device did not: then it is as it was.
    pub(super) fn split<B: Backend>(&mut self, cx: &mut Context<'_, B>, at: Base) -> bool {
        if let Err(error) = cx.backend.split_parked(self.id, at) {
            tracing::warn!(%error, tokens = at.tokens, "a KV cache shares less than it could");
            return false;
        }
        self.parked.split(at);
        true
    }

    /// Frees a slot that was parked. It keeps what it has until its next owner comes, unless the slab's last
    /// used one moves into it.
    fn leave_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        slot: SlotId,
        leftover: Leftover,
    ) -> Result<(), Error> {
        if !self.slots.is_last(slot) {
            return self.free_slot(cx, slot, leftover.tokens);
        }
        self.slots.release(slot);
        self.slots.leave(slot, leftover);
        Ok(())
    }

    /// Clears and frees a slot; the slab's last used one moves into the hole.
    fn free_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        slot: SlotId,
        used: u32,
    ) -> Result<(), Error> {
        cx.backend.clear_slot(self.id, slot, used)?;
        let Some((owner, from)) = self.slots.release(slot) else { return Ok(()) };
        let Some(moved) = self.running.get_mut(&owner) else { return Ok(()) };
        moved.slot = Some(slot);
        if moved.computed > 0 {
            cx.backend.copy_slot(self.id, from, slot, moved.computed)?;
            cx.backend.clear_slot(self.id, from, moved.computed)?;
        }
        Ok(())
    }

    /// Frees at least `bytes` if they are reclaimable: empty slabs first, which cost nothing to make again,
    /// then parked caches in the order of their eviction. Returns the bytes that were freed.
    pub(super) fn give_back<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        what: Reclaim,
    ) -> Result<u64, Error> {
        let before = self.bytes();
        self.close_empty(cx, bytes)?;
        if let Reclaim::AllBut(spared) = what {
            let missing = bytes.saturating_sub(before - self.bytes());
            self.evict(cx, missing, spared)?;
        }
        Ok(before - self.bytes())
    }

    /// Evicts parked caches of at least `bytes`, or all of them, except the spared one.
    pub(crate) fn evict<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        spared: Option<Hit>,
    ) -> Result<(), Error> {
        let evicted = self.parked.evict(bytes, spared.map(|hit| hit.id));
        self.drop_parked(cx, evicted.into_iter())
    }

    /// Frees slabs that no sequence uses, of at least `bytes`, or all of them.
    pub(crate) fn close_empty<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
    ) -> Result<(), Error> {
        let closed = self.slots.close_empty(bytes);
        closed.into_iter().try_for_each(|slab| cx.backend.close_slab(self.id, slab))
    }

    /// Returns how much of some tokens is cached.
    pub(crate) fn cached(&self, asked: &CachedAsk) -> CachedKv {
        let CachedAsk { model: _, owner, salt, tokens } = asked;
        let key = CacheKey { owner: owner.clone(), salt: *salt };
        let transcript = Transcript::new(Arc::clone(tokens).into());
        let tokens = self.parked.longest(&key, &transcript, u32::MAX);
        // Where states cannot be cut back, the last ones are restored with them.
        let states = if tokens > 0 { self.shape.state_bytes } else { 0 };
        CachedKv { tokens, bytes: u64::from(tokens) * self.shape.kv_bytes_per_token + states }
    }

    /// Notes whether a session is pinned: its caches, and what its turn leaves, are evicted last then.
    pub(crate) fn pin_session(&mut self, session: &SessionKey, pinned: bool) {
        for sequence in self.running.values_mut().chain(self.queue.values_mut()) {
            if sequence.origin.session.as_ref() == Some(session) {
                sequence.origin.pinned = pinned;
            }
        }
        self.parked.set_rank(session, if pinned { Rank::Pinned } else { Rank::Session });
    }

    /// Drops the caches of a session that is gone.
    pub(crate) fn forget<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        session: &SessionKey,
    ) -> Result<(), Error> {
        let gone = self.parked.forget(session);
        self.drop_parked(cx, gone.into_iter())
    }

    /// Drops what a sequence that ends left for itself when it was preempted.
    pub(super) fn forget_own<B: Backend>(&mut self, cx: &mut Context<'_, B>, sequence: &Sequence) {
        let own = self.parked.forget_key(&sequence.key);
        if let Err(error) = self.drop_parked(cx, own.into_iter()) {
            tracing::warn!(%error, "a KV cache was not dropped");
        }
    }

    pub(super) fn drop_parked<B: Backend>(
        &self,
        cx: &mut Context<'_, B>,
        mut gone: impl Iterator<Item = ParkedId>,
    ) -> Result<(), Error> {
        gone.try_for_each(|parked| cx.backend.drop_parked(self.id, parked))
    }
}
