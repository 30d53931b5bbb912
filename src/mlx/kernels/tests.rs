//! Every kernel set of the machine's CPU attends alike, and changes slabs in place.

use mlx_rs::memory;
use mlx_rs::ops;
use mlx_rs::transforms::eval;

use super::*;
use crate::backend::{SlotId, Span, SpanKind, Step};
use crate::mlx::dim;
use crate::mlx::kv::{LayerState, TokenState};

/// All sets, with the instruction set that is to be put to use for it.
fn sets() -> Vec<(Option<String>, KernelSet)> {
    let ours = Selection { choice: KernelChoice::Auto, on_cpu: true }.set(Dtype::Float32);
    let of_sets = ffi::instruction_sets().into_iter().map(|name| (Some(name), ours));
    of_sets.chain([(None, KernelSet::Composed), (None, KernelSet::Fused)]).collect()
}

/// Runs `test` on every set. Other tests may run on an instruction set that is slower meanwhile.
fn for_every_set(mut test: impl FnMut(&str, KernelSet)) {
    let fastest = ffi::instruction_sets().into_iter().next();
    for (instructions, kernels) in sets() {
        if let Some(instructions) = &instructions {
            assert!(ffi::use_instruction_set(instructions));
        }
        test(&instructions.unwrap_or_else(|| kernels.name()), kernels);
    }
    assert!(fastest.is_none_or(|fastest| ffi::use_instruction_set(&fastest)));
}

pub(super) fn cache(layers: Vec<LayerState>) -> KvShape {
    KvShape { layers, dtype: Dtype::Float32, int8: false }
}

pub(super) fn span(slot: u32, start: u32, count: usize) -> Span {
    let slot = SlotId { slab: 0, slot };
    Span { slot, start, kind: SpanKind::Prefill, tokens: vec![1; count], outputs: vec![] }
}

/// Returns the bytes that one step of one token adds to the memory in use, in a slab of 64 MiB.
fn step_bytes(kernels: KernelSet) -> usize {
    let shape = cache(vec![LayerState::Tokens(TokenState::new(4, 2, 64)); 2]);
    let step_shape = kernels.step_shape(&shape);
    let rope = Rope::new(64, 10_000.0, false, None, None).unwrap();
    let mut kv = Kv::new(shape);
    kv.open(0, 1 << 14, 4).unwrap();
    let mut largest = 0;
    for start in 0..3 {
        let batch = Batch::new(&Step { spans: vec![span(2, start, 1)] }, &step_shape);
        let rotation = kernels.rotation(&rope, &batch.positions);
        let before = memory::active_memory().unwrap();
        memory::reset_peak_memory().unwrap();
        let qkv = ops::ones::<f32>(&[1, 8 * 64]).unwrap();
        let layers = (0..2).map(|layer| {
            let (weights, rope) = (AttentionWeights::default(), Some((&rope, &rotation)));
            let call = AttentionCall { layer, stores: true, weights, eps: 0.0, rope };
            kernels.attend(&call, &batch, &mut kv, &qkv).unwrap()
        });
        let outputs: Vec<Array> = layers.collect();
        eval(outputs.iter().chain(kv.touched(&batch.slabs))).unwrap();
        largest = largest.max(memory::peak_memory().unwrap().saturating_sub(before));
    }
    largest
}

#[test]
fn a_slab_is_changed_in_place() {
    let slab = 4 * 4 * (1 << 14) * 64 * 4;
    for_every_set(|name, kernels| {
        let added = step_bytes(kernels);
        assert!(added < slab / 4, "{name}: a step takes {added} bytes beside slabs of {slab}");
    });
}

/// Weights of a layer's attention, and its rotation.
struct Setting {
    state: TokenState,
    norms: Option<(Array, Array)>,
    sinks: Option<Array>,
    rope: Option<Rope>,
}

/// Returns the columns of a token's queries, keys and values.
pub(super) fn columns(state: TokenState) -> i32 {
    let stored = if state.values_from > 0 { 1 } else { 2 };
    (state.heads + stored * state.kv_heads) * state.head_dim
}

pub(super) fn random(shape: &[i32], key: u64) -> Array {
    let key = mlx_rs::random::key(key).unwrap();
    mlx_rs::random::normal::<f32>(shape, None, None, Some(&key)).unwrap()
}

fn largest(x: &Array) -> f32 {
    x.abs().unwrap().max(None).unwrap().item_exact::<f32>()
}

