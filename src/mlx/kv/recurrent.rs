//! Recurrent states: a layer takes the tokens of a step by sequence, with the states before them, and returns
//! the states after them.

use mlx_rs::Array;
use mlx_rs::error::Result;
use mlx_rs::ops;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};

use super::Kv;
use crate::mlx::batch::{Run, RunSequences};

/// Tokens of sequences that have equally many each, and the states before them.
pub(crate) struct RecurrentInput<'a> {
    /// `[sequences, tokens, features]`.
    pub(crate) inputs: &'a Array,
    /// `[sequences, ..]` each.
    pub(crate) states: Vec<Array>,
}

impl Kv {
    /// Runs a layer over `inputs` `[tokens, features]`. `run` gets all sequences of a slab that decode at
    /// once, and each chunk by itself, and returns the output `[sequences, tokens, features]` and the states
    /// after it.
    pub(crate) fn recur(
        &mut self,
        layer: usize,
        runs: &[Run],
        inputs: &Array,
        mut run: impl FnMut(RecurrentInput<'_>) -> Result<(Array, Vec<Array>)>,
    ) -> Result<Array> {
        let mut outputs = Vec::new();
        for Run { slab, row, rows, sequences } in runs {
            let inputs = inputs.try_index(*row..row + rows)?;
            let (inputs, states) = match sequences {
                RunSequences::Decoding(slots) => {
                    let states = self.arrays_of(layer, *slab)?.iter().map(|array| array.take_axis(slots, 0));
                    (inputs.expand_dims(1)?, states.collect::<Result<_>>()?)
                }
                RunSequences::One(slot) => {
                    let states =
                        self.arrays_of(layer, *slab)?.iter().map(|array| array.try_index(*slot..slot + 1));
                    (inputs.expand_dims(0)?, states.collect::<Result<_>>()?)
                }
            };
            let (out, states) = run(RecurrentInput { inputs: &inputs, states })?;
            for (index, state) in (self.first[layer]..).zip(states) {
                let array = self.slab_mut(*slab, index)?;
                match sequences {
                    RunSequences::Decoding(slots) => array.try_index_mut((slots, ..), &state)?,
                    RunSequences::One(slot) => array.try_index_mut((*slot..slot + 1, ..), &state)?,
                }
            }
            outputs.push(out.reshape(&[*rows, -1])?);
        }
        match outputs.as_slice() {
            [one] => Ok(one.clone()),
            many => ops::concatenate(many, 0),
        }
    }
}
