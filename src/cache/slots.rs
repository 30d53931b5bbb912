//! Which slot of which slab is whose. Slabs come in capacity classes (powers of two tokens); a slab's
//! used slots stay in front, so that a launch over them reads one slice. A slab is never enlarged: a
//! full class opens another one, sized by how many sequences ask.
//!
//! A slot that was parked keeps what it had for a while: a sequence that would restore the same cache takes
//! it over, and for anyone else it is cleared.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::Hit;
use crate::backend::{ParkedId, SlotId};
use crate::clock::Moment;

/// Tokens of the smallest class: below it, slots are too cheap to be worth a class of their own.
const CAPACITY_MIN: u32 = 256;

/// Most slots of one slab: launches per layer stay few, and a sparsely used slab wastes little.
const SLAB_SLOTS_MAX: u32 = 32;

/// Fewest slots of one slab, if memory allows: a second and a third client are likely.
const SLAB_SLOTS_MIN: u32 = 4;

/// Divisor of the free bytes: the part that a slab may take for slots that no sequence waits for.
const SPARE_PART: u64 = 8;

/// One capacity class of a model's KV slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabClass {
    /// Capacity of a slot in tokens.
    pub slot_capacity_tokens: u32,
    /// Number of its slabs.
    pub slabs: u32,
    /// Number of their slots.
    pub slots: u32,
    /// Number of slots that running sequences use.
    pub slots_in_use: u32,
    /// Bytes of all its slabs.
    pub bytes: u64,
}

/// A slot for a sequence, and the slab that has to be opened for it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The place.
    pub slot: SlotId,
    /// Capacity and number of slots of the slab to open; None if it is open.
    pub open: Option<(u32, u32)>,
}

/// What is still in a free slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The parked cache of which it is a copy.
    pub id: ParkedId,
    /// Number of its tokens.
    pub tokens: u32,
    /// Time since when it is there.
    pub since: Moment,
}

#[derive(Clone, Debug)]
struct Slab {
    capacity: u32,
    slots: u32,
    /// The sequences in the slots from the front.
    owners: Vec<u64>,
    /// What is left in free slots.
    leftovers: BTreeMap<u32, Leftover>,
}

/// The slots of one model.
#[derive(Clone, Debug)]
pub struct Slots {
    context_length: u32,
    bytes_per_token: u64,
    state_bytes: u64,
    slabs: BTreeMap<u32, Slab>,
    slab_next: u32,
}

impl Slots {
    /// Returns the slots of a model without slabs, for sequences of up to `context_length` tokens, each with
    /// `state_bytes` besides.
    #[must_use]
    pub fn new(context_length: u32, bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { context_length, bytes_per_token, state_bytes, slabs: BTreeMap::new(), slab_next: 0 }
    }

    /// Returns the capacity of the class that holds `tokens`.
    #[must_use]
    pub fn capacity_for(&self, tokens: u32) -> u32 {
        let class = tokens.max(CAPACITY_MIN).checked_next_power_of_two().unwrap_or(u32::MAX);
        class.min(self.context_length.max(tokens))
    }

    /// Returns the capacity of a slot in tokens; 0 if its slab is not open.
    #[must_use]
    pub fn capacity_of(&self, slot: SlotId) -> u32 {
        self.slabs.get(&slot.slab).map_or(0, |slab| slab.capacity)
    }

    /// Returns the bytes of a slot that holds `tokens`.
    #[must_use]
    pub fn slot_bytes(&self, tokens: u32) -> u64 {
        u64::from(self.capacity_for(tokens)) * self.bytes_per_token + self.state_bytes
    }

