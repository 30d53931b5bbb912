//! Where a model's KV caches are: sequences get slots, outgrow them and give them up; what they computed is
//! parked; and what no sequence uses is evicted.

use super::{Context, Resident};
use crate::backend::{Backend, SlotId};
use crate::cache::{CacheEntry, Hit};
use crate::engine::task::Sequence;
use crate::error::Error;
use crate::ids::SessionKey;

impl Resident {
    /// Allocates a slot of `tokens` for a sequence, and opens a slab for it if none has one.
    pub(super) fn take_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        owner: u64,
        tokens: u32,
        free_bytes: u64,
    ) -> Result<SlotId, Error> {
        let grant = self.slots.acquire(owner, tokens, self.queued() + 1, free_bytes);
        if let Some((capacity, slots)) = grant.open {
            cx.backend.open_slab(self.id, grant.slot.slab, capacity, slots)?;
        }
        Ok(grant.slot)
    }

    /// Moves a sequence to the slot that was promised when it was admitted, if its next span does not fit the
    /// one it has.
    pub(super) fn grow<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        id: u64,
        tokens: u32,
    ) -> Result<(), Error> {
        let Some(sequence) = self.running.get(&id) else { return Ok(()) };
        let (Some(from), computed) = (sequence.slot, sequence.computed) else { return Ok(()) };
        let needed = computed + tokens;
        if self.slots.capacity_of(from) >= needed {
            return Ok(());
        }
        let finally = sequence.tokens_max().min(self.shape.context_length).max(needed);
        let to = self.take_slot(cx, id, finally, 0)?;
        cx.backend.copy_slot(self.id, from, to, computed)?;
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.slot = Some(to);
        }
        self.free_slot(cx, from, computed)
    }

    /// Frees a sequence's slot. What it computed is parked first, unless it is not `sound` or another parked
    /// cache covers it.
    pub(super) fn give_up_slot<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        sequence: &Sequence,
        sound: bool,
    ) -> Result<(), Error> {
        let Some(slot) = sequence.slot else { return Ok(()) };
        let Sequence { key, transcript, computed, .. } = sequence;
        let checkpoints = (self.shape.state_bytes > 0).then(|| sequence.all_checkpoints());
        let covered = self.parked.covers(key, transcript, *computed, checkpoints.as_deref());
        if sound && sequence.leaves_cache() && *computed > 0 && !covered {
            let parked = cx.backend.park(self.id, slot, *computed)?;
            let cache = CacheEntry {
                id: parked,
                key: key.clone(),
                session: sequence.origin.session.clone(),
                transcript: transcript.first(*computed as usize),
                tokens: *computed,
                checkpoints,
                used: cx.now,
            };
            for redundant in self.parked.insert(cache) {
                cx.backend.drop_parked(self.id, redundant)?;
            }
        }
        self.free_slot(cx, slot, *computed)
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

    /// Frees at least `bytes` if they are reclaimable: parked caches first, the least recently used before
    /// others, then empty slabs. Returns the bytes that were freed.
    pub(crate) fn give_back<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        spared: Option<Hit>,
    ) -> Result<u64, Error> {
        let before = self.bytes();
        self.evict(cx, bytes, spared)?;
        if before - self.bytes() < bytes {
            self.close_empty(cx)?;
        }
        Ok(before - self.bytes())
    }

    /// Evicts parked caches of at least `bytes`, or all of them, except the spared one.
    pub(super) fn evict<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        spared: Option<Hit>,
    ) -> Result<(), Error> {
        let evicted = self.parked.evict(bytes, spared.map(|hit| hit.id));
        evicted.into_iter().try_for_each(|parked| cx.backend.drop_parked(self.id, parked))
    }

    /// Frees the slabs that no sequence uses.
    pub(crate) fn close_empty<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        self.slots.close_empty().into_iter().try_for_each(|slab| cx.backend.close_slab(self.id, slab))
    }

    /// Drops the caches of a session that is gone.
    pub(crate) fn forget<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        session: &SessionKey,
    ) -> Result<(), Error> {
        let gone = self.parked.forget(session);
        gone.into_iter().try_for_each(|parked| cx.backend.drop_parked(self.id, parked))
    }
}
