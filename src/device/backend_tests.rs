//! Whole models, tiny and random: a verified draft gives what one token at a time gives, and a slot that was
//! cut back goes on as if it had never been longer.

#![allow(clippy::cast_precision_loss, reason = "the numbers here are small")]

use std::path::Path;
use std::sync::Arc;

use super::backend::MlxBackend;
use crate::backend::{
    Backend, ComputeDtype, KernelChoice, KvDtype, LoadSpec, LoadStep, ModelId, RowOutput, RowResult, Sample,
    SlotId, Span, SpanKind, Step, TruncateError, Want, WiredLimit,
};
use crate::error::Error;
use crate::hub::{ModelAssets, ModelFiles, ModelFolder};

const HIDDEN: usize = 32;
const VOCABULARY: usize = 40;
const PROMPT: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];
const DRAFT: [u32; 5] = [3, 5, 8, 9, 7];
const A: SlotId = SlotId { slab: 0, slot: 0 };
const B: SlotId = SlotId { slab: 0, slot: 1 };

/// Two layers: `llama`, which attends in both, or `lfm2`, which keeps states in the first.
fn write(folder: &Path, recurrent: bool) {
    let config = if recurrent {
        serde_json::json!({
            "model_type": "lfm2", "norm_eps": 1e-5, "conv_L_cache": 3, "block_ff_dim": 48,
            "block_auto_adjust_ff_dim": false,
            "full_attn_idxs": [1], "rope_theta": 1e4,
        })
    } else {
        serde_json::json!({ "model_type": "llama", "rms_norm_eps": 1e-5, "intermediate_size": 48 })
    };
    let mut config = config.as_object().unwrap().clone();
    let sizes = [("hidden_size", HIDDEN), ("num_hidden_layers", 2), ("num_attention_heads", 2)];
    let more = [("num_key_value_heads", 1), ("vocab_size", VOCABULARY), ("max_position_embeddings", 128)];
    config.extend(sizes.into_iter().chain(more).map(|(key, value)| (key.to_owned(), value.into())));
    std::fs::write(folder.join("config.json"), serde_json::Value::Object(config).to_string()).unwrap();

    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCABULARY, HIDDEN])];
    let mut add = |name: &str, shape: &[usize]| shapes.push((format!("model.{name}.weight"), shape.to_vec()));
    add(if recurrent { "embedding_norm" } else { "norm" }, &[HIDDEN]);
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize]| add(&format!("layers.{layer}.{name}"), shape);
        let attention: &[(&str, usize)] = &[("q_proj", 32), ("k_proj", 16), ("v_proj", 16)];
        if recurrent && layer == 0 {
            add("conv.conv", &[HIDDEN, 1, 3]);
            add("conv.in_proj", &[3 * HIDDEN, HIDDEN]);
            add("conv.out_proj", &[HIDDEN, HIDDEN]);
        } else {
            attention.iter().for_each(|(name, rows)| add(&format!("self_attn.{name}"), &[*rows, HIDDEN]));
            add(if recurrent { "self_attn.out_proj" } else { "self_attn.o_proj" }, &[HIDDEN, 32]);
        }
        if recurrent && layer == 1 {
            ["q_layernorm", "k_layernorm"].iter().for_each(|name| add(&format!("self_attn.{name}"), &[16]));
        }
        let mlp = if recurrent {
            ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
        } else {
            ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        };
        [[48, HIDDEN], [48, HIDDEN], [HIDDEN, 48]].iter().zip(mlp).for_each(|(shape, name)| add(name, shape));
        let norms = if recurrent {
            ["operator_norm", "ffn_norm"]
        } else {
            ["input_layernorm", "post_attention_layernorm"]
        };
        norms.iter().for_each(|name| add(name, &[HIDDEN]));
    }
    let mut state = 7_u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
    };
    // The format: the header's length, a header of JSON, and the data.
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in shapes {
        let from = data.len();
        data.extend((0..shape.iter().product::<usize>()).flat_map(|_| number()));
        let tensor =
            serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [from, data.len()] });
        header.insert(name, tensor);
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