    /// Returns the bytes of all open slabs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slabs.values().map(|slab| self.slab_bytes(slab)).sum()
    }

    /// Returns whether a slot for `tokens` is free in an open slab.
    #[must_use]
    pub fn has_free(&self, tokens: u32) -> bool {
        self.slab_for(tokens).is_some()
    }

    /// Returns the open slab that has the next slot for `tokens`; None if one has to be opened.
    #[must_use]
    pub fn slab_for(&self, tokens: u32) -> Option<u32> {
        self.free_slab(self.capacity_for(tokens))
    }

    /// Returns the bytes of a slab; 0 if it is not open.
    #[must_use]
    pub fn bytes_of(&self, slab: u32) -> u64 {
        self.slabs.get(&slab).map_or(0, |slab| self.slab_bytes(slab))
    }

    /// Allocates a slot for `tokens` to `owner`. Without a free one, a slab is to be opened with room for the
    /// `waiting` sequences and at least as many as the class has already, as far as `free_bytes` go.
    pub fn acquire(&mut self, owner: u64, tokens: u32, waiting: u32, free_bytes: u64) -> Grant {
        let capacity = self.capacity_for(tokens);
        if let Some(id) = self.free_slab(capacity) {
            return Grant { slot: self.place(id, owner), open: None };
        }
        let in_class =
            self.slabs.values().filter(|slab| slab.capacity == capacity).map(|slab| slab.slots).sum();
        let affordable =
            |bytes: u64| u32::try_from(bytes / self.slot_bytes(tokens).max(1)).unwrap_or(u32::MAX);
        let wanted = waiting.max(in_class).clamp(SLAB_SLOTS_MIN, SLAB_SLOTS_MAX).next_power_of_two();
        let spare = wanted.min(affordable(free_bytes / SPARE_PART));
        let slots = spare.max(waiting.min(wanted).min(affordable(free_bytes))).max(1);
        let id = self.slab_next;
        self.slab_next += 1;
        self.slabs.insert(id, Slab { capacity, slots, owners: Vec::new(), leftovers: BTreeMap::new() });
        Grant { slot: self.place(id, owner), open: Some((capacity, slots)) }
    }

    /// Notes that the slab of a grant was opened with fewer slots, at least one.
    pub fn shrink(&mut self, slab: u32, slots: u32) {
        if let Some(slab) = self.slabs.get_mut(&slab) {
            slab.slots = slots;
        }
    }

    /// Frees a slot. If that leaves a hole, the returned owner's slot is to be moved into it.
    pub fn release(&mut self, slot: SlotId) -> Option<(u64, SlotId)> {
        let slab = self.slabs.get_mut(&slot.slab)?;
        let place = slot.slot as usize;
        assert!(place < slab.owners.len(), "a slot that nobody holds is released");
        slab.owners.swap_remove(place);
        let from = SlotId { slab: slot.slab, slot: u32::try_from(slab.owners.len()).unwrap_or(u32::MAX) };
        slab.owners.get(place).map(|&moved| (moved, from))
    }

    /// Notes what is left in a slot that was freed.
    pub fn leave(&mut self, slot: SlotId, leftover: Leftover) {
        if let Some(slab) = self.slabs.get_mut(&slot.slab) {
            slab.leftovers.insert(slot.slot, leftover);
        }
    }

    /// Returns what is left in a slot, which is its owner's to clear or to take over.
    pub fn take_leftover(&mut self, slot: SlotId) -> Option<Leftover> {
        self.slabs.get_mut(&slot.slab)?.leftovers.remove(&slot.slot)
    }

    /// Forgets the outdated ones of what is left in free slots; returns the slots to be cleared, and the
    /// number of tokens in each.
    pub fn take_leftovers(&mut self, is_outdated: impl Fn(&Leftover) -> bool) -> Vec<(SlotId, u32)> {
        let slabs = self.slabs.iter_mut();
        let outdated = slabs.flat_map(|(&slab, of)| {
            let leftovers = of.leftovers.extract_if(.., |_, leftover| is_outdated(leftover));
            leftovers.map(move |(slot, leftover)| (SlotId { slab, slot }, leftover.tokens))
        });
        outdated.collect()
    }

    /// Allocates the slot that still has a parked cache, if it is the next of its slab and holds `tokens`.
    /// One that is larger than need be goes to who wants most of what it has: clearing the rest of a long
    /// context for a short beginning of it costs more than a copy of that, and its session would have to copy
    /// it back.
    pub fn take_over(&mut self, owner: u64, tokens: u32, hit: Hit) -> Option<(SlotId, Leftover)> {
        let wanted_capacity = self.capacity_for(tokens);
        let next = |(&slab, of): (&u32, &Slab)| {
            let leftover = of.leftovers.get(&u32::try_from(of.owners.len()).ok()?)?;
            let is_worth_it = of.capacity == wanted_capacity || hit.tokens >= leftover.tokens / 2;
            (leftover.id == hit.id && of.capacity >= tokens && is_worth_it).then_some(slab)
        };
        let slab = self.slabs.iter().find_map(next)?;
        let slot = self.place(slab, owner);
        Some((slot, self.take_leftover(slot)?))
    }

    /// Removes slabs that no sequence uses, small ones first, until `bytes` are freed or none is left.
    /// Returns their numbers.
    pub fn close_empty(&mut self, bytes: u64) -> Vec<u32> {
        let empty = self.slabs.iter().filter(|(_, slab)| slab.owners.is_empty());
        let mut empty: Vec<(u64, u32)> = empty.map(|(&id, slab)| (self.slab_bytes(slab), id)).collect();
        empty.sort_unstable();
        let mut freed = 0;
        let enough = empty.into_iter().take_while(|(size, _)| {
            let more = freed < bytes;
            freed += size;
            more
        });
        let closed: Vec<u32> = enough.map(|(_, id)| id).collect();
        self.slabs.retain(|id, _| !closed.contains(id));
        closed
    }

    /// Returns whether a slot is the only one of its slab that is in use.
    #[must_use]
    pub fn is_alone(&self, slot: SlotId) -> bool {
        self.slabs.get(&slot.slab).is_some_and(|slab| slab.owners.len() == 1)
    }

    /// Returns whether a slot is the last of its slab that is in use.
    #[must_use]
    pub fn is_last(&self, slot: SlotId) -> bool {
        self.slabs.get(&slot.slab).is_some_and(|slab| slab.owners.len() == slot.slot as usize + 1)
    }

    /// Removes a slab, whoever uses it.
    pub fn close(&mut self, slab: u32) {
        self.slabs.remove(&slab);
    }

    /// Returns the bytes of the slabs that no sequence uses.
    #[must_use]
    pub fn empty_bytes(&self) -> u64 {
        self.slabs.values().filter(|slab| slab.owners.is_empty()).map(|slab| self.slab_bytes(slab)).sum()
    }

    /// Returns the classes, smallest first.
    #[must_use]
    pub fn classes(&self) -> Vec<SlabClass> {
        let mut classes: BTreeMap<u32, SlabClass> = BTreeMap::new();
        for slab in self.slabs.values() {
            let class = classes.entry(slab.capacity).or_insert(SlabClass {
                slot_capacity_tokens: slab.capacity,
                slabs: 0,
                slots: 0,
                slots_in_use: 0,
                bytes: 0,
            });
            class.slabs += 1;
            class.slots += slab.slots;
            class.slots_in_use += u32::try_from(slab.owners.len()).unwrap_or(u32::MAX);
            class.bytes += self.slab_bytes(slab);
        }
        classes.into_values().collect()
    }

    fn slab_bytes(&self, slab: &Slab) -> u64 {
        u64::from(slab.slots) * (u64::from(slab.capacity) * self.bytes_per_token + self.state_bytes)
    }

    /// Returns the fullest slab of a class with room, so that others run empty and can be closed; of two, the
    /// one with the fewer leftovers.
    fn free_slab(&self, capacity: u32) -> Option<u32> {
        let with_room = self
            .slabs
            .iter()
            .filter(|(_, slab)| slab.capacity == capacity && slab.owners.len() < slab.slots as usize);
        with_room
            .max_by_key(|(_, slab)| (slab.owners.len(), Reverse(slab.leftovers.len())))
            .map(|(&id, _)| id)
    }

    fn place(&mut self, id: u32, owner: u64) -> SlotId {
        let owners = self.slabs.get_mut(&id).map(|slab| &mut slab.owners);
        let slot = owners.map_or(0, |owners| {
            owners.push(owner);
            owners.len() - 1
        });
        SlotId { slab: id, slot: u32::try_from(slot).unwrap_or(u32::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn used_slots_stay_in_front() {
        let mut slots = Slots::new(8192, 10, 0);
        let a = slots.acquire(1, 10, 4, u64::MAX);
        assert_eq!(a.open, Some((256, 4)));
        let b = slots.acquire(2, 10, 1, u64::MAX);
        let c = slots.acquire(3, 10, 1, u64::MAX);
        assert_eq!((b.open, c.slot.slot), (None, 2));
        assert_eq!(slots.release(a.slot), Some((3, c.slot)));
        assert_eq!(slots.release(b.slot), None);
        assert_eq!(slots.release(a.slot), None);
        assert_eq!(slots.close_empty(u64::MAX), vec![0]);
        assert_eq!(slots.bytes(), 0);
    }

    #[test]
    fn what_is_left_in_a_slot_is_for_whoever_comes_next() {
        let mut slots = Slots::new(8192, 10, 0);
        let [a, b] = [1, 2].map(|owner| slots.acquire(owner, 10, 1, u64::MAX).slot);
        let since = Moment::at(Duration::ZERO);
        let [of_a, of_b] = [ParkedId(7), ParkedId(8)].map(|id| Leftover { id, tokens: 9, since });
        let [hit_a, hit_b] = [of_a, of_b].map(|Leftover { id, tokens, .. }| Hit { id, tokens });
        slots.release(b);
        slots.leave(b, of_b);
        assert_eq!(slots.take_over(3, 10, hit_a), None);
        assert_eq!(slots.take_over(3, 257, hit_b), None, "it would not fit");
        assert_eq!(slots.take_over(3, 10, hit_b), Some((b, of_b)));
        assert_eq!(slots.take_over(4, 10, hit_b), None, "it is taken");
        slots.release(b);
        slots.leave(b, of_b);
        slots.release(a);
        slots.leave(a, of_a);
        assert_eq!(slots.take_over(5, 10, hit_b), None, "those in use stay in front");
        assert_eq!(slots.acquire(5, 10, 1, 0).slot, a);
        assert_eq!(slots.take_leftover(a), Some(of_a));
        slots.release(a);
        assert_eq!(slots.close_empty(1), [0]);
        assert_eq!(slots.take_over(6, 10, hit_b), None);
    }

    #[test]
    fn a_long_contexts_slot_is_not_for_who_shares_a_little_of_it() {
        let mut slots = Slots::new(8192, 10, 0);
        let long = slots.acquire(1, 8000, 1, u64::MAX).slot;
        let of_long = Leftover { id: ParkedId(7), tokens: 8000, since: Moment::at(Duration::ZERO) };
        slots.release(long);
        slots.leave(long, of_long);
        let hit = |tokens| Hit { id: ParkedId(7), tokens };
        assert_eq!(slots.take_over(2, 300, hit(100)), None);
        assert_eq!(slots.take_over(2, 5000, hit(100)), Some((long, of_long)), "it would get as large a one");
        slots.release(long);
        slots.leave(long, of_long);
        assert_eq!(slots.take_over(2, 4096, hit(4000)), Some((long, of_long)), "it wants half of it");
    }

    #[test]
    fn a_full_class_opens_a_slab_as_large_as_itself() {
        let mut slots = Slots::new(8192, 10, 0);
        for owner in 0..4 {
            slots.acquire(owner, 10, 1, u64::MAX);
        }
        assert_eq!(slots.acquire(4, 10, 1, u64::MAX).open, Some((256, 4)));
        for owner in 5..8 {
            slots.acquire(owner, 10, 1, u64::MAX);
        }
        assert_eq!(slots.acquire(8, 10, 1, u64::MAX).open, Some((256, 8)));
    }

    #[test]
    fn a_slab_is_no_larger_than_the_free_bytes() {
        let mut slots = Slots::new(8192, 10, 0);
        assert_eq!(slots.acquire(0, 300, 16, 2 * 512 * 10 + 1).open, Some((512, 2)));
    }

    #[test]
    fn slots_that_no_sequence_waits_for_take_a_small_part_of_the_free_bytes() {
        let mut slots = Slots::new(8192, 10, 0);
        assert_eq!(slots.acquire(0, 8192, 1, 8192 * 10 * 4).open, Some((8192, 1)));
        assert_eq!(slots.acquire(1, 256, 1, 256 * 10 * 8 * 3).open, Some((256, 3)));
    }

    #[test]
    fn no_more_empty_slabs_are_closed_than_needed() {
        let mut slots = Slots::new(8192, 10, 0);
        let grants: Vec<Grant> =
            [1000, 10, 300].into_iter().map(|tokens| slots.acquire(0, tokens, 1, 0)).collect();
        assert!(slots.is_alone(grants[0].slot));
        assert!(grants.iter().all(|grant| slots.release(grant.slot).is_none()));
        assert_eq!(slots.close_empty(2561), vec![1, 2], "256 tokens, then 512");
        assert_eq!(slots.bytes(), 10_240);
        assert_eq!(slots.close_empty(0), Vec::<u32>::new());
    }

    #[test]
    fn the_last_class_ends_at_the_context() {
        let slots = Slots::new(1500, 10, 0);
        assert_eq!(slots.capacity_for(1), 256);
        assert_eq!(slots.capacity_for(1025), 1500);
    }
}
