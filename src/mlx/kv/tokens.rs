//! Keys and values of tokens in operations of MLX: new ones are written with one update for each group of
//! decoding slots and for each chunk, and read back as the model computes.

use std::ops::Range;

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::{Array, Dtype, ops};

use super::Kv;
use crate::mlx::batch::{Chunk, Group, GroupWrite, Grouped};

/// The largest 8-bit integer that is used, so that both signs have the same range.
const INT8_MAX: f32 = 127.0;

impl Kv {
    /// Writes a layer's new keys and values `[tokens, planes, head_dim]` to their slots.
    pub(crate) fn write_tokens(&mut self, layer: usize, grouped: &Grouped, new: &Array) -> Result<()> {
        for (new, index) in self.encode(new)?.iter().zip(self.first[layer]..) {
            for group in &grouped.groups {
                self.write_group(index, group, new)?;
            }
            for chunk in &grouped.chunks {
                self.write_chunk(index, chunk, new)?;
            }
        }
        Ok(())
    }

    /// Returns a layer's keys and values of some slots at some positions, `[slots, planes, positions,
    /// head_dim]`.
    pub(crate) fn tokens(
        &self,
        layer: usize,
        slab: u32,
        slots: Range<i32>,
        positions: Range<i32>,
    ) -> Result<Array> {
        let part = |array: &Array| array.try_index((slots.clone(), .., positions.clone(), ..));
        let arrays = self.arrays_of(layer, slab)?;
        let elements = part(&arrays[0])?;
        if !self.shape.int8 {
            return Ok(elements);
        }
        elements.as_dtype(self.shape.dtype)?.multiply(part(&arrays[1])?)
    }

    /// Returns new keys and values as they are stored: one array, or elements and scales in 8 bits.
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
