//! The arrays of the fused path against what MLX's kernels for Metal take as they are. No Mac runs these
//! tests: the rules were read in MLX 0.32.2, and each names its place.

use std::cell::RefCell;

use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::transforms::eval;

use super::tests::{cache, columns, random, span};
use super::*;
use crate::backend::{Span, Step};
use crate::mlx::dim;
use crate::mlx::kv::{LayerState, TokenState};

/// A call of MLX's attention.
struct Call {
    queries: Array,
    keys: Array,
    values: Array,
    mask: Option<Array>,
}

thread_local! {
    /// The calls so far, where a test listens.
    static CALLS: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
}

/// Notes a call, if a test listens.
pub(super) fn record(queries: &Array, keys: &Array, values: &Array, mask: Option<&Array>) {
    CALLS.with_borrow_mut(|calls| {
        let Some(calls) = calls else { return };
        let (queries, keys, values) = (queries.clone(), keys.clone(), values.clone());
        calls.push(Call { queries, keys, values, mask: mask.cloned() });
    });
}

/// Which kernel a call runs in: mlx/backend/metal/scaled_dot_product_attention.cpp, `use_fallback` and
/// `eval_gpu`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kernel {
    /// Up to 8 queries a head.
    Vector,
    /// More.
    Full,
    /// None: composed of matrix products, which take any strides.
    Composed,
}

impl Call {
    fn kernel(&self) -> Kernel {
        let (rows, group) = (self.queries.dim(2), self.queries.dim(1) / self.keys.dim(1));
        let sizes = (self.queries.dim(3), self.values.dim(3));
        let vector = matches!(sizes, (64, 64) | (96, 96) | (128 | 192, 128) | (256, 256));
        let full = matches!(sizes, (64, 64) | (72, 72) | (80, 80) | (96, 96) | (128, 128));
        match rows {
            ..=8 if vector && rows * group <= 32 && rows <= self.keys.dim(2) => Kernel::Vector,
            9.. if full => Kernel::Full,
            _ => Kernel::Composed,
        }
    }
}

/// Whether the vector kernel takes keys or values as they are (`kv_copy_unless`): elements side by side, and
/// the heads of a slot right before those of the next.
fn takes_keys(array: &Array) -> bool {
    let (shape, strides) = (array.shape(), array.strides());
    let heads = usize::try_from(shape[1]).unwrap();
    strides[3] == 1 && (shape[0] == 1 || shape[1] == 1 || strides[0] == strides[1] * heads)
}

/// Whether it takes a mask as it is (`mask_copy_unless`), once that is spread over `[slots, heads, rows,
/// positions]` (mlx/fast.cpp, `scaled_dot_product_attention`): a size of one that is spread has no stride.
fn takes_mask(mask: &Array, queries: &Array) -> bool {
    let (slots, heads) = (queries.dim(0), queries.dim(1));
    if slots == 1 || heads == 1 {
        return true;
    }
    let [of_slots, of_heads, rows, _] = mask.shape() else { return false };
    // Masks of groups are made whole.
    *of_slots == slots && *of_heads == heads && *rows == queries.dim(2)
}

/// Whether the full kernel takes an array as it is (`is_matrix_contiguous`).
fn takes_rows(array: &Array) -> bool {
    array.strides().last() == Some(&1)
}

