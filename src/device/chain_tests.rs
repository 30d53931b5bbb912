//! Parked caches that share segments, on whole models: what is restored goes on as if it had never been away.

use super::backend_tests::{A, B, DRAFT, Device, PROMPT, assert_alike, prompted_in};
use crate::backend::{Backend, Base, KvDtype, ParkedId, Parking, Restoring, SlotId, SpanKind};

const FIRST: ParkedId = ParkedId(0);
const SECOND: ParkedId = ParkedId(1);
const THIRD: ParkedId = ParkedId(2);
/// Tokens of other continuations.
const OTHER: [u32; 4] = [11, 2, 30, 4];

/// Keys and values as they are computed, in 8 bits, and beside recurrent states.
pub(super) fn shapes() -> impl Iterator<Item = (bool, Device)> {
    let shapes = [(false, KvDtype::Compute), (false, KvDtype::Int8), (true, KvDtype::Compute)];
    shapes.into_iter().map(|(recurrent, kv)| (recurrent, prompted_in(recurrent, kv)))
}

impl Device {
    pub(super) fn park(&mut self, id: ParkedId, tokens: u32, base: Option<Base>) {
        self.backend.park(self.model, Parking { id, slot: A, tokens, base }).unwrap();
    }

    /// Goes on in a slot of `used` tokens that still has the first `held` of a cache.
    pub(super) fn resume(&mut self, id: ParkedId, tokens: u32, held: u32, used: u32) {
        self.backend.restore(self.model, Restoring { id, tokens, slot: A, held, used }).unwrap();
    }

    /// Restores a cache into a slab of its own, and runs the other tokens after it.
    pub(super) fn restored(&mut self, id: ParkedId, tokens: u32, slab: u32) -> Vec<(u32, f32)> {
        let slot = SlotId { slab, slot: 1 };
        self.backend.open_slab(self.model, slab, 64, 2).unwrap();
        self.backend.restore(self.model, Restoring { id, tokens, slot, held: 0, used: 0 }).unwrap();
        self.run(slot, tokens, &OTHER, SpanKind::Verify)
    }

    /// Runs tokens from the start, then the other ones.
    pub(super) fn cold(&mut self, tokens: &[u32], slab: u32) -> Vec<(u32, f32)> {
        let slot = SlotId { slab, slot: 0 };
        self.backend.open_slab(self.model, slab, 64, 1).unwrap();
        self.run(slot, 0, tokens, SpanKind::Prefill);
        self.run(slot, u32::try_from(tokens.len()).unwrap(), &OTHER, SpanKind::Verify)
    }
}

#[test]
fn a_cache_of_two_segments_goes_on_as_one_that_was_never_parked() {
    for (_, mut device) in shapes() {
        let long = [&PROMPT[..], &DRAFT].concat();
        let (wanted, of_prompt) = (device.cold(&long, 5), device.cold(&PROMPT, 6));
        device.park(FIRST, 9, None);
        device.resume(FIRST, 9, 9, 9);
        device.run(A, 9, &DRAFT, SpanKind::Verify);
        device.park(SECOND, 14, Some(Base { id: FIRST, tokens: 9 }));
        device.backend.drop_parked(device.model, FIRST).unwrap();
        assert_alike(&device.restored(SECOND, 14, 1), &wanted);
        assert_alike(&device.restored(SECOND, 9, 2), &of_prompt);
        // All of it is shared, and nothing is copied.
        device.resume(SECOND, 9, 14, 14);
        device.park(THIRD, 9, Some(Base { id: SECOND, tokens: 9 }));
        device.backend.drop_parked(device.model, SECOND).unwrap();
        assert_alike(&device.restored(THIRD, 9, 3), &of_prompt);
    }
}

#[test]
fn a_segment_that_is_cut_in_two_is_restored_as_it_was() {
    for (recurrent, mut device) in shapes() {
        let wanted = device.cold(&PROMPT, 5);
        device.park(FIRST, 9, None);
        let at = Base { id: FIRST, tokens: 6 };
        device.backend.split_parked(device.model, at).unwrap();
        assert_alike(&device.restored(FIRST, 9, 1), &wanted);
        if recurrent {
            continue;
        }
        // Another cache parts from the first one there.
        let other = [&PROMPT[..6], &DRAFT].concat();
        let wanted = device.cold(&other, 6);
        device.backend.truncate(device.model, A, 9, 6).unwrap();
        device.run(A, 6, &DRAFT, SpanKind::Verify);
        device.park(SECOND, 11, Some(at));
        device.backend.drop_parked(device.model, FIRST).unwrap();
        assert_alike(&device.restored(SECOND, 11, 2), &wanted);
    }
}

#[test]
fn a_slab_becomes_the_end_of_a_chain() {
    for (_, mut device) in shapes() {
        let wanted = device.cold(&[&PROMPT[..], &DRAFT].concat(), 5);
        device.park(FIRST, 9, None);
        device.run(A, 9, &DRAFT, SpanKind::Verify);
        device.backend.clear_slot(device.model, B, 9).unwrap();
        let base = Some(Base { id: FIRST, tokens: 9 });
        device.backend.park_slab(device.model, Parking { id: SECOND, slot: A, tokens: 14, base }).unwrap();
        assert_alike(&device.restored(SECOND, 14, 1), &wanted);
    }
}

#[test]
fn a_slot_that_still_has_a_cache_goes_on_with_it() {
    for (_, mut device) in shapes() {
        let long = [&PROMPT[..], &DRAFT].concat();
        let (wanted, of_prompt) = (device.cold(&long, 5), device.cold(&PROMPT, 6));
        device.run(A, 9, &DRAFT, SpanKind::Verify);
        device.park(FIRST, 14, None);
        let mut again = |tokens, held, used| {
            device.resume(FIRST, tokens, held, used);
            device.run(A, tokens, &OTHER, SpanKind::Verify)
        };
        assert_alike(&again(14, 14, 14), &wanted);
        // Cut back, which needs a checkpoint where states are recurrent; then with the end copied.
        assert_alike(&again(9, 14, 18), &of_prompt);
        assert_alike(&again(14, 9, 13), &wanted);
        // What somebody else left is overwritten, and the rest of it is cleared.
        assert_alike(&again(9, 0, 18), &of_prompt);
    }
}
