//! Whole models, tiny and random: a verified draft gives what one token at a time gives, and a slot that was
//! cut back goes on as if it had never been longer.

#![allow(clippy::cast_precision_loss, reason = "the numbers here are small")]

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use super::backend::MlxBackend;
use crate::backend::{
    Backend, ComputeDtype, Formats, KernelChoice, KvDtype, KvLayout, LoadSpec, LoadStep, ModelId, ParkedId,
    Parking, Restoring, RowOutput, RowResult, Sample, SlotId, Span, SpanKind, Step, TruncateError, Want,
    WiredLimit,
};
use crate::error::Error;
use crate::hub::{ModelAssets, ModelFiles, ModelFolder, WeightSizes};
use crate::mlx::ffi::STUCK;

const HIDDEN: usize = 32;
const VOCABULARY: usize = 40;
pub(super) const PROMPT: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];
pub(super) const DRAFT: [u32; 5] = [3, 5, 8, 9, 7];
/// Time after which what a test holds is let go, so that it fails and does not hang.
const DEADLINE: Duration = Duration::from_secs(20);
pub(super) const A: SlotId = SlotId { slab: 0, slot: 0 };
pub(super) const B: SlotId = SlotId { slab: 0, slot: 1 };

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

pub(super) struct Device {
    pub(super) backend: MlxBackend,
    pub(super) model: ModelId,
    pub(super) layout: Arc<KvLayout>,
    folder: tempfile::TempDir,
}

fn spec(folder: &Path) -> LoadSpec {
    let at = ModelFolder { name: "m".into(), path: folder.into(), revision: "1".into() };
    let files = Arc::new(ModelFiles::read(&at).unwrap());
    let vocabulary_size = files.facts.vocabulary_size;
    let assets = Arc::new(ModelAssets { files, vocabulary_size, ..ModelAssets::fake("m") });
    let formats = Formats { dtype: ComputeDtype::Float32, kv: KvDtype::Compute, quantize: None };
    LoadSpec::new(assets, formats).unwrap()
}

fn prompted(recurrent: bool) -> Device {
    prompted_in(recurrent, KvDtype::Compute)
}

/// Both slots have the prompt, and a checkpoint at its end.
pub(super) fn prompted_in(recurrent: bool, kv: KvDtype) -> Device {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), recurrent);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let mut spec = spec(folder.path());
    spec.formats.kv = kv;
    let model = backend.load(backend.plan(&spec, 1 << 30).unwrap()).unwrap();
    let layout = loop {
        if let LoadStep::Ready(shape) = backend.load_more(model).unwrap() {
            break shape.kv_layout;
        }
    };
    backend.open_slab(model, 0, 64, 2).unwrap();
    let mut device = Device { backend, model, layout, folder };
    for slot in [A, B] {
        assert!(device.run(slot, 0, &PROMPT, SpanKind::Prefill).is_empty());
        device.backend.checkpoint(model, slot, 9).unwrap();
    }
    device
}

impl Device {
    /// Runs one span of a slot from `start` on, and returns what each row drew: token and logprob. A prefill
    /// draws nothing.
    pub(super) fn run(
        &mut self,
        slot: SlotId,
        start: u32,
        tokens: &[u32],
        kind: SpanKind,
    ) -> Vec<(u32, f32)> {
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
pub(super) fn assert_alike(got: &[(u32, f32)], wanted: &[(u32, f32)]) {
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
        let parked = ParkedId(7);
        device.backend.park_slab(model, Parking { id: parked, slot: A, tokens: 9, base: None }).unwrap();
        device.backend.open_slab(model, 1, 64, 2).unwrap();
        device
            .backend
            .restore(model, Restoring { id: parked, tokens: 9, slot: first, held: 0, used: 0 })
            .unwrap();
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

/// Returns how a load ends.
fn end(backend: &mut MlxBackend, model: ModelId) -> Result<LoadStep, Error> {
    let mut steps = std::iter::from_fn(|| Some(backend.load_more(model)));
    let goes_on = |step: &Result<LoadStep, Error>| {
        matches!(step, Ok(LoadStep::Opening | LoadStep::Pending | LoadStep::Reading { .. }))
    };
    steps.find(|step| !goes_on(step)).unwrap()
}

#[test]
fn a_load_goes_on_by_itself_and_a_file_that_is_cut_meanwhile_fails_it() {
    for cut in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), false);
        let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
        let model = backend.load(backend.plan(&spec(folder.path()), 1 << 30).unwrap()).unwrap();
        // Its only file is open once the first piece was begun.
        while backend.load_more(model) == Ok(LoadStep::Opening) {}
        if cut {
            let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors"));
            file.unwrap().set_len(4096).unwrap();
        }
        let end = end(&mut backend, model);
        assert_eq!(matches!(end, Ok(LoadStep::Ready(_))), !cut, "{end:?}");
    }
}

