//! Conversions of tiny models, whole and hostile.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tokenizers::Tokenizer;

use super::testing::{Builder, data, llama};
use super::*;
use crate::hub::inspect;
use crate::hub::read::read_config;

/// Converts without MLX, as the file is.
fn convert(file: &Path, out: &Path, overwrite: bool, watch: &mut Watch<'_>) -> Result<Converted, HubError> {
    let job = GgufConversion { file, out, overwrite, dtype: None, quantization: None };
    convert_gguf(&job, &mut Unused, watch)
}

/// No quantizer: nothing is quantized anew.
struct Unused;

impl Quantizer for Unused {
    fn quantize(&mut self, _: &[u8], _: usize, _: Dtype, _: QuantFormat) -> Result<Vec<Vec<u8>>, HubError> {
        panic!("nothing is quantized anew")
    }
}

struct Run {
    folder: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn convert(&self, builder: &Builder) -> Result<Converted, HubError> {
        let path = self.folder.path().join("m.gguf");
        builder.write(&path);
        convert(&path, &self.out(), false, &mut |_, _| ControlFlow::Continue(()))
    }

    fn bytes(&self, tensor: &str) -> Vec<u8> {
        let file = fs::read(self.out().join("model.safetensors")).unwrap();
        safetensors::SafeTensors::deserialize(&file).unwrap().tensor(tensor).unwrap().data().to_vec()
    }
}

fn refusal(builder: &Builder) -> String {
    let run = Run::new();
    let error = run.convert(builder).unwrap_err();
    assert!(!run.out().exists());
    let left = fs::read_dir(run.folder.path()).unwrap().count();
    assert_eq!(left, 1, "only the GGUF file is left");
    error.to_string()
}

#[test]
fn a_model_becomes_a_folder_that_inspect_accepts() {
    let run = Run::new();
    let mut seen = Vec::new();
    let path = run.folder.path().join("m.gguf");
    llama().write(&path);
    let mut watch = |done, total| {
        seen.push((done, total));
        ControlFlow::Continue(())
    };
    let converted = convert(&path, &run.out(), false, &mut watch).unwrap();
    assert_eq!((converted.bits, converted.rounded.len()), (Some(4), 0));
    assert!(seen.is_sorted() && seen[0].0 == 0 && seen.last().unwrap().0 == seen[0].1);
    let weights = inspect(&run.out()).unwrap();
    assert_eq!((weights.tensors_count, weights.bytes), (converted.tensors_count, converted.bytes));
    assert_eq!(weights.tensors_count, 3 + 2 * (7 * 3 + 2) + 1);
    let find = |name: &str| weights.tensors().find(|tensor| tensor.name == name).unwrap().clone();
    let down = find("model.layers.1.mlp.down_proj.weight");
    assert_eq!((down.dtype, down.shape), (Dtype::U32, vec![64, 12]));
    assert_eq!(find("model.layers.1.mlp.down_proj.scales").shape, [64, 3]);
    assert_eq!(find("model.norm.weight").dtype, Dtype::F32);
    assert!(weights.tensors().all(|tensor| !tensor.name.starts_with("lm_head")));
    let config = read_config(&run.out()).unwrap();
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(config["rms_norm_eps"].to_string(), "0.00001");
    assert_eq!(config["quantization"], config["quantization_config"]);
    assert_eq!(config["quantization"]["bits"], 4);
    assert_eq!(config["quantization"]["model.embed_tokens"]["bits"], 8);
    assert_eq!(config["eos_token_id"], 1);
}

#[test]
fn rows_of_q_and_k_come_back_in_order_and_others_stay() {
    let run = Run::new();
    let mut builder = llama();
    for part in ["q", "k", "v"] {
        let dims = [64, if part == "q" { 64 } else { 32 }];
        builder.tensor(&format!("blk.0.attn_{part}.weight"), &dims, 0, data(blocks::Kind::F32, &dims));
    }
    run.convert(&builder).unwrap();
    let first = |part: &str| -> Vec<f32> {
        let bytes = run.bytes(&format!("model.layers.0.self_attn.{part}_proj.weight"));
        bytes.chunks_exact(256).map(|row| f32::from_le_bytes(row[..4].try_into().unwrap())).collect()
    };
    // Row r of the source starts with r. Within a head of 32, row j of half h was stored at 2j + h.
    let head: Vec<f32> = (0..32).map(|r| (r % 16 * 2 + r / 16) as f32).collect();
    let second: Vec<f32> = head.iter().map(|row| row + 32.0).collect();
    assert_eq!(first("q"), [head.clone(), second].concat());
    assert_eq!(first("k"), head);
    assert_eq!(first("v"), (0..32).map(|r| r as f32).collect::<Vec<_>>());
}

