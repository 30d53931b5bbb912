//! Kernels of our own for NVIDIA GPUs, for steps of few tokens: products with 4-bit weights, and attention of
//! decoding sequences, each with its own length. MLX compiles them at their first run and puts them on its
//! stream like its own.
//!
//! MLX's are made for one sequence or for many tokens: its quantized product reads the weights again for each
//! token up to seven, and its attention needs one length for all, and (through cuDNN) a plan for each new
//! length. Every launch costs the host microseconds, so each kernel does all it can at once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::hash::{DefaultHasher, Hash, Hasher};

use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, ops};

use crate::mlx::batch::Places;
use crate::mlx::ffi::{self, CudaKernel, CudaLaunch, DeviceFact, Packed};
use crate::mlx::kv::KvShape;
use crate::quantize::QuantMode;

const COMMON: &str = include_str!("common.cuh");
const PRODUCT: &str = include_str!("product.cuh");
const ATTENTION: &str = include_str!("attention.cuh");

/// Tokens from which on MLX is faster with a matrix that is dequantized for the product.
const DENSE_ROWS: i32 = 256;

/// Most tokens that our products take; MLX's are faster above.
const ROWS_MAX: i32 = 32;

/// Query heads of a key head that attention takes: each has its accumulators in registers.
const HEAD_GROUP_MAX: i32 = 8;

/// Positions of a chunk where several blocks share a long sequence.
const CHUNK: i32 = 128;

/// Longest sequence, in tokens, whose key head one block takes alone.
const WHOLE_LENGTH_MAX: i32 = 256;

/// Blocks that keep the GPU busy, so that sequences need not be split.
const BLOCKS_ENOUGH: i32 = 256;

/// Number of threads of a block, for products and attention.
const THREADS: i32 = 256;

thread_local! {
    /// Kernels by name, per thread: MLX's handles stay on the thread that owns MLX.
    static KERNELS: RefCell<BTreeMap<String, CudaKernel>> = const { RefCell::new(BTreeMap::new()) };
}

/// Whether MLX computes on an NVIDIA GPU whose tensor cores take bfloat16.
pub(super) fn serves() -> bool {
    let capability = ffi::device_fact("compute_capability_major");
    ffi::on_cuda() && matches!(capability, Some(DeviceFact::Size(major)) if major >= 8)
}

/// Whether our attention takes all layers of this cache.
pub(super) fn serves_cache(shape: &KvShape) -> bool {
    !shape.int8
        && type_name(shape.dtype).is_some()
        && shape.token_states().all(|state| {
            state.window == 0
                && state.is_plain()
                && matches!(state.head_dim, 64 | 128)
                && state.heads % state.kv_heads == 0
                && state.heads / state.kv_heads <= HEAD_GROUP_MAX
        })
}

/// Returns the name of a dtype in CUDA; None if the kernels do not take it.
fn type_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::Bfloat16 => Some("__nv_bfloat16"),
        Dtype::Float16 => Some("__half"),
        _ => None,
    }
}

/// A kernel's source.
struct Source {
    /// Unique name of the variant.
    name: String,
    inputs: &'static [&'static CStr],
    outputs: &'static [&'static CStr],
    part: &'static str,
}

impl Source {
    /// Runs it; `body` returns the kernel's text, and is called once.
    fn run(
        self,
        body: impl FnOnce() -> String,
        inputs: &[&Array],
        outputs: &[(&[i32], Dtype)],
        launch: CudaLaunch,
    ) -> Result<Vec<Array>> {
        KERNELS.with_borrow_mut(|kernels| {
            if !kernels.contains_key(&self.name) {
                let header = format!("{COMMON}\n{}", self.part);
                let body = body();
                let mut hasher = DefaultHasher::new();
                (&header, &body).hash(&mut hasher);
                // MLX caches compiled kernels by name, so another text needs another name.
                let name = format!("mlxd_{}_{:016x}", self.name, hasher.finish());
                let made = CudaKernel::new(&name, self.inputs, self.outputs, &body, &header)?;
                kernels.insert(self.name.clone(), made);
            }
            kernels[&self.name].run(inputs, outputs, launch)
        })
    }
}

