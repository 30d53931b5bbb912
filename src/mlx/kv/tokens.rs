//! Keys and values of tokens in operations of MLX: new ones are written with one update of each for each
//! group of decoding slots and for each chunk, and read back as the model computes.

use std::ops::Range;

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::{Array, Dtype, ops};

use super::Kv;
use crate::mlx::batch::{Chunk, Group, GroupWrite, Grouped};

/// The largest 8-bit integer that is used, so that both signs have the same range.
const INT8_MAX: f32 = 127.0;

impl Kv {
    /// Writes a layer's new keys `[tokens, kv_heads, head_dim]` to their slots, and values if they are stored
    /// on their own.
    pub(crate) fn write_tokens(
        &mut self,
        layer: usize,
        grouped: &Grouped,
        keys: &Array,
        values: Option<&Array>,
    ) -> Result<()> {
        let mut index = self.first[layer];
        for part in [Some(keys), values].into_iter().flatten() {
            for new in self.encode(part)? {
                for group in &grouped.groups {
                    self.write_group(index, group, &new)?;
                }
                for chunk in &grouped.chunks {
                    self.write_chunk(index, chunk, &new)?;
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// Returns a layer's keys and values of some slots at some positions, `[slots, kv_heads, positions, _]`
    /// each.
    pub(crate) fn tokens(
        &self,
        layer: usize,
        slab: u32,
        slots: Range<i32>,
        positions: Range<i32>,
    ) -> Result<(Array, Array)> {
        let values_from = self.token_state(layer)?.values_from;
        let stored = |array: &Array| array.try_index((slots.clone(), .., positions.clone(), ..));
        let part = |arrays: &[Array]| match arrays {
            [elements, scales] => stored(elements)?.as_dtype(self.shape.dtype)?.multiply(stored(scales)?),
            arrays => stored(&arrays[0]),
        };
        let mut parts = self.arrays_of(layer, slab)?.chunks(self.shape.arrays_of_part()).map(part);
        let missing = || Exception::custom("a layer without keys attends");
        let keys = parts.next().ok_or_else(missing)??;
        let values = match parts.next() {
            Some(values) => values?,
            None => keys.try_index((.., .., .., values_from..))?,
        };
        Ok((keys, values))
    }

    /// Returns new keys or values as they are stored: one array, or elements and scales in 8 bits.
    fn encode(&self, new: &Array) -> Result<Vec<Array>> {
        if !self.shape.int8 {
            return Ok(vec![new.clone()]);
        }
        let largest = new.abs()?.max_axis(-1, true)?.as_dtype(Dtype::Float32)?;
        let scales =
            ops::maximum(largest.divide(Array::from_f32(INT8_MAX))?, Array::from_f32(f32::MIN_POSITIVE))?;
        // In the dtype that they are stored in, so that rounding errors do not add up.
        let scales = scales.as_dtype(self.shape.dtype)?;
        let limit = |x: Array| ops::clip(&x, (Array::from_f32(-INT8_MAX), Array::from_f32(INT8_MAX)));
        let elements = new.as_dtype(Dtype::Float32)?.divide(scales.as_dtype(Dtype::Float32)?)?.round(None)?;
        Ok(vec![limit(elements)?.as_dtype(Dtype::Int8)?, scales])
    }

    fn write_group(&mut self, index: usize, group: &Group, new: &Array) -> Result<()> {
        let rows = new.try_index(group.row..group.row + group.rows)?;
        let slab = self.slab_mut(group.slab, index)?;
        match &group.write {
            GroupWrite::One(slot, position) => {
                let rows = rows.reshape(&[1, rows.dim(1), 1, rows.dim(2)])?;
                slab.try_index_mut((*slot..slot + 1, .., *position..position + 1, ..), &rows)
            }
            GroupWrite::Many(slots, positions) => slab.try_index_mut((slots, .., positions, ..), &rows),
        }
    }

    fn write_chunk(&mut self, index: usize, chunk: &Chunk, new: &Array) -> Result<()> {
        let rows = new.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let slab = self.slab_mut(chunk.slab, index)?;
        let positions = chunk.start..chunk.start + chunk.rows;
        slab.try_index_mut((chunk.slot..chunk.slot + 1, .., positions, ..), &rows)
    }
}