#[test]
fn biases_an_own_head_and_rounded_tensors_are_carried_over() {
    let run = Run::new();
    let mut builder = llama();
    for layer in 0..2 {
        for (part, len) in [("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)] {
            let bias = data(blocks::Kind::F32, &[len]);
            builder.tensor(&format!("blk.{layer}.{part}.bias"), &[len], 0, bias);
        }
    }
    let vocab = 264;
    builder.tensor("output.weight", &[64, vocab], 1, data(blocks::Kind::F16, &[64, vocab]));
    let converted = run.convert(&builder).unwrap();
    let config = read_config(&run.out()).unwrap();
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(config["quantization"]["lm_head"], false);
    assert_eq!(run.bytes("lm_head.weight"), data(blocks::Kind::F16, &[64, vocab]));
    let bias = run.bytes("model.layers.0.self_attn.q_proj.bias");
    assert_eq!(f32::from_le_bytes(bias[4..8].try_into().unwrap()), 2.0 / 64.0);
    assert_eq!(converted.rounded, Vec::<String>::new());
    builder.drop_tensor("blk.1.attn_output.bias");
    assert!(refusal(&builder).contains("has no tensor blk.1.attn_output.bias"));
}

/// The test's llama as another architecture, with biases in each layer.
fn with_biases(architecture: &str, parts: &[&str]) -> Builder {
    let mut builder = llama();
    builder.text("general.architecture", architecture);
    for (key, value) in [
        ("block_count", 2),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 32),
    ] {
        builder.uint(&format!("{architecture}.{key}"), value);
    }
    for (layer, part) in (0..2).flat_map(|layer| parts.iter().map(move |part| (layer, part))) {
        let len = match *part {
            "attn_k" | "attn_v" => 32,
            "ffn_gate" | "ffn_up" => 96,
            _ => 64,
        };
        builder.tensor(&format!("blk.{layer}.{part}.bias"), &[len], 0, data(blocks::Kind::F32, &[len]));
    }
    builder
}

#[test]
fn biases_that_no_config_can_say_are_refused() {
    let qkv = ["attn_q", "attn_k", "attn_v"];
    let attention = [&qkv[..], &["attn_output"]].concat();
    let mlp = ["ffn_gate", "ffn_up", "ffn_down"];
    for (architecture, parts) in [
        ("llama", &qkv[..]),
        ("llama", &["attn_output"]),
        ("llama", &["attn_k"]),
        ("llama", &["ffn_up"]),
        ("llama", &[&attention[..], &["ffn_gate"]].concat()),
        ("qwen2", &[]),
        ("qwen2", &attention),
        ("qwen2", &[&qkv[..], &mlp].concat()),
        ("qwen3", &qkv),
        ("gemma3", &attention),
        ("phi3", &["attn_output"]),
    ] {
        let message = refusal(&with_biases(architecture, parts));
        let found = if parts.is_empty() { "none".to_owned() } else { parts.join(", ") };
        let expected = format!("no config of {architecture} has these biases: {found}");
        assert_eq!(message, expected);
    }
    for (architecture, parts) in
        [("llama", &mlp[..]), ("llama", &[&attention[..], &mlp].concat()), ("qwen2", &qkv)]
    {
        let run = Run::new();
        run.convert(&with_biases(architecture, parts)).unwrap();
        let config = read_config(&run.out()).unwrap();
        assert_eq!(config["mlp_bias"] == true, parts.contains(&"ffn_up"), "{architecture}: {parts:?}");
    }
}