/// Runs steps in the fused path with a layer of this state; returns the calls.
fn calls(state: TokenState, int8: bool, steps: Vec<Vec<Span>>) -> Vec<Call> {
    let shape = KvShape { int8, ..cache(vec![LayerState::Tokens(state)]) };
    let (kernels, mut kv) = (KernelSet::Fused, Kv::new(shape.clone()));
    let step_shape = kernels.step_shape(&shape);
    kv.open(0, 64, 4).unwrap();
    let rope = Rope::new(state.head_dim, 10_000.0, false, None, None).unwrap();
    let sinks = state.sinks.then(|| random(&[state.heads], 9));
    CALLS.set(Some(Vec::new()));
    for (key, spans) in (0..).zip(steps) {
        let batch = Batch::new(&Step { spans }, &step_shape);
        let rotation = kernels.rotation(&rope, &batch.positions);
        let qkv = random(&[dim(batch.positions.len()), columns(state)], key);
        let weights = AttentionWeights { sinks: sinks.as_ref(), ..AttentionWeights::default() };
        let call =
            AttentionCall { layer: 0, stores: true, weights, eps: 1e-5, rope: Some((&rope, &rotation)) };
        let out = kernels.attend(&call, &batch, &mut kv, &qkv).unwrap();
        eval(std::iter::once(&out).chain(kv.touched(&batch.slabs))).unwrap();
    }
    let calls = CALLS.take().unwrap();
    for Call { queries, keys, values, mask } in &calls {
        eval([queries, keys, values].into_iter().chain(mask)).unwrap();
    }
    calls
}

/// Steps of every layout: chunks that are long, short and with a window; one token of one sequence, of
/// several that are equally long, of several that are not, and with a slot between that does not decode.
fn steps() -> Vec<Vec<Span>> {
    let one = |slot, start| span(slot, start, 1);
    vec![
        vec![span(0, 0, 20), span(1, 0, 20), span(2, 0, 5)],
        vec![one(0, 20)],
        vec![one(0, 21), one(1, 20), span(2, 5, 3)],
        vec![one(0, 22), one(1, 21), one(2, 8)],
        vec![one(0, 23), one(2, 9)],
        vec![one(0, 24), one(1, 22)],
        vec![one(1, 23), one(2, 10)],
    ]
}

#[test]
fn metal_takes_keys_values_and_masks_as_they_are() {
    let plain = TokenState::new(8, 2, 64);
    let states = [
        plain,
        TokenState::new(4, 4, 128),
        TokenState::new(8, 1, 256),
        TokenState::new(4, 2, 80),
        TokenState { window: 8, ..plain },
        TokenState { sinks: true, ..plain },
        // Latent attention: values are the end of the keys.
        TokenState { values_from: 64, kv_heads: 1, head_dim: 192, ..plain },
    ];
    let mut kernels = Vec::new();
    for (state, int8) in states.into_iter().flat_map(|state| [(state, false), (state, true)]) {
        for call in calls(state, int8, steps()) {
            let Call { queries, keys, values, mask } = &call;
            let what = format!("{state:?}, int8 {int8}: {:?} over {:?}", queries.shape(), keys.shape());
            match call.kernel() {
                Kernel::Vector => {
                    // Queries of several slots are copied: one token of each.
                    assert!(takes_keys(keys), "{what}: keys {:?}", keys.strides());
                    assert!(takes_keys(values), "{what}: values {:?}", values.strides());
                    let taken =
                        mask.as_ref().is_none_or(|mask| takes_mask(mask, queries) && takes_rows(mask));
                    assert!(taken, "{what}: mask {:?}", mask.as_ref().map(Array::shape));
                }
                Kernel::Full => {
                    let arrays = [queries, keys, values].into_iter().chain(mask);
                    assert!(arrays.into_iter().all(takes_rows), "{what}");
                }
                Kernel::Composed => {}
            }
            kernels.push(call.kernel());
        }
    }
    for kernel in [Kernel::Vector, Kernel::Full, Kernel::Composed] {
        assert!(kernels.contains(&kernel), "no call runs in {kernel:?}");
    }
}

#[test]
fn half_of_a_slab_of_keys_and_values_would_be_copied() {
    let slab = random(&[2, 4, 8, 64], 1);
    let keys = slab.try_index((.., ..2, ..5, ..)).unwrap();
    let whole = slab.try_index((.., .., ..5, ..)).unwrap();
    eval([&keys, &whole]).unwrap();
    assert!(!takes_keys(&keys) && takes_keys(&whole));
}
