//! The llama architecture: its numbers, its tensors' names, and the config an MLX folder has for it.
//!
//! llama.cpp pairs neighbouring elements when it rotates, so its converter reorders the rows of q and k
//! within each head; here that is undone (convert_hf_to_gguf.py, `LlamaModel.permute`).

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::super::HubError;
use super::gguf::{Gguf, single};
use super::rope;

/// No model is wider; a row of 2^20 weights is 4 MB in f32, which bounds the memory of a conversion.
const WIDTH_MAX: u64 = 1 << 20;

/// The numbers of a llama model.
#[derive(Debug)]
pub(super) struct Llama {
    layers: u64,
    hidden: usize,
    feed_forward: usize,
    heads: usize,
    kv_heads: usize,
    pub(super) head_dim: usize,
    vocab: usize,
    pub(super) context_length: u64,
    norm_eps: f64,
    pub(super) rope_base: f64,
    rope_scaling: Value,
    attention_bias: bool,
    mlp_bias: bool,
    tied: bool,
}

/// One tensor of the GGUF file, and what it is called in the MLX folder.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) from: String,
    /// The module's path, as in `model.layers.0.self_attn.q_proj`.
    pub(super) module: String,
    /// `weight` or `bias`.
    pub(super) leaf: &'static str,
    /// Whether rows are in llama.cpp's order within each head.
    pub(super) permuted: bool,
}

impl Llama {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, HubError> {
        match gguf.text("general.architecture")? {
            Some("llama") => {}
            Some(other) => {
                let why =
                    format!("the GGUF file's architecture is {other:?}; only \"llama\" can be converted");
                return Err(HubError::unsupported(why));
            }
            None => return Err(gguf.damaged("names no architecture")),
        }
        let number = |name: &str| {
            let key = format!("llama.{name}");
            match gguf.uint(&key)? {
                Some(value) if (1..=WIDTH_MAX).contains(&value) => {
                    Ok(usize::try_from(value).unwrap_or(usize::MAX))
                }
                Some(value) => Err(gguf.damaged(format!("{key} cannot be {value}"))),
                None => Err(gguf.damaged(format!("has no {key}"))),
            }
        };
        if gguf.uint("llama.expert_count")?.unwrap_or(0) > 0 {
            return Err(HubError::unsupported("mixtures of experts cannot be converted"));
        }
        let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
        let kv_heads = match gguf.uint("llama.attention.head_count_kv")? {
            Some(_) => number("attention.head_count_kv")?,
            None => heads,
        };
        let head_dim = match gguf.uint("llama.attention.key_length")? {
            Some(_) => number("attention.key_length")?,
            None => hidden / heads,
        };
        let rotated = gguf.uint("llama.rope.dimension_count")?.unwrap_or(head_dim as u64);
        let value = gguf.uint("llama.attention.value_length")?.unwrap_or(head_dim as u64);
        if rotated != head_dim as u64 || value != head_dim as u64 || head_dim < 2 || head_dim % 2 != 0 {
            let why = format!("heads of {head_dim}, of which {rotated} rotate, with values of {value}");
            return Err(HubError::unsupported(why));
        }
        if heads % kv_heads != 0 {
            return Err(gguf.damaged(format!("has {heads} heads for {kv_heads} key heads")));
        }
        let embedding = gguf.tensors.get("token_embd.weight");
        let has = |name: &str| gguf.tensors.contains_key(name);
        let mut llama = Self {
            layers: number("block_count")? as u64,
            hidden,
            feed_forward: number("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            vocab: embedding.and_then(|tensor| tensor.dims.get(1).copied()).unwrap_or(0),
            context_length: gguf.uint("llama.context_length")?.unwrap_or(2048),
            norm_eps: single(gguf.float("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5)),
            rope_base: single(gguf.float("llama.rope.freq_base")?.unwrap_or(10000.0)),
            rope_scaling: Value::Null,
            attention_bias: has("blk.0.attn_q.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            tied: !has("output.weight"),
        };
        llama.rope_scaling = rope::scaling(gguf, llama.head_dim, llama.rope_base)?;
        Ok(llama)
    }

    /// Every tensor, in the order of the model, its shape checked.
    pub(super) fn sources(&self, gguf: &Gguf) -> Result<Vec<Source>, HubError> {
        let mut sources = Vec::new();
        let mut add = |from: String, module: String, leaf, dims: &[usize], permuted| match gguf
            .tensors
            .get(&from)
        {
            Some(tensor) if tensor.dims == dims => {
                sources.push(Source { from, module, leaf, permuted });
                Ok(())
            }
            Some(tensor) => Err(gguf.damaged(format!("tensor {from} is {:?}, not {dims:?}", tensor.dims))),
            None => Err(gguf.damaged(format!("has no tensor {from}"))),
        };
        let table = &[self.hidden, self.vocab];
        add("token_embd.weight".into(), "model.embed_tokens".into(), "weight", table, false)?;
        for layer in 0..self.layers {
            for (part, module) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
            {
                let module = format!("model.layers.{layer}.{module}");
                add(format!("blk.{layer}.{part}.weight"), module, "weight", &[self.hidden], false)?;
            }
            for (part, module, dims, bias) in self.linears() {
                let permuted = matches!(part, "attn_q" | "attn_k");
                let module = format!("model.layers.{layer}.{module}");
                add(format!("blk.{layer}.{part}.weight"), module.clone(), "weight", &dims, permuted)?;
                if bias {
                    add(format!("blk.{layer}.{part}.bias"), module, "bias", &dims[1..], permuted)?;
                }
            }
        }
        add("output_norm.weight".into(), "model.norm".into(), "weight", &[self.hidden], false)?;
        if !self.tied {
            add("output.weight".into(), "lm_head".into(), "weight", table, false)?;
        }
        let used: BTreeSet<&str> = sources.iter().map(|source| source.from.as_str()).collect();
        let known = |name: &str| name == rope::FACTORS || used.contains(name);
        match gguf.tensors.keys().find(|name| !known(name)) {
            Some(name) => Err(HubError::unsupported(format!("tensor {name} has no place in a llama model"))),
            None => Ok(sources),
        }
    }

    fn linears(&self) -> [(&'static str, &'static str, [usize; 2], bool); 7] {
        let (hidden, feed_forward) = (self.hidden, self.feed_forward);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (attention, mlp) = (self.attention_bias, self.mlp_bias);
        [
            ("attn_q", "self_attn.q_proj", [hidden, q], attention),
            ("attn_k", "self_attn.k_proj", [hidden, kv], attention),
            ("attn_v", "self_attn.v_proj", [hidden, kv], attention),
            ("attn_output", "self_attn.o_proj", [q, hidden], attention),
            ("ffn_gate", "mlp.gate_proj", [hidden, feed_forward], mlp),
            ("ffn_up", "mlp.up_proj", [hidden, feed_forward], mlp),
            ("ffn_down", "mlp.down_proj", [feed_forward, hidden], mlp),
        ]
    }

    /// The folder's `config.json`, but for its quantization. `tokens` are those of the tokenizer.
    pub(super) fn config(&self, gguf: &Gguf, tokens: usize, generation: &Value) -> Result<Value, HubError> {
        if tokens > self.vocab {
            let why = format!("has {tokens} tokens, but embeddings for {}", self.vocab);
            return Err(gguf.damaged(why));
        }
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "rope_scaling": self.rope_scaling,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        });
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(id) = generation.get(key) {
                config[key] = id.clone();
            }
        }
        Ok(config)
    }
}