#[test]
fn a_load_begins_without_a_look_at_the_files_and_reads_those_that_were_checked() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let (spec, file) = (spec(folder.path()), folder.path().join("model.safetensors"));
    let whole = std::fs::read(&file).unwrap();
    // A pipe, which nobody writes to, takes the place of the file.
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    let piped = backend.load(backend.plan(&spec, 1 << 30).unwrap()).expect("no file is looked at");
    assert!(matches!(end(&mut backend, piped), Err(Error::ModelInvalid { .. })));
    std::fs::remove_file(&file).unwrap();
    let gone = backend.load(backend.plan(&spec, 1 << 30).unwrap()).unwrap();
    assert_eq!(end(&mut backend, gone), Err(Error::ModelUnloaded("m".into())), "it changed");
    std::fs::write(&file, &whole).unwrap();
    let again = self::spec(folder.path());
    let model = backend.load(backend.plan(&again, 1 << 30).unwrap()).unwrap();
    while backend.load_more(model) == Ok(LoadStep::Opening) {}
    // It is open: another one under its name is not read.
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(end(&mut backend, model), Ok(LoadStep::Ready(_))));
}

/// Holds a thread that frees it until the test lets go, or the time is over.
struct Held(Receiver<()>);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.recv_timeout(DEADLINE);
    }
}

#[test]
fn nobody_waits_for_the_memory_of_an_unloaded_model_but_the_next_load() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let model = backend.load(backend.plan(&spec(folder.path()), 1 << 30).unwrap()).unwrap();
    assert!(matches!(end(&mut backend, model), Ok(LoadStep::Ready(_))));
    let (let_go, held) = sync_channel(1);
    backend.free(Held(held));
    backend.unload(model).unwrap();
    assert!(backend.clear_slot(model, A, 1).is_err(), "it is gone at once");
    backend.memory();
    backend.budget_bytes();
    backend.trim().unwrap();
    let next = backend.load(backend.plan(&spec(folder.path()), 1 << 30).unwrap()).unwrap();
    while backend.load_more(next).unwrap() == LoadStep::Opening {}
    let steps: Vec<LoadStep> = (0..100).map(|_| backend.load_more(next).unwrap()).collect();
    assert!(steps.iter().all(|step| *step == LoadStep::Pending), "nothing was waited for");
    assert!(backend.is_leaving().unwrap());
    let_go.send(()).unwrap();
    assert!(matches!(end(&mut backend, next), Ok(LoadStep::Ready(_))));
    assert!(!backend.is_leaving().unwrap());
}