#[test]
fn q6_k_is_named_as_rounded() {
    let run = Run::new();
    let mut builder = llama();
    // 256 is the shortest row a K format has.
    builder.uint("llama.feed_forward_length", 256);
    for layer in 0..2 {
        for (part, dims) in [("ffn_gate", [64, 256]), ("ffn_up", [64, 256]), ("ffn_down", [256, 64])] {
            let (kind, code) =
                if part == "ffn_down" { (blocks::Kind::Q6K, 14) } else { (blocks::Kind::Q5_0, 6) };
            builder.tensor(&format!("blk.{layer}.{part}.weight"), &dims, code, data(kind, &dims));
        }
    }
    let converted = run.convert(&builder).unwrap();
    assert_eq!(converted.rounded, ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]);
    let config = read_config(&run.out()).unwrap();
    assert_eq!(config["quantization"]["model.layers.0.mlp.down_proj"], false);
    assert_eq!(config["quantization"]["model.layers.0.mlp.up_proj"]["bits"], 5);
    let weights = inspect(&run.out()).unwrap();
    let up = weights.tensors().find(|tensor| tensor.name == "model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!(up.shape, [256, 10]);
}

#[test]
fn a_quantized_tensor_of_one_dimension_is_refused() {
    // Rows of a whole block of every format.
    let hidden = 256;
    for (kind, code) in [(blocks::Kind::Q6K, 14), (blocks::Kind::Q4K, 12), (blocks::Kind::Q8_0, 8)] {
        let mut builder = llama();
        builder.uint("llama.embedding_length", 256).uint("llama.attention.key_length", 32);
        for (name, dims) in shapes(hidden) {
            builder.tensor(&name, &dims, 0, data(blocks::Kind::F32, &dims));
        }
        Run::new().convert(&builder).unwrap();
        builder.tensor("blk.1.ffn_norm.weight", &[hidden], code, data(kind, &[hidden]));
        assert_eq!(refusal(&builder), "tensor blk.1.ffn_norm.weight is quantized, but no matrix");
    }
}

/// The tensors of the test's llama with another hidden size.
fn shapes(hidden: u64) -> Vec<(String, Vec<u64>)> {
    let layer = |layer: u32| {
        let matrices = [
            ("attn_q", [hidden, 64]),
            ("attn_k", [hidden, 32]),
            ("attn_v", [hidden, 32]),
            ("attn_output", [64, hidden]),
            ("ffn_gate", [hidden, 96]),
            ("ffn_up", [hidden, 96]),
            ("ffn_down", [96, hidden]),
        ];
        let matrices = matrices.map(|(part, dims)| (format!("blk.{layer}.{part}.weight"), dims.to_vec()));
        let norms =
            ["attn_norm", "ffn_norm"].map(|part| (format!("blk.{layer}.{part}.weight"), vec![hidden]));
        matrices.into_iter().chain(norms)
    };
    let ends = [("token_embd.weight", vec![hidden, 264]), ("output_norm.weight", vec![hidden])];
    let ends = ends.map(|(name, dims)| (name.to_owned(), dims));
    (0..2).flat_map(layer).chain(ends).collect()
}

#[test]
fn the_tokenizer_encodes_as_its_pre_tokenizer_says() {
    let encode = |pre: &str, text: &str| {
        let run = Run::new();
        let mut builder = llama();
        builder.text("tokenizer.ggml.pre", pre);
        run.convert(&builder).unwrap();
        let tokenizer = Tokenizer::from_file(run.out().join("tokenizer.json")).unwrap();
        let encoded = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(encoded.get_ids(), true).unwrap(), text.replace("</s>", ""));
        encoded.get_tokens().to_vec()
    };
    assert_eq!(encode("smollm", "hello w12</s>"), ["hello", "Ġw", "1", "2", "</s>"]);
    assert_eq!(encode("gpt-2", "hello w12</s>"), ["hello", "Ġw", "12", "</s>"]);
    assert_eq!(encode("default", "12"), ["12"]);
    assert_eq!(encode("qwen2", "hello12"), ["hello", "1", "2"]);
    assert_eq!(encode("llama-bpe", "hello12"), ["<s>", "hello", "12"]);
}