struct Device {
    backend: MlxBackend,
    model: ModelId,
    _folder: tempfile::TempDir,
}

fn spec(folder: &Path) -> LoadSpec {
    let at = ModelFolder { name: "m".into(), path: folder.into(), revision: "1".into() };
    let files = Arc::new(ModelFiles::read(&at).unwrap());
    let vocabulary_size = files.facts.vocabulary_size;
    let assets = Arc::new(ModelAssets { files, vocabulary_size, ..ModelAssets::fake("m") });
    LoadSpec { assets, dtype: ComputeDtype::Float32, kv: KvDtype::Compute, quantize: None }
}

/// Both slots have the prompt, and a checkpoint at its end.
fn prompted(recurrent: bool) -> Device {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), recurrent);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let model = backend.load(backend.plan(&spec(folder.path()), 1 << 30)).unwrap();
    while !matches!(backend.load_more(model).unwrap(), LoadStep::Ready(_)) {}
    backend.open_slab(model, 0, 64, 2).unwrap();
    let mut device = Device { backend, model, _folder: folder };
    for slot in [A, B] {
        assert!(device.run(slot, 0, &PROMPT, SpanKind::Prefill).is_empty());
        device.backend.checkpoint(model, slot, 9).unwrap();
    }
    device
}

impl Device {
    /// Runs one span of a slot from `start` on, and returns what each row drew: token and logprob. A prefill
    /// draws nothing.
    fn run(&mut self, slot: SlotId, start: u32, tokens: &[u32], kind: SpanKind) -> Vec<(u32, f32)> {
        let sample = || Want::Sample(Sample { top_logprobs: Some(0), ..Sample::default() });
        let outputs = match kind {
            SpanKind::Prefill => Vec::new(),
            SpanKind::Decode | SpanKind::Verify => {
                (0..).zip(tokens).map(|(row, _)| RowOutput { row, want: sample() }).collect()
            }
        };
        let span = Span { slot, start, kind, tokens: tokens.to_vec(), outputs };
        self.backend.launch(self.model, Step { spans: vec![span] }).unwrap();
        let drawn = |result| match result {
            RowResult::Token(token, Some(logprobs)) => (token, logprobs.chosen.1),
            other => panic!("{other:?}"),
        };
        self.backend.collect(self.model).unwrap().into_iter().map(drawn).collect()
    }

    /// Runs the draft from its `from`th token on, one at a time.
    fn one_by_one(&mut self, slot: SlotId, from: usize) -> Vec<(u32, f32)> {
        (9..).zip(DRAFT).skip(from).flat_map(|(at, id)| self.run(slot, at, &[id], SpanKind::Decode)).collect()
    }
}

#[track_caller]
fn assert_alike(got: &[(u32, f32)], wanted: &[(u32, f32)]) {
    assert_eq!(got.len(), wanted.len());
    for (got, wanted) in got.iter().zip(wanted) {
        assert!(got.0 == wanted.0 && (got.1 - wanted.1).abs() < 1e-4, "{got:?} is not {wanted:?}");
    }
}

#[test]
fn a_verified_draft_draws_what_one_token_at_a_time_draws() {
    for recurrent in [false, true] {
        let mut device = prompted(recurrent);
        let at_once = device.run(A, 9, &DRAFT, SpanKind::Verify);
        assert_alike(&at_once, &device.one_by_one(B, 0));
    }
}

#[test]
fn a_slot_is_cut_back_where_its_states_allow() {
    for recurrent in [false, true] {
        let mut device = prompted(recurrent);
        let model = device.model;
        let wanted = device.one_by_one(B, 0);
        device.run(A, 9, &DRAFT, SpanKind::Verify);
        let to_middle = device.backend.truncate(model, A, 14, 11);
        if recurrent {
            assert_eq!(to_middle, Err(TruncateError::NoCheckpoint { tokens: 11 }));
        } else {
            assert_eq!(to_middle, Ok(()));
            assert_alike(&device.one_by_one(A, 2), &wanted[2..]);
        }
        device.backend.truncate(model, A, 14, 9).unwrap();
        assert_alike(&device.one_by_one(A, 0), &wanted);
    }
}

