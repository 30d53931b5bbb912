//! Parked caches: copies of a slot at its exact length, as chains of segments that caches which begin alike
//! share.

use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::transforms::eval;

use super::shape::ArrayShape;
use super::{Checkpoint, Kv, copied, own, write_part};
use crate::backend::{Base, NewChain, ParkedId, Parking, Restoring, SlotId, add_checkpoint};
use crate::mlx::dim;

impl Kv {
    /// Cuts a segment in two. Its parts are there before the whole is freed: so it is whole where the device
    /// has no memory for them.
    pub(crate) fn split_parked(&mut self, at: Base) -> Result<()> {
        self.parked.split(at, |content, tokens| {
            let (mut front, mut back) = (Vec::new(), Vec::new());
            for array in content {
                front.push(own(&array.try_index((.., .., ..dim(tokens), ..))?)?);
                back.push(own(&array.try_index((.., .., dim(tokens).., ..))?)?);
            }
            eval(front.iter().chain(&back))?;
            Ok((front, back))
        })
    }

    /// Copies the tokens of a slot after the base into a new parked cache, which gets its checkpoints.
    pub(crate) fn park(&mut self, parking: Parking) -> Result<()> {
        let Parking { slot, tokens, .. } = parking;
        let positions = parking.shared()..tokens;
        let content = self.read(slot, positions, |array| matches!(array, ArrayShape::PerToken { .. }))?;
        let mut checkpoints = self.checkpoints.remove(&slot).unwrap_or_default();
        if self.has_yet_to_save(&checkpoints, tokens) {
            let states = self.read(slot, 0..0, |array| matches!(array, ArrayShape::PerSequence(_)))?;
            checkpoints.push(Checkpoint { tokens, states });
        }
        self.keep(parking, content, checkpoints);
        Ok(())
    }

    /// Copies the tokens of a slot after the base into a new parked cache, and frees the slot's slab: array
    /// by array, so that not both are ever whole.
    pub(crate) fn park_slab(&mut self, parking: Parking) -> Result<()> {
        let Parking { slot, tokens, .. } = parking;
        let mut checkpoints = self.checkpoints.remove(&slot).unwrap_or_default();
        let (mut content, mut states) = (Vec::new(), Vec::new());
        for (slab, array) in self.slabs.remove(&slot.slab).unwrap_or_default().into_iter().zip(&self.arrays) {
            let part = copied(&slab, array, slot, parking.shared()..tokens)?;
            eval([&part])?;
            match array {
                ArrayShape::PerToken { .. } => content.push(part),
                ArrayShape::PerSequence(_) => states.push(part),
            }
        }
        if self.has_yet_to_save(&checkpoints, tokens) {
            checkpoints.push(Checkpoint { tokens, states });
        }
        self.keep(parking, content, checkpoints);
        Ok(())
    }

    /// Returns whether a sequence of `tokens` has states that none of its checkpoints has.
    fn has_yet_to_save(&self, checkpoints: &[Checkpoint], tokens: u32) -> bool {
        self.shape.is_recurrent() && checkpoints.last().is_none_or(|last| last.tokens < tokens)
    }

    fn keep(&mut self, parking: Parking, tail: Vec<Array>, checkpoints: Vec<Checkpoint>) {
        let Parking { id, tokens, base, .. } = parking;
        let states = checkpoints.into_iter().map(|Checkpoint { tokens, states }| (tokens, states)).collect();
        self.parked.add(id, NewChain { base, tokens, tail, states });
    }

    /// Copies the first tokens of a parked cache into a slot, as far as it does not have them, and writes
    /// zeros over what it has beyond. Where layers are recurrent, there must be a checkpoint.
    pub(crate) fn restore(&mut self, restoring: Restoring) -> Result<()> {
        let Restoring { id, tokens, slot, held, used } = restoring;
        let saved = self.parked.states(id).filter(|(length, _)| *length <= tokens);
        let checkpoints: Vec<Checkpoint> =
            saved.map(|(tokens, states)| Checkpoint { tokens, states: states.clone() }).collect();
        let last = checkpoints.last().filter(|last| last.tokens == tokens);
        if self.shape.is_recurrent() && last.is_none() {
            return Err(Exception::custom("a recurrent state has no checkpoint at this length"));
        }
        let Some(slab) = self.slabs.get_mut(&slot.slab) else { return Ok(()) };
        for (positions, content) in self.parked.content(id, tokens) {
            if held < positions.end {
                let missing = positions.start.max(held)..positions.end;
                restore_segment(slab, &self.arrays, (slot, missing), (positions.start, content))?;
            }
        }
        let states = last.map_or_else(Vec::new, |last| last.states.clone());
        self.reset(slot, tokens..used, &states)?;
        let mut kept = Vec::new();
        checkpoints.into_iter().for_each(|checkpoint| add_checkpoint(&mut kept, checkpoint));
        self.checkpoints.insert(slot, kept);
        Ok(())
    }

    pub(crate) fn drop_parked(&mut self, parked: ParkedId) {
        self.parked.remove(parked);
    }
}

/// Writes tokens of a segment, which begins at `start`, to their positions in a slot.
fn restore_segment(
    slab: &mut [Array],
    arrays: &[ArrayShape],
    (slot, positions): (SlotId, Range<u32>),
    (start, content): (u32, &[Array]),
) -> Result<()> {
    let per_token = |(_, array): &(_, &ArrayShape)| matches!(array, ArrayShape::PerToken { .. });
    let wanted = dim(positions.start - start)..dim(positions.end - start);
    for ((slab, array), content) in slab.iter_mut().zip(arrays).filter(per_token).zip(content) {
        let part = content.try_index((.., .., wanted.clone(), ..))?;
        write_part(slab, array, slot, positions.clone(), &part)?;
    }
    Ok(())
}
