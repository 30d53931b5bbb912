//! The CPU operations of `native/mlx_ops.cpp`, and the choice of their instruction set
//! (`native/kernel_set.h`).

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype, ops};
use mlx_sys::{mlx_array, mlx_dtype, mlx_vector_array};

use super::{Handle, take_all};

type Gated = unsafe extern "C" fn(*mut mlx_array, mlx_array, c_int) -> c_int;
type RmsNorm =
    unsafe extern "C" fn(*mut mlx_array, *mut mlx_array, mlx_array, mlx_array, mlx_array, f32) -> c_int;
type Attend = unsafe extern "C" fn(
    *mut mlx_vector_array,
    mlx_array,
    mlx_array,
    mlx_array,
    mlx_vector_array,
    *const mlx_array,
    *const AttentionShape,
    *const AttentionSpan,
    usize,
) -> c_int;

/// The CPU operations of `native/mlx_ops.cpp`. The set-up puts them into the mlx-c library on Linux. They are
/// looked up by name: where they are missing, MLX's own operations compute the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernels {
    gated: Gated,
    rms_norm: RmsNorm,
    attend: Attend,
}

/// Largest head of attention, in elements, as in `native/cpu_ops.h`.
pub(crate) const HEAD_DIM_MAX: i32 = 576;
/// Divisor of the sizes of its heads and of their outputs.
pub(crate) const HEAD_DIM_MULTIPLE: i32 = 16;

