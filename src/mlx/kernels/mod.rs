//! Kernels for all operations but dense matrix products, one file for each set. A process uses the sets that
//! the key `kernels` allows (`select`, at start); a model's set follows from its dtype (`Selection::set`),
//! and that of its attention from its KV cache (`KernelSet::for_cache`), at load. Layers call the methods of
//! [`KernelSet`].
//!
//! A kernel for another processor is an instruction set of `native/` (see `native/kernel_set.h`, and the
//! key's words in `backend`), or a variant here with a file of its own.

mod composed;
mod cpu;
mod cuda;
mod fused;
mod grouped;
#[cfg(test)]
mod metal_tests;
#[cfg(test)]
mod tests;

pub(crate) use composed::gelu;

use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, fast};

use crate::backend::KernelChoice;
use crate::error::Error;
use crate::mlx::batch::{Batch, Layout, StepShape, Wanted};
use crate::mlx::ffi::{self, AttentionWeights, Gate, Kernels, Packed};
use crate::mlx::kv::{Kv, KvShape};
use crate::mlx::rope::{Angles, Rope};

/// Smallest efficient prefill of a step, in tokens. On a CPU with our kernels 8 tokens cost hardly more than
/// one, and 16 more than a stream of a small model may wait. On CUDA a step with prefill costs the host
/// thousands of launches, and a product of 256 rows as much as one of 64 (one H200, an 8B at 4 bits).
const PREFILL_TOKENS_MIN_CPU: u32 = 8;
const PREFILL_TOKENS_MIN: u32 = 16;
const PREFILL_TOKENS_MIN_CUDA: u32 = 256;

/// The kernels of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KernelSet {
    /// Our own operations, in single precision on the CPU.
    Cpu(Kernels),
    /// Compositions of MLX's small operations: on the CPU, where its fused ones are chains of small ones too.
    Composed,
    /// MLX's fused operations, for GPUs.
    Fused,
    /// Our own kernels for NVIDIA GPUs, and MLX's fused operations where they do not serve.
    Cuda,
}

/// The kernels that a process may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selection {
    choice: KernelChoice,
    pub(crate) on_cpu: bool,
}

/// The rotation of one step's tokens, as a kernel set takes it.
#[derive(Clone, Debug)]
pub(crate) enum Rotation {
    /// `[tokens, dims / 2]`, for our CPU kernels.
    Angles(Angles),
    /// Tables that broadcast over heads, for composed operations.
    Tables(Angles),
    /// Positions `[tokens]`, for MLX's kernel.
    Positions(Array),
}

/// The attention of a layer over its KV cache, or over another layer's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionCall<'a> {
    /// The layer whose cache it is.
    pub(crate) layer: usize,
    /// Whether the tokens bring keys and values.
    pub(crate) stores: bool,
    pub(crate) weights: AttentionWeights<'a>,
    /// Epsilon of the norms.
    pub(crate) eps: f32,
    /// Rotation of queries and keys; None: they are not rotated.
    pub(crate) rope: Option<(&'a Rope, &'a Rotation)>,
}

/// Keys and values that queries attend to, in MLX's operations.
#[derive(Clone, Copy, Debug)]
struct Attended<'a> {
    /// `[slots, kv_heads, positions, _]` both.
    keys: &'a Array,
    values: &'a Array,
    /// See [`crate::mlx::batch::View`].
    mask: Option<&'a Array>,
    /// Whether rows attend to what comes before each, where there is no mask.
    causal: bool,
}

/// Puts the chosen kernels to use in this process.
///
/// # Errors
/// The machine does not have them; the error lists those that it has.
pub(crate) fn select(choice: KernelChoice, on_cpu: bool) -> std::result::Result<Selection, Error> {
    let taken = match choice {
        KernelChoice::Auto | KernelChoice::Composed => true,
        KernelChoice::Fused => {
            ffi::leave_products_to_blas();
            true
        }
        KernelChoice::Plain | KernelChoice::Avx2 | KernelChoice::Avx512 | KernelChoice::Neon => {
            on_cpu && ffi::use_instruction_set(choice.as_str())
        }
    };
    let selection = Selection { choice, on_cpu };
    if taken {
        return Ok(selection);
    }
    let has = selection.available().join(", ");
    Err(Error::field("kernels", format!("this machine does not have {:?}; it has {has}", choice.as_str())))
}

