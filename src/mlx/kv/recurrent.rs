//! States that each token changes. A layer gets the tokens of a step by sequence, with the states before them, and
//! gives back the states after them.

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use mlx_rs::ops;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};

use super::Kv;
use crate::mlx::batch::{Batch, Group};

/// Tokens of sequences that have as many of them each, and the states before them.
pub(crate) struct RecurrentInput<'a> {
    /// `[sequences, tokens, numbers]`.
    pub(crate) inputs: &'a Array,
    /// `[sequences, ..]` each.
    pub(crate) states: Vec<Array>,
}

impl Kv {
    /// Runs a layer over `inputs` `[tokens, numbers]`. `run` gets all sequences of a slab that decode at once, and
    /// each chunk by itself, and returns the output `[sequences, tokens, numbers]` and the states after it.
    pub(crate) fn recur(
        &mut self,
        layer: usize,
        batch: &Batch,
        inputs: &Array,
        mut run: impl FnMut(RecurrentInput<'_>) -> Result<(Array, Vec<Array>)>,
    ) -> Result<Array> {
        let mut outputs = Vec::new();
        for group in &batch.groups {
            let rows = inputs.try_index(group.row..group.row + group.rows)?.expand_dims(1)?;
            let states = self.states(layer, group)?;
            let (out, states) = run(RecurrentInput { inputs: &rows, states })?;
            let slots = &group.slots_in_use;
            for (index, state) in (self.first[layer]..).zip(states) {
                self.slab_mut(group.slab, index)?.try_index_mut((slots, ..), &state)?;
            }
            outputs.push(out.reshape(&[group.rows, -1])?);
        }
        for chunk in &batch.chunks {
            let rows = inputs.try_index(chunk.row..chunk.row + chunk.rows)?.expand_dims(0)?;
            let slot = chunk.slot..chunk.slot + 1;
            let arrays = self.arrays_of(layer, chunk.slab)?;
            let states = arrays.iter().map(|array| array.try_index(slot.clone()));
            let (out, states) =
                run(RecurrentInput { inputs: &rows, states: states.collect::<Result<_>>()? })?;
            for (index, state) in (self.first[layer]..).zip(states) {
                self.slab_mut(chunk.slab, index)?.try_index_mut((slot.clone(), ..), &state)?;
            }
            outputs.push(out.reshape(&[chunk.rows, -1])?);
        }
        match outputs.as_slice() {
            [one] => Ok(one.clone()),
            many => ops::concatenate(many, 0),
        }
    }

    fn states(&self, layer: usize, group: &Group) -> Result<Vec<Array>> {
        let arrays = self.arrays_of(layer, group.slab)?;
        arrays.iter().map(|array| array.take_axis(&group.slots_in_use, 0)).collect()
    }

    fn arrays_of(&self, layer: usize, slab: u32) -> Result<&[Array]> {
        let end = self.first.get(layer + 1).copied().unwrap_or(self.arrays.len());
        let arrays = self.slabs.get(&slab).and_then(|arrays| arrays.get(self.first[layer]..end));
        arrays.ok_or_else(|| Exception::custom("a step names a slab that is not open"))
    }
}
