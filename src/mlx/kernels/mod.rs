//! Kernels: what computes beside dense matrix products. A process uses one set (key `kernels`), which is checked once,
//! at start; a model's set follows from it and from what the model computes in, at load.

use mlx_rs::Dtype;

use crate::backend::KernelChoice;
use crate::error::Error;
use crate::mlx::ffi::{self, HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Kernels};

/// What computes beside matrix products.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KernelSet {
    /// Our own operations, in single precision on the CPU.
    Kernels(Kernels),
    /// MLX's operations, composed: on the CPU, where its fused ones are chains of small ones.
    Composed,
    /// MLX's fused operations, on GPUs.
    Fused,
}

/// Puts the chosen kernels to use in this process.
///
/// # Errors
/// The machine does not have them; the error lists those that it has.
pub(crate) fn select(choice: KernelChoice, on_cpu: bool) -> Result<(), Error> {
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
    if taken {
        return Ok(());
    }
    let why =
        format!("this machine does not have {:?}; it has {}", choice.as_str(), available(on_cpu).join(", "));
    Err(Error::field("kernels", why))
}

/// Returns the values of the key `kernels` that this machine has.
pub(crate) fn available(on_cpu: bool) -> Vec<String> {
    let ours = if on_cpu { ffi::instruction_sets() } else { Vec::new() };
    let others = [KernelChoice::Composed, KernelChoice::Fused].map(|choice| choice.as_str().to_owned());
    std::iter::once(KernelChoice::Auto.as_str().to_owned()).chain(ours).chain(others).collect()
}

impl KernelSet {
    /// Returns the set for a model that computes in `float`.
    pub(crate) fn choose(choice: KernelChoice, on_cpu: bool, float: Dtype) -> Self {
        match choice {
            KernelChoice::Fused => Self::Fused,
            KernelChoice::Composed => Self::Composed,
            KernelChoice::Auto if !on_cpu => Self::Fused,
            KernelChoice::Auto
            | KernelChoice::Plain
            | KernelChoice::Avx2
            | KernelChoice::Avx512
            | KernelChoice::Neon => match Kernels::find().filter(|_| float == Dtype::Float32) {
                Some(kernels) => Self::Kernels(kernels),
                None => Self::Composed,
            },
        }
    }

    /// Returns its name, for the log.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Kernels(_) => ffi::instruction_set(),
            Self::Composed => KernelChoice::Composed.as_str().to_owned(),
            Self::Fused => KernelChoice::Fused.as_str().to_owned(),
        }
    }

    /// Whether our own attention takes heads of this size with outputs of `width`: it works by whole vectors.
    pub(crate) fn takes_attention(self, head_dim: i32, width: i32) -> bool {
        head_dim <= HEAD_DIM_MAX && head_dim % HEAD_DIM_MULTIPLE == 0 && width % HEAD_DIM_MULTIPLE == 0
    }
}