#[test]
fn a_slab_that_becomes_a_cache_is_restored_as_it_was() {
    for recurrent in [false, true] {
        let mut device = prompted(recurrent);
        let (model, [first, second]) = (device.model, [0, 1].map(|slot| SlotId { slab: 1, slot }));
        let wanted = device.one_by_one(B, 0);
        let parked = device.backend.park_slab(model, A, 9).unwrap();
        device.backend.open_slab(model, 1, 64, 2).unwrap();
        device.backend.restore(model, parked, 9, first).unwrap();
        device.backend.copy_slot(model, first, second, 9).unwrap();
        assert_alike(&device.one_by_one(first, 0), &wanted);
        assert_alike(&device.one_by_one(second, 0), &wanted);
    }
}

#[test]
fn a_slab_that_the_system_would_not_give_is_refused_and_the_model_goes_on() {
    let mut device = prompted(false);
    let refused = device.backend.open_slab(device.model, 1, 1 << 30, 1 << 12);
    let Err(Error::KvShortage { needed_bytes, available_bytes }) = refused else { panic!("{refused:?}") };
    assert!(available_bytes < needed_bytes);
    assert_eq!(device.one_by_one(A, 0).len(), DRAFT.len());
}

#[test]
fn a_load_goes_on_by_itself_and_a_file_that_is_cut_meanwhile_fails_it() {
    for cut in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), false);
        let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
        let model = backend.load(backend.plan(&spec(folder.path()), 1 << 30)).unwrap();
        // Its only file is open once the first piece was begun.
        while backend.load_more(model) == Ok(LoadStep::Pending) {}
        if cut {
            let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors"));
            file.unwrap().set_len(4096).unwrap();
        }
        let mut steps = std::iter::from_fn(|| Some(backend.load_more(model)));
        let end = steps.find(|step| !matches!(step, Ok(LoadStep::Pending | LoadStep::Reading { .. })));
        assert_eq!(matches!(end, Some(Ok(LoadStep::Ready(_)))), !cut, "{end:?}");
    }
}

#[test]
fn a_load_begins_without_a_look_at_the_files_and_reads_those_that_were_checked() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let (spec, file) = (spec(folder.path()), folder.path().join("model.safetensors"));
    let end = |backend: &mut MlxBackend, model| {
        let mut steps = std::iter::from_fn(|| Some(backend.load_more(model)));
        steps.find(|step| !matches!(step, Ok(LoadStep::Pending | LoadStep::Reading { .. }))).unwrap()
    };
    let whole = std::fs::read(&file).unwrap();
    // A pipe, which nobody writes to, takes the place of the file.
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    let piped = backend.load(backend.plan(&spec, 1 << 30)).expect("no file is looked at");
    assert!(matches!(end(&mut backend, piped), Err(Error::ModelInvalid { .. })));
    std::fs::remove_file(&file).unwrap();
    let gone = backend.load(backend.plan(&spec, 1 << 30)).unwrap();
    assert_eq!(end(&mut backend, gone), Err(Error::ModelUnloaded("m".into())), "it changed");
    std::fs::write(&file, &whole).unwrap();
    let again = self::spec(folder.path());
    let model = backend.load(backend.plan(&again, 1 << 30)).unwrap();
    while backend.load_more(model) == Ok(LoadStep::Pending) {}
    // It is open: another one under its name is not read.
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(end(&mut backend, model), Ok(LoadStep::Ready(_))));
}

#[test]
fn what_an_unloaded_model_held_is_free_when_the_memory_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let leaving = (0..3).map(|_| {
        let model = backend.load(backend.plan(&spec(folder.path()), 1 << 30)).unwrap();
        while !matches!(backend.load_more(model).unwrap(), LoadStep::Ready(_)) {}
        backend.open_slab(model, 0, 64, 2).unwrap();
        backend.unload(model).unwrap();
        assert!(backend.clear_slot(model, A, 1).is_err(), "it is gone at once");
        backend.memory();
        backend.is_leaving()
    });
    assert_eq!(leaving.collect::<Vec<_>>(), [false; 3]);
}