#[test]
fn the_tokenizer_config_has_the_special_tokens_and_the_template() {
    let run = Run::new();
    let mut builder = llama();
    builder.uint("tokenizer.ggml.eot_token_id", 0);
    run.convert(&builder).unwrap();
    let read =
        |name: &str| -> Value { serde_json::from_slice(&fs::read(run.out().join(name)).unwrap()).unwrap() };
    let config = read("tokenizer_config.json");
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<s>"), &json!("</s>")));
    assert_eq!(config["chat_template"], "{{ messages[0].content }}");
    assert_eq!(config["added_tokens_decoder"]["1"]["content"], "</s>");
    assert!(config.get("pad_token").is_none());
    assert_eq!(read("generation_config.json")["eos_token_id"], json!([1, 0]));
}

#[test]
fn rope_scaling_of_llama_3_is_found_again() {
    let factors = |factor: f32| -> Vec<u8> {
        let wavelengths = (0..16).map(|i| 2.0 * std::f32::consts::PI * 500_000f32.powf(i as f32 / 16.0));
        let factors = wavelengths.map(|wavelength| match wavelength {
            short if short < 2048.0 => 1.0,
            long if long > 8192.0 => factor,
            middle => {
                let smooth = (8192.0 / middle - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        });
        factors.flat_map(f32::to_le_bytes).collect()
    };
    let run = Run::new();
    let mut builder = llama();
    builder.float("llama.rope.freq_base", 500_000.0);
    builder.tensor("rope_freqs.weight", &[16], 0, factors(32.0));
    run.convert(&builder).unwrap();
    let scaling = read_config(&run.out()).unwrap()["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&json!("llama3"), &json!(32.0)));
    builder.float("llama.rope.freq_base", 10_000.0);
    assert!(refusal(&builder).contains("not the rope scaling of a Llama 3"));
    let mut linear = llama();
    linear.text("llama.rope.scaling.type", "linear").float("llama.rope.scaling.factor", 4.0);
    let run = Run::new();
    run.convert(&linear).unwrap();
    assert_eq!(read_config(&run.out()).unwrap()["rope_scaling"]["factor"], 4.0);
    linear.text("llama.rope.scaling.type", "longrope");
    assert!(refusal(&linear).contains("longrope"));
    linear.text("llama.rope.scaling.type", "yarn").uint("llama.rope.scaling.original_context_length", 64);
    let run = Run::new();
    run.convert(&linear).unwrap();
    let scaling = read_config(&run.out()).unwrap()["rope_scaling"].clone();
    assert_eq!(
        (&scaling["type"], &scaling["original_max_position_embeddings"]),
        (&json!("yarn"), &json!(64))
    );
    linear.float("llama.rope.scaling.attn_factor", 2.0);
    assert!(refusal(&linear).contains("attn_factor"));
}

#[test]
fn what_cannot_be_converted_is_refused_by_name() {
    type Change = fn(&mut Builder) -> &mut Builder;
    let cases: [(Change, &str); 22] = [
        (|b| b.text("general.architecture", "mamba"), "architecture is \"mamba\""),
        (|b| b.drop_key("general.architecture"), "names no architecture"),
        (|b| b.text("tokenizer.ggml.model", "t5"), "needs the tokenizer.json"),
        (|b| b.text("tokenizer.ggml.model", "llama"), "not as many scores as tokens"),
        (|b| b.drop_key("tokenizer.ggml.model"), "no tokenizer"),
        (|b| b.text("tokenizer.ggml.pre", "tekken"), "pre-tokenizer \"tekken\" is unknown"),
        (|b| b.texts("tokenizer.ggml.merges", &["h q"]), "merge \"h q\" is not of known tokens"),
        (|b| b.texts("tokenizer.ggml.merges", &["hello"]), "merge \"hello\""),
        (|b| b.texts("tokenizer.ggml.tokens", &["a", "a"]), "token types"),
        (|b| b.uint("tokenizer.ggml.eos_token_id", 9999), "eos_token_id is 9999"),
        (|b| b.uint("llama.expert_count", 8), "has no llama.expert_used_count"),
        (|b| b.uint("split.count", 2), "its name does not end with -00001-of-00002.gguf"),
        (|b| b.uint("llama.block_count", 0), "block_count cannot be 0"),
        (|b| b.uint("llama.block_count", 3), "has no tensor blk.2.attn_norm.weight"),
        (|b| b.uint("llama.block_count", 1), "tensor blk.1."),
        (|b| b.uint("llama.embedding_length", u32::MAX), "embedding_length cannot be"),
        (|b| b.uint("llama.attention.head_count", 7), "heads of 9"),
        (|b| b.uint("llama.rope.dimension_count", 16), "16 rotate"),
        (|b| b.text("llama.block_count", "two"), "block_count is not a whole number"),
        (|b| b.tensor("blk.0.ffn_up.weight", &[256, 1], 10, vec![0; 84]), "stored as Q2_K"),
        (|b| b.tensor("blk.0.ffn_up.weight", &[64, 95], 0, vec![0; 64 * 95 * 4]), "[64, 95]"),
        (|b| b.tensor("blk.0.attn_norm.weight", &[64], 8, vec![0; 68]), "no matrix"),
    ];
    for (change, expected) in cases {
        let mut builder = llama();
        change(&mut builder);
        let message = refusal(&builder);
        assert!(message.contains(expected), "{message} does not say {expected:?}");
    }
}

#[test]
fn a_folder_with_files_is_replaced_only_when_asked_and_only_a_model() {
    let run = Run::new();
    let (path, out) = (run.folder.path().join("m.gguf"), run.out());
    fs::create_dir(&out).unwrap();
    run.convert(&llama()).unwrap();
    let before = fs::metadata(out.join("model.safetensors")).unwrap().modified().unwrap();
    let error = run.convert(&llama()).unwrap_err();
    assert!(
        matches!(&error, HubError::Io { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists)
    );
    assert_eq!(fs::metadata(out.join("model.safetensors")).unwrap().modified().unwrap(), before);
    fs::write(out.join("mine.txt"), "old").unwrap();
    convert(&path, &out, true, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert!(!out.join("mine.txt").exists());
    let other = run.folder.path().join("documents");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter.txt"), "dear").unwrap();
    assert!(convert(&path, &other, true, &mut |_, _| ControlFlow::Continue(())).is_err());
    assert!(other.join("letter.txt").exists());
    assert_eq!(fs::read_dir(run.folder.path()).unwrap().count(), 3, "no hidden folder stays");
}

#[test]
fn counts_and_offsets_are_not_believed() {
    let (header, bytes) = llama().bytes();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        opened(&bytes).unwrap_err().to_string()
    };
    assert!(with(0, b"GGML").contains("not a GGUF file"));
    assert!(with(4, &[1, 0, 0, 0]).contains("version 1"));
    assert!(with(4, &[0, 0, 0, 3]).contains("big-endian"));
    assert!(with(8, &u64::MAX.to_le_bytes()).contains("tensors; at most"));
    assert!(with(16, &u64::MAX.to_le_bytes()).contains("keys; at most"));
    assert!(with(24, &u64::MAX.to_le_bytes()).contains("bytes in a text; at most"));
    // The last 8 bytes of the header are the last tensor's offset.
    assert!(with(header - 8, &u64::MAX.to_le_bytes()).contains("ends before tensor"));
    assert!(with(header - 8, &0u64.to_le_bytes()).contains("overlap"));
    assert!(opened(&bytes[..bytes.len() - 1]).unwrap_err().to_string().contains("ends before tensor"));
    let mut version_2 = llama();
    version_2.version = 2;
    assert!(opened(&version_2.bytes().1).is_ok());
}

fn opened(bytes: &[u8]) -> Result<Gguf, HubError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_file_is_converted_or_refused(
        changes in prop::collection::vec((0usize..8000, any::<u8>()), 1..4), cut in prop::option::of(0usize..60_000),
    ) {
        let (header, mut bytes) = llama().bytes();
        for (at, value) in changes {
            bytes[at % header] = value;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        let _ = convert(&path, &folder.path().join("out"), false, &mut |_, _| ControlFlow::Continue(()));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused(cut in 0usize..10_000) {
        let (_, bytes) = llama().bytes();
        prop_assert!(opened(&bytes[..cut.min(bytes.len() - 1)]).is_err());
    }
}