/// Returns the outputs of two steps of several sequences: chunks of two, then one token of each and another's
/// chunk.
fn outputs(kernels: KernelSet, setting: &Setting) -> Vec<Array> {
    let state = setting.state;
    let shape = cache(vec![LayerState::Tokens(state)]);
    let step_shape = kernels.step_shape(&shape);
    let mut kv = Kv::new(shape);
    kv.open(0, 64, 4).unwrap();
    let steps = [vec![span(0, 0, 9), span(2, 0, 5)], vec![span(0, 9, 1), span(2, 5, 1), span(1, 0, 7)]];
    let run = |(key, spans): (u64, Vec<Span>)| {
        let batch = Batch::new(&Step { spans }, &step_shape);
        let rotation = setting.rope.as_ref().map(|rope| kernels.rotation(rope, &batch.positions));
        let qkv = random(&[dim(batch.positions.len()), columns(state)], key);
        let (q_norm, k_norm) = setting.norms.as_ref().map(|(q, k)| (q, k)).unzip();
        let weights = AttentionWeights { q_norm, k_norm, v_norm: None, sinks: setting.sinks.as_ref() };
        let rope = setting.rope.as_ref().zip(rotation.as_ref());
        let call = AttentionCall { layer: 0, stores: true, weights, eps: 1e-5, rope };
        let out = kernels.attend(&call, &batch, &mut kv, &qkv).unwrap();
        eval(std::iter::once(&out).chain(kv.touched(&batch.slabs))).unwrap();
        out
    };
    (0..).zip(steps).map(run).collect()
}

/// Largest difference of two sets: a sum of `n` terms is wrong by up to `n` roundings of the sum of their
/// absolute values. For scores of normally distributed queries and keys that sum is below 8; for outputs it
/// is the largest value, about 4.
const BOUND: f32 = f32::EPSILON * (32.0 * 8.0 + 16.0 + 16.0) * 4.0;

#[test]
fn every_set_attends_alike() {
    let plain = TokenState::new(4, 2, 32);
    let rope = |dims| Some(Rope::new(dims, 10_000.0, false, None, None).unwrap());
    let yarn = serde_json::json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let yarn = Some(Rope::new(16, 10_000.0, true, Some(&yarn), None).unwrap());
    let norms = Some((random(&[32], 7), random(&[32], 8)));
    let bare = |state| Setting { state, norms: None, sinks: None, rope: rope(32) };
    let settings = [
        bare(plain),
        Setting { rope: None, ..bare(plain) },
        Setting { rope: rope(16), norms, ..bare(plain) },
        Setting { rope: yarn, ..bare(TokenState { values_from: 16, kv_heads: 1, ..plain }) },
        bare(TokenState { window: 4, ..plain }),
        bare(TokenState { softcap: 2.0, scale: 0.3, ..plain }),
        bare(TokenState { softcap: 2.0, window: 4, ..plain }),
        Setting { sinks: Some(random(&[4], 9)), ..bare(TokenState { sinks: true, ..plain }) },
    ];
    let expected: Vec<_> = settings.iter().map(|setting| outputs(KernelSet::Composed, setting)).collect();
    for_every_set(|name, kernels| {
        for (index, (setting, expected)) in settings.iter().zip(&expected).enumerate() {
            for (got, wanted) in outputs(kernels, setting).iter().zip(expected) {
                assert_eq!(got.shape(), wanted.shape());
                let apart = largest(&got.subtract(wanted).unwrap());
                assert!(apart < BOUND, "setting {index}, {name}: {apart} of {BOUND}");
            }
        }
    });
}

#[test]
fn a_set_that_the_machine_does_not_have_is_refused_with_those_that_it_has() {
    let here = Selection { choice: KernelChoice::Auto, on_cpu: true }.available();
    let missing = KernelChoice::ALL.into_iter().find(|choice| !here.contains(&choice.as_str().to_owned()));
    let missing = missing.unwrap();
    let error = select(missing, true).unwrap_err();
    let wanted = format!("does not have {:?}; it has {}", missing.as_str(), here.join(", "));
    assert!(
        matches!(&error, Error::InvalidField { field, why } if field == "kernels" && why.ends_with(&wanted))
    );
    let on_gpu = select(KernelChoice::Plain, false).unwrap_err();
    assert!(on_gpu.to_string().ends_with("it has auto, composed, fused"), "{on_gpu}");
}
