//! Writes tiny GGUF files for tests: a builder for the format, and a llama model with a real (small) BPE
//! vocabulary.

use std::path::Path;

use crate::hub::convert::blocks::Kind;

/// A GGUF file to be.
#[derive(Clone, Default)]
pub(super) struct Builder {
    pub(super) version: u32,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes
}

impl Builder {
    /// Sets a key; an earlier value of it goes.
    pub(super) fn key(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.drop_key(key);
        self.keys.push((key.into(), [&kind.to_le_bytes(), value].concat()));
        self
    }

    pub(super) fn drop_key(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(other, _)| other != key);
        self
    }

    pub(super) fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key, 8, &text(value))
    }

    pub(super) fn uint(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4, &value.to_le_bytes())
    }

    pub(super) fn float(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, 6, &value.to_le_bytes())
    }

    pub(super) fn texts<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| text(value.as_ref())));
        self.key(key, 9, &bytes)
    }

    pub(super) fn ints(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.key(key, 9, &bytes)
    }

    /// Sets a tensor; an earlier one of the name goes.
    pub(super) fn tensor(&mut self, name: &str, dims: &[u64], code: u32, data: Vec<u8>) -> &mut Self {
        self.drop_tensor(name);
        self.tensors.push((name.into(), dims.to_vec(), code, data));
        self
    }

    pub(super) fn drop_tensor(&mut self, name: &str) -> &mut Self {
        self.tensors.retain(|(other, ..)| other != name);
        self
    }

    /// The header, then the file with its data.
    pub(super) fn bytes(&self) -> (usize, Vec<u8>) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        let mut offset = 0;
        for (name, dims, code, data) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
            bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            bytes.extend(code.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset += data.len().next_multiple_of(32);
        }
        let header = bytes.len();
        for (.., data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        (header, bytes)
    }

    pub(super) fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes().1).unwrap();
    }
}

/// Data of a tensor: small numbers that differ from row to row.
pub(super) fn data(kind: Kind, dims: &[u64]) -> Vec<u8> {
    let (elements, block_bytes) = kind.block();
    let blocks = usize::try_from(dims.iter().product::<u64>()).unwrap() / elements;
    (0..blocks)
        .flat_map(|i| match kind {
            Kind::F32 => (i as f32 / 64.0).to_le_bytes().to_vec(),
            Kind::F16 | Kind::Bf16 => u16::try_from(i % 0x3c00).unwrap().to_le_bytes().to_vec(),
            _ => (0..block_bytes).map(|at| u8::try_from((i * 7 + at * 3) % 60).unwrap()).collect(),
        })
        .collect()
}

/// The letters GPT-2 writes bytes with (openai/gpt-2, encoder.py `bytes_to_unicode`): printable ones stand
/// for themselves, the others follow from 256 on.
pub(super) fn alphabet() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

pub(super) const MERGES: [&str; 6] = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"];

/// Two layers, hidden 64, 2 heads of 32 with one key head, and the tokens `<s>`, `</s>`, bytes and merges.
pub(super) fn llama() -> Builder {
    let mut tokens = vec!["<s>".to_owned(), "</s>".to_owned()];
    tokens.extend(alphabet());
    tokens.extend(MERGES.map(|merge| merge.replace(' ', "")));
    let mut kinds = vec![1; tokens.len()];
    kinds[..2].fill(3);
    let mut builder = Builder { version: 3, ..Builder::default() };
    builder.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 32),
    ] {
        builder.uint(&format!("llama.{key}"), value);
    }
    builder.float("llama.rope.freq_base", 10000.0).float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    builder.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
    builder.texts("tokenizer.ggml.tokens", &tokens).ints("tokenizer.ggml.token_type", &kinds);
    builder.texts("tokenizer.ggml.merges", &MERGES);
    builder.uint("tokenizer.ggml.bos_token_id", 0).uint("tokenizer.ggml.eos_token_id", 1);
    builder.text("tokenizer.chat_template", "{{ messages[0].content }}");
    let mut add = |name: &str, dims: &[u64], kind: Kind, code: u32| {
        builder.tensor(name, dims, code, data(kind, dims));
    };
    add("token_embd.weight", &[64, tokens.len() as u64], Kind::Q8_0, 8);
    for layer in 0..2 {
        for (part, dims) in [
            ("attn_q", [64, 64]),
            ("attn_k", [64, 32]),
            ("attn_v", [64, 32]),
            ("attn_output", [64, 64]),
            ("ffn_gate", [64, 96]),
            ("ffn_up", [64, 96]),
            ("ffn_down", [96, 64]),
        ] {
            add(&format!("blk.{layer}.{part}.weight"), &dims, Kind::Q4_1, 3);
        }
        add(&format!("blk.{layer}.attn_norm.weight"), &[64], Kind::F32, 0);
        add(&format!("blk.{layer}.ffn_norm.weight"), &[64], Kind::F32, 0);
    }
    add("output_norm.weight", &[64], Kind::F32, 0);
    builder
}