/// Returns the output of a kernel that has one.
fn only(outputs: Vec<Array>) -> Result<Array> {
    outputs.into_iter().next().ok_or_else(|| mlx_rs::error::Exception::custom("a CUDA kernel gave nothing"))
}

/// Whether [`product`] and [`gated_product`] take this.
pub(super) fn takes_product(x: &Array, w: &Packed<'_>) -> bool {
    type_name(x.dtype()).is_some()
        && w.scales.dtype() == x.dtype()
        && (1..=ROWS_MAX).contains(&x.dim(0))
        && w.bits == 4
        && w.mode == QuantMode::Affine
        && w.group_size % 64 == 0
        && x.dim(1) % 64 == 0
        && w.numbers.dim(0) > ROWS_MAX
}

/// Returns `x @ w^T`, by the fastest way for this number of rows.
pub(super) fn project(x: &Array, w: &Packed<'_>, float: Dtype) -> Result<Array> {
    if takes_product(x, w) {
        product(x, w, None)
    } else if x.dim(0) >= DENSE_ROWS {
        ops::matmul(x, w.dequantize(float)?.t())
    } else {
        w.product(x)
    }
}

/// Returns `x @ w^T`, and `residual` added to it if there is one.
pub(super) fn product(x: &Array, w: &Packed<'_>, residual: Option<&Array>) -> Result<Array> {
    quantized_rows(x, w, residual, false)
}

/// Returns `silu(x @ gate^T) * (x @ up^T)`, where `w` holds the rows of `gate` and then those of `up`.
pub(super) fn gated_product(x: &Array, w: &Packed<'_>) -> Result<Array> {
    quantized_rows(x, w, None, true)
}

fn quantized_rows(x: &Array, w: &Packed<'_>, residual: Option<&Array>, gated: bool) -> Result<Array> {
    let (rows, all) = (x.dim(0), w.numbers.dim(0));
    let made = if gated { all / 2 } else { all };
    let token_tiles = if rows <= 8 {
        1
    } else if rows <= 16 {
        2
    } else {
        4
    };
    // More rows of the weights for each reading of more tokens.
    let row_tiles = if gated || token_tiles > 1 { 2 } else { 1 };
    let block_rows = if gated { 16 } else { 16 * row_tiles };
    let dtype = type_name(x.dtype()).unwrap_or_default();
    let group = w.group_size;
    let source = Source {
        name: format!("product_{dtype}_{token_tiles}_{row_tiles}_{group}_{gated}"),
        inputs: &[c"x", c"w", c"scales", c"biases", c"residual"],
        outputs: &[c"out"],
        part: PRODUCT,
    };
    let body = || {
        format!(
            "mlxd::quantized_rows<{dtype}, {token_tiles}, {row_tiles}, 1, 8, {group}, {gated}>(
                x, w, scales, biases, residual_shape[0] == x_shape[0] ? residual : nullptr, out, x_shape[0],
                w_shape[0], x_shape[1]);"
        )
    };
    // No residual: an array that has other sizes.
    let residual = residual.unwrap_or(w.scales);
    let launch = CudaLaunch { grid: [(made + block_rows - 1) / block_rows, 1, 1], threads: THREADS };
    // Affine by `takes_product`, which has biases.
    let inputs = [x, w.numbers, w.scales, w.biases.unwrap_or(w.scales), residual];
    only(source.run(body, &inputs, &[(&[rows, made], x.dtype())], launch)?)
}