impl Selection {
    /// Returns the values of the key `kernels` that this machine has.
    pub(crate) fn available(self) -> Vec<String> {
        let ours = if self.on_cpu { ffi::instruction_sets() } else { Vec::new() };
        let others = [KernelChoice::Composed, KernelChoice::Fused].map(|choice| choice.as_str().to_owned());
        std::iter::once(KernelChoice::Auto.as_str().to_owned()).chain(ours).chain(others).collect()
    }

    /// Returns the set for a model that computes in `float`.
    pub(crate) fn set(self, float: Dtype) -> KernelSet {
        match self.choice {
            KernelChoice::Fused => KernelSet::Fused,
            KernelChoice::Composed => KernelSet::Composed,
            KernelChoice::Auto if !self.on_cpu && cuda::serves() => KernelSet::Cuda,
            KernelChoice::Auto if !self.on_cpu => KernelSet::Fused,
            KernelChoice::Auto
            | KernelChoice::Plain
            | KernelChoice::Avx2
            | KernelChoice::Avx512
            | KernelChoice::Neon => match Kernels::find().filter(|_| float == Dtype::Float32) {
                Some(kernels) => KernelSet::Cpu(kernels),
                None => KernelSet::Composed,
            },
        }
    }
}

impl KernelSet {
    /// Returns its name, for the log.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Cpu(_) => ffi::instruction_set(),
            Self::Composed => KernelChoice::Composed.as_str().to_owned(),
            Self::Fused => KernelChoice::Fused.as_str().to_owned(),
            Self::Cuda => "cuda".to_owned(),
        }
    }

    /// Returns the set that attends over a cache: this one, or MLX's operations where its kernels do not
    /// serve it.
    pub(crate) fn for_cache(self, shape: &KvShape) -> Self {
        match self {
            Self::Cpu(_) if !cpu::serves_cache(shape) => Self::Composed,
            Self::Cuda if !cuda::serves_cache(shape) => Self::Fused,
            Self::Cpu(_) | Self::Composed | Self::Fused | Self::Cuda => self,
        }
    }

    /// Returns how steps are laid out for this set's attention over a cache.
    pub(crate) fn step_shape(self, shape: &KvShape) -> StepShape {
        let mut windows: Vec<i32> = shape.token_states().map(|state| state.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let attention = match self {
            Self::Cpu(_) => Wanted::Spans,
            Self::Composed => Wanted::Grouped { windows, places: false, mask_heads: 1 },
            Self::Fused => Wanted::Grouped { windows, places: false, mask_heads: fused::mask_heads(shape) },
            Self::Cuda => Wanted::Grouped { windows, places: true, mask_heads: 1 },
        };
        StepShape { attention, recurrent: shape.is_recurrent() }
    }

    /// Returns the smallest efficient prefill of a step, in tokens.
    pub(crate) fn prefill_tokens_min(self) -> u32 {
        match self {
            Self::Cuda => PREFILL_TOKENS_MIN_CUDA,
            Self::Cpu(_) => PREFILL_TOKENS_MIN_CPU,
            Self::Composed | Self::Fused => PREFILL_TOKENS_MIN,
        }
    }

    /// Whether latent attention is right: on CUDA scores agreed and generated tokens did not (one H200), so
    /// it is refused there until that is understood.
    pub(crate) fn serves_latent_attention(self) -> bool {
        !ffi::on_cuda()
    }

    /// Whether gathered products may be told that their rows are sorted by expert: MLX 0.32.2's CUDA product
    /// for such rows is wrong after another one.
    pub(crate) fn takes_sorted_rows(self) -> bool {
        !ffi::on_cuda()
    }

    /// Returns the root mean square norm of `x` over its last axis.
    pub(crate) fn rms_norm(self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        match self {
            Self::Cpu(kernels) => kernels.rms_norm(x, weight, eps),
            Self::Composed | Self::Fused | Self::Cuda => fast::rms_norm(x, Some(weight), eps),
        }
    }

    /// Returns `x + y`, and the norm of that.
    pub(crate) fn add_rms_norm(
        self,
        x: &Array,
        y: &Array,
        weight: &Array,
        eps: f32,
    ) -> Result<(Array, Array)> {
        match self {
            Self::Cpu(kernels) => kernels.add_rms_norm(x, y, weight, eps),
            Self::Composed | Self::Fused | Self::Cuda => {
                let sum = x.add(y)?;
                let normed = fast::rms_norm(&sum, Some(weight), eps)?;
                Ok((sum, normed))
            }
        }
    }

    /// Returns the output of a gate, with gate and up side by side on the last axis of `gate_up`.
    pub(crate) fn gated(self, gate_up: &Array, gate: Gate) -> Result<Array> {
        match self {
            Self::Cpu(kernels) => kernels.gated(gate_up, gate),
            Self::Composed | Self::Fused | Self::Cuda => composed::gated(gate_up, gate),
        }
    }

    /// Returns `x @ w^T` for a quantized matrix that becomes `float` when it is dequantized.
    pub(crate) fn quantized_product(self, x: &Array, w: &Packed<'_>, float: Dtype) -> Result<Array> {
        match self {
            Self::Cuda => cuda::project(x, w, float),
            Self::Cpu(_) | Self::Composed | Self::Fused => w.product(x),
        }
    }

    /// Returns `residual + x @ w^T`, where that is one kernel.
    pub(crate) fn product_onto(self, residual: &Array, x: &Array, w: &Packed<'_>) -> Option<Result<Array>> {
        let serves = matches!(self, Self::Cuda) && cuda::takes_product(x, w);
        serves.then(|| cuda::product(x, w, Some(residual)))
    }

    /// Returns `silu(x @ gate^T) * (x @ up^T)`, where that is one kernel; `w` holds the rows of `gate`, then
    /// of `up`.
    pub(crate) fn gated_product(self, x: &Array, w: &Packed<'_>) -> Option<Result<Array>> {
        let serves = matches!(self, Self::Cuda) && cuda::takes_product(x, w);
        serves.then(|| cuda::gated_product(x, w))
    }

    /// Returns the rotation of tokens at these positions, as [`KernelSet::attend`] takes it.
    pub(crate) fn rotation(self, rope: &Rope, positions: &[i32]) -> Rotation {
        match self {
            Self::Cpu(_) => Rotation::Angles(rope.angles(positions)),
            Self::Composed => Rotation::Tables(rope.tables(positions)),
            Self::Fused | Self::Cuda => {
                Rotation::Positions(Array::from_slice(positions, &[crate::mlx::dim(positions.len())]))
            }
        }
    }

    /// Attends with a layer's new tokens: `qkv` is `[tokens, (heads + planes) * head_dim]`, or `[tokens,
    /// heads * head_dim]` where they bring no keys. Norms and rotates queries and keys, writes keys and
    /// values to their slots, and returns `[tokens, heads * width]`. Call it on the set that
    /// [`KernelSet::for_cache`] returns.
    pub(crate) fn attend(
        self,
        call: &AttentionCall<'_>,
        batch: &Batch,
        kv: &mut Kv,
        qkv: &Array,
    ) -> Result<Array> {
        match (self, &batch.layout) {
            (Self::Cpu(kernels), Layout::Spans(spans)) => {
                cpu::attend(kernels, call, (&batch.slabs, spans), kv, qkv)
            }
            (Self::Composed | Self::Fused | Self::Cuda, Layout::Grouped(grouped)) => {
                grouped::attend(self, call, grouped, kv, qkv)
            }
            (Self::Cpu(_) | Self::Composed | Self::Fused | Self::Cuda, _) => {
                Err(mlx_rs::error::Exception::custom("a step laid out for other kernels"))
            }
        }
    }
}
