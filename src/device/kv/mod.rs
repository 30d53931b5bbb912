//! KV caches of one model: slabs `[slots, 2 * kv_heads, capacity, head_dim]` per layer, keys in the first
//! half of the heads and values in the second, so that one update writes both; and parked caches, which
//! are copies of one slot at its exact length. `attend` reads and writes them.
//!
//! Kept in 8 bits, a layer has two arrays in a slab: the numbers, and a scale for each token and head
//! `[slots, 2 * kv_heads, capacity, 1]`.
//!
//! Slabs are updated in place, which MLX does only while nobody else holds a handle of the array: between
//! steps nothing does, and within a layer all writes come before all reads.

mod attend;

use std::collections::BTreeMap;

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype, ops};

use crate::backend::{ParkedId, SlotId};
use crate::device::ffi::Kernels;
use crate::device::layers::Ops;
use crate::device::{cuda, dim};

/// The shape of a model's KV cache.
#[derive(Clone, Debug)]
pub(crate) struct KvShape {
    /// For each layer the positions that a token sees at most; 0 is all.
    pub(crate) windows: Vec<i32>,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    /// What the model computes in.
    pub(crate) dtype: Dtype,
    /// Kept as 8-bit integers.
    pub(crate) int8: bool,
    /// What computes attention.
    pub(crate) ops: Ops,
}

impl KvShape {
    /// The operation that does all of attention, where there is one.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        match self.ops {
            Ops::Kernels(kernels) => Some(kernels),
            Ops::Composed | Ops::Fused => None,
        }
    }

    /// Whether our own attention on CUDA takes this cache.
    pub(crate) fn on_cuda(&self) -> bool {
        let windowed = self.windows.iter().any(|&window| window != 0);
        matches!(self.ops, Ops::Fused)
            && !windowed
            && !self.int8
            && cuda::takes_attention(self.dtype, self.head_dim, self.heads, self.kv_heads)
    }

    /// The arrays of a layer in a slab: numbers of a token and head in each, and their dtypes.
    fn planes(&self) -> Vec<(i32, Dtype)> {
        if self.int8 {
            vec![(self.head_dim, Dtype::Int8), (1, self.dtype)]
        } else {
            vec![(self.head_dim, self.dtype)]
        }
    }

    /// Bytes one token takes in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let bytes = |(numbers, dtype): (i32, Dtype)| {
            let item: u64 = match dtype {
                Dtype::Int8 => 1,
                Dtype::Float32 => 4,
                _ => 2,
            };
            u64::from(numbers.unsigned_abs()) * item
        };
        let head: u64 = self.planes().into_iter().map(bytes).sum();
        2 * self.windows.len() as u64 * u64::from(self.kv_heads.unsigned_abs()) * head
    }
}

/// All KV caches of one model.
#[derive(Debug)]
pub(crate) struct Kv {
    shape: KvShape,
    /// By slab; of each the first planes of all layers, then the second ones.
    slabs: BTreeMap<u32, Vec<Array>>,
    parked: BTreeMap<ParkedId, Vec<Array>>,
    parked_next: u64,
}

impl Kv {
    /// No slab yet.
    pub(crate) fn new(shape: KvShape) -> Self {
        Self { shape, slabs: BTreeMap::new(), parked: BTreeMap::new(), parked_next: 0 }
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub(crate) fn open(&mut self, slab: u32, capacity: u32, slots: u32) -> Result<()> {
        let heads = 2 * self.shape.kv_heads;
        let planes = self.shape.planes();
        let each = planes.iter().flat_map(|plane| std::iter::repeat_n(plane, self.shape.windows.len()));
        let zeros = |&(numbers, dtype): &(i32, Dtype)| {
            ops::zeros_dtype(&[dim(slots), heads, dim(capacity), numbers], dtype)
        };
        let arrays = each.map(zeros).collect::<Result<Vec<_>>>()?;
        eval(&arrays)?;
        self.slabs.insert(slab, arrays);
        Ok(())
    }

    pub(crate) fn close(&mut self, slab: u32) {
        self.slabs.remove(&slab);
    }

    /// Writes zeros over the first `tokens` of a slot.
    pub(crate) fn clear(&mut self, slot: SlotId, tokens: u32) -> Result<()> {
        self.write_slot(slot, tokens, |_, dtype| ops::zeros_dtype(&[1], dtype))
    }

    /// Copies the first `tokens` of a slot into another one.
    pub(crate) fn copy(&mut self, from: SlotId, to: SlotId, tokens: u32) -> Result<()> {
        let content = self.read_slot(from, tokens)?;
        self.write_slot(to, tokens, |index, _| Ok(content[index].clone()))
    }

    /// Copies the first `tokens` of a slot out.
    pub(crate) fn park(&mut self, slot: SlotId, tokens: u32) -> Result<ParkedId> {
        let content = self.read_slot(slot, tokens)?;
        let id = ParkedId(self.parked_next);
        self.parked_next += 1;
        self.parked.insert(id, content);
        Ok(id)
    }

    /// Copies the first `tokens` of a parked cache into a slot.
    pub(crate) fn restore(&mut self, parked: ParkedId, tokens: u32, slot: SlotId) -> Result<()> {
        let Some(content) = self.parked.remove(&parked) else { return Ok(()) };
        let written =
            self.write_slot(slot, tokens, |index, _| content[index].try_index((.., .., ..dim(tokens), ..)));
        self.parked.insert(parked, content);
        written
    }

    pub(crate) fn drop_parked(&mut self, parked: ParkedId) {
        self.parked.remove(&parked);
    }

    /// `[1, 2 * kv_heads, tokens, _]` of every array, as copies: a lazy view would keep the slab's
    /// handle and turn its next update into a copy of the whole.
    fn read_slot(&self, slot: SlotId, tokens: u32) -> Result<Vec<Array>> {
        let (place, tokens) = (dim(slot.slot), dim(tokens));
        // Adding zero makes an array of its own, where `contiguous` may hand back a view.
        let own = |view: Array| view.add(ops::zeros_dtype(&[1], view.dtype())?);
        let copies = self.slabs[&slot.slab]
            .iter()
            .map(|slab| own(slab.try_index((place..place + 1, .., ..tokens, ..))?))
            .collect::<Result<Vec<_>>>()?;
        eval(&copies)?;
        Ok(copies)
    }

    fn write_slot(
        &mut self,
        slot: SlotId,
        tokens: u32,
        content: impl Fn(usize, Dtype) -> Result<Array>,
    ) -> Result<()> {
        let (place, tokens) = (dim(slot.slot), dim(tokens));
        let Some(slabs) = self.slabs.get_mut(&slot.slab) else { return Ok(()) };
        for (index, slab) in slabs.iter_mut().enumerate() {
            let dtype = slab.dtype();
            slab.try_index_mut((place..place + 1, .., ..tokens, ..), &content(index, dtype)?)?;
        }
        eval(&*slabs)
    }
}