/// Rotates the queries and keys of a fused projection `[rows, (heads + 2 * kv_heads) * head_dim]`, a pair
/// being an element of each half, and writes keys and values to their slab, in place. Returns the queries
/// `[rows, heads, head_dim]`; every reader of the new keys must depend on them.
pub(super) fn rotate_write(
    qkv: &Array,
    (keys, values): (&Array, &Array),
    places: &Places,
    wavelengths: &Array,
    heads: i32,
) -> Result<Array> {
    let (rows, kv_heads, head_dim) = (qkv.dim(0), keys.dim(1), keys.dim(3));
    let dtype = type_name(qkv.dtype()).unwrap_or_default();
    let source = Source {
        name: format!("rotate_{dtype}_{head_dim}"),
        inputs: &[c"qkv", c"keys", c"values", c"slots", c"positions", c"wavelengths"],
        outputs: &[c"q"],
        part: ATTENTION,
    };
    let body = || {
        format!(
            "mlxd::rotate_write<{dtype}, {head_dim}>(
                qkv, const_cast<{dtype}*>(keys), const_cast<{dtype}*>(values), slots, positions, wavelengths, q,
                qkv_shape[1] / {head_dim} - 2 * keys_shape[1], keys_shape[1], keys_shape[2]);"
        )
    };
    let launch = CudaLaunch { grid: [heads + 2 * kv_heads, rows, 1], threads: head_dim / 2 };
    let inputs = [qkv, keys, values, &places.slots, &places.positions, wavelengths];
    only(source.run(body, &inputs, &[(&[rows, heads, head_dim], qkv.dtype())], launch)?)
}

/// Returns the attention `[rows, heads * head_dim]` of one query a row, `[rows, heads, head_dim]`, over its
/// slot's positions up to its own.
pub(super) fn attend(queries: &Array, (keys, values): (&Array, &Array), places: &Places) -> Result<Array> {
    let (rows, heads, head_dim) = (queries.dim(0), queries.dim(1), queries.dim(2));
    let kv_heads = keys.dim(1);
    let group = heads / kv_heads;
    let dtype = type_name(queries.dtype()).unwrap_or_default();
    let whole = places.length <= WHOLE_LENGTH_MAX || rows * kv_heads >= BLOCKS_ENOUGH;
    let chunk = if whole { 0 } else { CHUNK };
    let chunks = if whole { 1 } else { (places.length + CHUNK - 1) / CHUNK };
    let arguments = "q, keys, values, slots, positions";
    let sizes = "keys_shape[1], keys_shape[2]";
    let template = || format!("mlxd::attend_chunk<{dtype}, {head_dim}, {group}, {chunk}>");
    let source = |outputs| Source {
        name: format!("attend_{dtype}_{head_dim}_{group}_{chunk}"),
        inputs: &[c"q", c"keys", c"values", c"slots", c"positions"],
        outputs,
        part: ATTENTION,
    };
    let inputs = [queries, keys, values, &places.slots, &places.positions];
    let launch = CudaLaunch { grid: [chunks, kv_heads, rows], threads: THREADS };
    let out: (&[i32], Dtype) = (&[rows, heads * head_dim], queries.dtype());
    if whole {
        let body = || format!("{}({arguments}, out, nullptr, nullptr, {sizes});", template());
        return only(source(&[c"out"]).run(body, &inputs, &[out], launch)?);
    }
    let body = || format!("{}({arguments}, nullptr, means, sums, {sizes});", template());
    let parts: [(&[i32], Dtype); 2] =
        [(&[rows, heads, chunks, head_dim], Dtype::Float32), (&[rows, heads, chunks, 2], Dtype::Float32)];
    let parts = source(&[c"means", c"sums"]).run(body, &inputs, &parts, launch)?;
    let join = Source {
        name: format!("join_{dtype}_{head_dim}"),
        inputs: &[c"means", c"sums", c"positions"],
        outputs: &[c"out"],
        part: ATTENTION,
    };
    let body = || {
        format!(
            "mlxd::attend_join<{dtype}, {head_dim}, {CHUNK}>(means, sums, positions, out, means_shape[2]);"
        )
    };
    let launch = CudaLaunch { grid: [heads, rows, 1], threads: head_dim };
    only(join.run(body, &[&parts[0], &parts[1], &places.positions], &[out], launch)?)
}