/// `struct mlxd_attention_shape` of `native/cpu_ops.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) heads: c_int,
    pub(crate) kv_heads: c_int,
    pub(crate) head_dim: c_int,
    /// Rotated elements of a head.
    pub(crate) rotated: c_int,
    /// Whether a pair is two neighbours (1) or an element of each half (0).
    pub(crate) traditional: c_int,
    /// Last positions that a token attends to; 0 is all.
    pub(crate) window: c_int,
    /// Element of a key at which its value begins; 0: values are stored on their own.
    pub(crate) values_from: c_int,
    /// Whether the tokens bring keys and values.
    pub(crate) stores: c_int,
    pub(crate) scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`; 0 is off.
    pub(crate) softcap: f32,
    /// Epsilon of the norms.
    pub(crate) eps: f32,
}

/// Optional weights of attention: norms `[head_dim]` of each head of queries, keys and values, and sinks
/// `[heads]`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AttentionWeights<'a> {
    pub(crate) q_norm: Option<&'a Array>,
    pub(crate) k_norm: Option<&'a Array>,
    pub(crate) v_norm: Option<&'a Array>,
    pub(crate) sinks: Option<&'a Array>,
}

/// `struct mlxd_span` of `native/cpu_ops.h`: one sequence's consecutive tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionSpan {
    /// Index of its slab among those given, and of its slot in that.
    pub(crate) slab: c_int,
    pub(crate) slot: c_int,
    /// First of its rows among the packed tokens, and number of rows.
    pub(crate) row: c_int,
    pub(crate) rows: c_int,
    /// Position of the first one.
    pub(crate) start: c_int,
}

/// `enum mlxd_gate` of `native/cpu_ops.h`: the activation of a gated MLP.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// `silu(gate) * up` (SwiGLU, <https://arxiv.org/abs/2002.05202>).
    Silu,
    /// `gelu(gate) * up`, with gelu's approximation by tanh.
    Gelu,
    /// gpt-oss: `gate * sigmoid(1.702 * gate) * (up + 1)`, gate at most 7 and up within 7 of 0.
    Oss,
}

/// Looks a C function up by name in what the process has loaded.
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with a zero byte, and RTLD_DEFAULT is a valid handle.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// Returns the text that a function without arguments returns, if it is there.
fn text(function: &CStr) -> Option<String> {
    let found = symbol(function)?;
    // SAFETY: the functions asked for are those of native/kernel_set.h that return a static text.
    unsafe {
        let function = std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const c_char>(found);
        Some(CStr::from_ptr(function()).to_string_lossy().into_owned())
    }
}

/// Returns the instruction sets that our CPU kernels have on this machine, fastest first; none if there are
/// no kernels.
pub(crate) fn instruction_sets() -> Vec<String> {
    let names = text(c"mlxd_kernels_available").unwrap_or_default();
    names.split_whitespace().map(str::to_owned).collect()
}

/// Returns the instruction set that our CPU kernels use.
pub(crate) fn instruction_set() -> String {
    text(c"mlxd_kernels_name").unwrap_or_else(|| "native".into())
}

/// Makes our CPU kernels and our products use an instruction set; returns whether this machine has it.
pub(crate) fn use_instruction_set(name: &str) -> bool {
    let (Some(found), Ok(name)) = (symbol(c"mlxd_kernels_use"), CString::new(name)) else { return false };
    // SAFETY: the function is that of native/kernel_set.h; the name outlives the call, which does not keep
    // it.
    unsafe {
        let function =
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_int>(found);
        function(name.as_ptr()) == 0
    }
}

/// Leaves matrix products of few rows to the BLAS below ours.
pub(crate) fn leave_products_to_blas() {
    let Some(found) = symbol(c"mlxd_products_use") else { return };
    // SAFETY: the function is that of native/kernel_set.h.
    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(found)(0) }
}

/// Makes our CPU kernels and our products use at most `most` threads, unless the environment says how many.
/// Call it before they compute.
pub(crate) fn limit_threads(most: usize) {
    let Some(found) = symbol(c"mlxd_pool_limit") else { return };
    let most = c_int::try_from(most).unwrap_or(c_int::MAX);
    // SAFETY: the function is that of native/blas_pool.h.
    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(found)(most) }
}

/// Returns zeros for what is written bit by bit. Where there are our CPU operations, their pages come to be
/// when they are first written; elsewhere all are written at once.
pub(crate) fn zeros(shape: &[i32], dtype: Dtype) -> Result<Array> {
    type Zeros = unsafe extern "C" fn(*mut mlx_array, *const c_int, usize, mlx_dtype) -> c_int;
    let Some(found) = symbol(c"mlxd_zeros") else { return ops::zeros_dtype(shape, dtype) };
    let mut out = Handle::new();
    // SAFETY: the function is that of native/mlx_ops.cpp; the shape outlives the call, which sets `out` if it
    // succeeds.
    let status = unsafe {
        let function = std::mem::transmute::<*mut c_void, Zeros>(found);
        function(&raw mut out.0, shape.as_ptr(), shape.len(), dtype as mlx_dtype)
    };
    out.take(status, "zeros")
}

impl Kernels {
    /// Returns all of them, or None where they are missing.
    pub(crate) fn find() -> Option<Self> {
        let (gated, rms_norm, attend) =
            (symbol(c"mlxd_gated")?, symbol(c"mlxd_rms_norm")?, symbol(c"mlxd_attend_slabs")?);
        // SAFETY: these are the functions of native/mlx_ops.cpp, whose C types the fields repeat.
        unsafe {
            Some(Self {
                gated: std::mem::transmute::<*mut c_void, Gated>(gated),
                rms_norm: std::mem::transmute::<*mut c_void, RmsNorm>(rms_norm),
                attend: std::mem::transmute::<*mut c_void, Attend>(attend),
            })
        }
    }

    /// Returns the output of a gate, with gate and up side by side in `gate_up`.
    pub(crate) fn gated(self, gate_up: &Array, gate: Gate) -> Result<Array> {
        let mut out = Handle::new();
        // SAFETY: both handles live through the call, which sets `out` if it succeeds.
        let status = unsafe { (self.gated)(&raw mut out.0, gate_up.as_ptr(), gate as c_int) };
        out.take(status, "a gate")
    }

    /// Returns the root mean square norm of `x`.
    pub(crate) fn rms_norm(self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let (mut out, mut unused, none) = (Handle::new(), Handle::new(), Handle::new());
        // SAFETY: all handles live through the call, which sets `out` if it succeeds.
        let status = unsafe {
            (self.rms_norm)(&raw mut out.0, &raw mut unused.0, x.as_ptr(), none.0, weight.as_ptr(), eps)
        };
        out.take(status, "rms_norm")
    }

    /// Returns `x + y`, and the norm of that.
    pub(crate) fn add_rms_norm(
        self,
        x: &Array,
        y: &Array,
        weight: &Array,
        eps: f32,
    ) -> Result<(Array, Array)> {
        let (mut out, mut sum) = (Handle::new(), Handle::new());
        // SAFETY: all handles live through the call, which sets `out` and `sum` if it succeeds.
        let status = unsafe {
            (self.rms_norm)(&raw mut out.0, &raw mut sum.0, x.as_ptr(), y.as_ptr(), weight.as_ptr(), eps)
        };
        Ok((sum.take(status, "rms_norm")?, out.take(status, "rms_norm")?))
    }

    /// Writes the keys and values of packed tokens to their slots and attends; returns the output, and the
    /// arrays that replace those given: `slabs` are keys and values of each slab, or keys alone where values
    /// are parts of them.
    pub(crate) fn attend(
        self,
        (qkv, cos, sin): (&Array, &Array, &Array),
        slabs: &[Array],
        (shape, weights): (&AttentionShape, AttentionWeights<'_>),
        spans: &[AttentionSpan],
    ) -> Result<(Array, Vec<Array>)> {
        let handles: Vec<mlx_array> = slabs.iter().map(Array::as_ptr).collect();
        let none = Handle::new();
        let AttentionWeights { q_norm, k_norm, v_norm, sinks } = weights;
        let weights = [q_norm, k_norm, v_norm, sinks].map(|weight| weight.map_or(none.0, Array::as_ptr));
        // SAFETY: the handles live through the calls; the vectors copy what they are given, are used on this
        // thread only, and are freed once.
        unsafe {
            let given = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = mlx_sys::mlx_vector_array_new();
            let status = (self.attend)(
                &raw mut made,
                qkv.as_ptr(),
                cos.as_ptr(),
                sin.as_ptr(),
                given,
                weights.as_ptr(),
                &raw const *shape,
                spans.as_ptr(),
                spans.len(),
            );
            let taken = take_all(status, made, slabs.len() + 1, "attend");
            mlx_sys::mlx_vector_array_free(given);
            mlx_sys::mlx_vector_array_free(made);
            let mut taken = taken?.into_iter();
            let out = taken.next().ok_or_else(|| Exception::custom("attend gave nothing"))?;
            Ok((out, taken.collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_also_in_memory_that_was_used_before() {
        for elements in [1, 1000, 3_000_001] {
            let ones = ops::ones_dtype(&[elements], Dtype::Float32).unwrap();
            ones.eval().unwrap();
            drop(ones);
            let zeros = zeros(&[elements], Dtype::Float32).unwrap();
            assert!(zeros.as_slice::<f32>().iter().all(|&zero| zero == 0.0), "{elements}");
        }
    }
}