#[test]
fn a_read_that_hangs_in_a_load_that_was_given_up_stops_nobody() {
    let [hanging, next] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    [&hanging, &next].iter().for_each(|folder| write(folder.path(), false));
    let file = |name: &str| hanging.path().join(name);
    std::fs::rename(file("model.safetensors"), file("model-stuck.safetensors")).unwrap();
    let (mut backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let running = backend.load(backend.plan(&spec(next.path()), 1 << 30).unwrap()).unwrap();
    assert!(matches!(end(&mut backend, running), Ok(LoadStep::Ready(_))));
    let (let_go, held) = sync_channel::<()>(1);
    let hold = move || {
        let _stuck = STUCK.lock();
        held.recv_timeout(DEADLINE)
    };
    let holder = std::thread::Builder::new().name("holder".into()).spawn(hold).unwrap();
    while STUCK.try_lock().is_ok() {}
    let model = backend.load(backend.plan(&spec(hanging.path()), 1 << 30).unwrap()).unwrap();
    // Frequencies and head are looked at; then the embedding is read.
    let pieces = std::iter::from_fn(|| Some(backend.load_more(model).unwrap()));
    pieces.filter(|step| matches!(step, LoadStep::Reading { .. })).nth(2).unwrap();
    assert_eq!(backend.load_more(model), Ok(LoadStep::Pending));
    backend.unload(model).unwrap();
    let model = backend.load(backend.plan(&spec(next.path()), 1 << 30).unwrap()).unwrap();
    while backend.load_more(model).unwrap() == LoadStep::Opening {}
    backend.open_slab(running, 0, 64, 1).unwrap();
    for tokens in 0..100 {
        assert_eq!(backend.load_more(model), Ok(LoadStep::Pending), "the stream is in use");
        let span = Span { slot: A, start: tokens, kind: SpanKind::Prefill, tokens: vec![1], outputs: vec![] };
        if tokens < 9 {
            backend.launch(running, Step { spans: vec![span] }).unwrap();
            backend.collect(running).unwrap();
        }
    }
    assert!(let_go.send(()).is_ok(), "it still hung");
    assert_eq!(holder.join().unwrap(), Ok(()));
    assert!(matches!(end(&mut backend, model), Ok(LoadStep::Ready(_))));
}

#[test]
fn what_the_config_forbids_is_told_by_the_plan() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let at = folder.path().join("config.json");
    let config = std::fs::read_to_string(&at).unwrap();
    std::fs::write(&at, config.replace("\"llama\"", "\"gpt_neox\"")).unwrap();
    let refused = backend.plan(&spec(folder.path()), 1 << 30);
    assert!(matches!(refused, Err(Error::ModelUnsupported { .. })), "{refused:?}");
    std::fs::write(&at, config.replace("\"rms_norm_eps\"", "\"eps\"")).unwrap();
    let refused = backend.plan(&spec(folder.path()), 1 << 30);
    assert!(matches!(refused, Err(Error::ModelInvalid { .. })), "{refused:?}");
}

#[test]
fn a_plan_takes_the_sizes_that_were_counted_for_it() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), false);
    let (backend, _) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    let sizes = WeightSizes { plain_elements: 1000, ..WeightSizes::default() };
    let plan = backend.plan(&LoadSpec { sizes, ..spec(folder.path()) }, 1 << 30).unwrap();
    assert_eq!((plan.needed_bytes, plan.kv_bytes), (4000, 500));
}

#[test]
fn weights_that_the_system_would_not_give_are_refused_and_other_models_go_on() {
    let (_, info) = MlxBackend::new(KernelChoice::Auto, WiredLimit::Never).unwrap();
    if info.device != "cpu" {
        return; // Where MLX asks, it is not asked before.
    }
    let mut device = prompted(false);
    let large = WeightSizes { plain_elements: 1 << 55, ..WeightSizes::default() };
    let spec = LoadSpec { sizes: large, ..spec(device.folder.path()) };
    let plan = device.backend.plan(&spec, 1 << 30).unwrap();
    let needed_bytes = plan.reserved_bytes();
    let refused = device.backend.load(plan).unwrap();
    let end = end(&mut device.backend, refused);
    let Ok(LoadStep::Short { available_bytes }) = end else { panic!("{end:?}") };
    assert!(available_bytes < needed_bytes);
    assert_eq!(device.one_by_one(A, 0).len(), DRAFT.len());
    device.backend.unload(refused).unwrap();
    let spec = self::spec(device.folder.path());
    let next = device.backend.load(device.backend.plan(&spec, 1 << 30).unwrap()).unwrap();
    assert!(matches!(self::end(&mut device.backend, next), Ok(LoadStep::Ready(_))));
}
