//! The tensors of a GGUF file: what each is called in the MLX folder, its shape, and what is done to it.
//!
//! llama.cpp pairs neighbouring elements when it rotates, so its converter reorders the rows of q and k of
//! Llama within each head; here that is undone (convert_hf_to_gguf.py, `LlamaModel.permute`). Its converter
//! adds 1 to Gemma's norms (`norm_shift`), which is undone too.

use std::collections::BTreeSet;

use super::super::HubError;
use super::gguf::Gguf;
use super::numbers::{Experts, Family, Numbers};
use super::rope;

/// One tensor of the GGUF file, and what becomes of it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) from: String,
    /// The module's path, as in `model.layers.0.self_attn.q_proj`.
    pub(super) module: String,
    /// `weight` or `bias`.
    pub(super) leaf: &'static str,
    /// As MLX counts it: rows last.
    pub(super) shape: Vec<usize>,
    /// Whether rows are in llama.cpp's order within each head.
    pub(super) permuted: bool,
    /// Whether the file has 1 more than the model.
    pub(super) less_one: bool,
}

impl Source {
    /// Returns whether it is a matrix, or a stack of them.
    pub(super) fn is_matrix(&self) -> bool {
        self.leaf == "weight" && self.shape.len() > 1
    }
}

/// Collects sources, checking each.
struct Collector<'a> {
    gguf: &'a Gguf,
    numbers: &'a Numbers,
    layer: u64,
    sources: Vec<Source>,
}

/// Returns every tensor, in the order of the model, its shape checked.
pub(super) fn sources(gguf: &Gguf, numbers: &Numbers) -> Result<Vec<Source>, HubError> {
    let mut collector = Collector { gguf, numbers, layer: 0, sources: Vec::new() };
    let table = [numbers.hidden, numbers.vocab];
    collector.add("token_embd.weight".into(), "model.embed_tokens".into(), "weight", &table)?;
    for layer in 0..numbers.layers {
        collector.layer = layer;
        collector.norms()?;
        collector.attention()?;
        match numbers.experts {
            Some(experts) => collector.experts(experts)?,
            None => collector.mlp()?,
        }
    }
    collector.norm("output_norm.weight".into(), "model.norm".into(), numbers.hidden)?;
    if !numbers.tied {
        collector.add("output.weight".into(), "lm_head".into(), "weight", &table)?;
    }
    let used: BTreeSet<&str> = collector.sources.iter().map(|source| source.from.as_str()).collect();
    let known = |name: &str| rope::TENSORS.contains(&name) || used.contains(name);
    match gguf.tensors.keys().find(|name| !known(name)) {
        Some(name) => Err(HubError::unsupported(format!("tensor {name} has no place in such a model"))),
        None => Ok(collector.sources),
    }
}

impl Collector<'_> {
    /// Adds a tensor that has these dimensions in the file, the length of a row first.
    fn add(
        &mut self,
        from: String,
        module: String,
        leaf: &'static str,
        dims: &[usize],
    ) -> Result<(), HubError> {
        match self.gguf.tensors.get(&from) {
            Some(tensor) if tensor.dims == dims => {}
            Some(tensor) => {
                return Err(self.gguf.damaged(format!("tensor {from} is {:?}, not {dims:?}", tensor.dims)));
            }
            None => return Err(self.gguf.damaged(format!("has no tensor {from}"))),
        }
        let shape = dims.iter().rev().copied().collect();
        self.sources.push(Source { from, module, leaf, shape, permuted: false, less_one: false });
        Ok(())
    }

    fn norm(&mut self, from: String, module: String, size: usize) -> Result<(), HubError> {
        self.add(from, module, "weight", &[size])?;
        let less_one = self.numbers.family == Family::Gemma3;
        self.sources.last_mut().into_iter().for_each(|source| source.less_one = less_one);
        Ok(())
    }

    /// Adds a tensor of the layer.
    fn part(&mut self, part: &str, module: &str, leaf: &'static str, dims: &[usize]) -> Result<(), HubError> {
        let layer = self.layer;
        self.add(format!("blk.{layer}.{part}.{leaf}"), format!("model.layers.{layer}.{module}"), leaf, dims)
    }

    fn norms(&mut self) -> Result<(), HubError> {
        const USUAL: [(&str, &str); 2] =
            [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
        const GEMMA: [(&str, &str); 4] = [
            ("attn_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ];
        let Numbers { family, hidden, head_dim, .. } = *self.numbers;
        let norms = if family == Family::Gemma3 { &GEMMA[..] } else { &USUAL[..] };
        let heads = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
        let of_heads = heads.iter().filter(|_| family.has_head_norms()).map(|norm| (norm, head_dim));
        for (&(part, module), size) in norms.iter().map(|norm| (norm, hidden)).chain(of_heads) {
            let layer = self.layer;
            let module = format!("model.layers.{layer}.{module}");
            self.norm(format!("blk.{layer}.{part}.weight"), module, size)?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<(), HubError> {
        let Numbers { family, hidden, heads, kv_heads, head_dim, biases, .. } = *self.numbers;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        if family == Family::Phi3 {
            self.part("attn_qkv", "self_attn.qkv_proj", "weight", &[hidden, q + 2 * kv])?;
            return self.part("attn_output", "self_attn.o_proj", "weight", &[q, hidden]);
        }
        for (part, module, dims, bias) in [
            ("attn_q", "self_attn.q_proj", [hidden, q], biases.qkv),
            ("attn_k", "self_attn.k_proj", [hidden, kv], biases.qkv),
            ("attn_v", "self_attn.v_proj", [hidden, kv], biases.qkv),
            ("attn_output", "self_attn.o_proj", [q, hidden], biases.output),
        ] {
            let first = self.sources.len();
            self.part(part, module, "weight", &dims)?;
            if bias {
                self.part(part, module, "bias", &dims[1..])?;
            }
            let permuted = family.permutes() && matches!(part, "attn_q" | "attn_k");
            self.sources[first..].iter_mut().for_each(|source| source.permuted = permuted);
        }
        Ok(())
    }

    fn mlp(&mut self) -> Result<(), HubError> {
        let Numbers { family, hidden, feed_forward, biases, .. } = *self.numbers;
        if family == Family::Phi3 {
            self.part("ffn_up", "mlp.gate_up_proj", "weight", &[hidden, 2 * feed_forward])?;
            return self.part("ffn_down", "mlp.down_proj", "weight", &[feed_forward, hidden]);
        }
        for (part, module, dims) in [
            ("ffn_gate", "mlp.gate_proj", [hidden, feed_forward]),
            ("ffn_up", "mlp.up_proj", [hidden, feed_forward]),
            ("ffn_down", "mlp.down_proj", [feed_forward, hidden]),
        ] {
            self.part(part, module, "weight", &dims)?;
            if biases.mlp {
                self.part(part, module, "bias", &dims[1..])?;
            }
        }
        Ok(())
    }

    fn experts(&mut self, experts: Experts) -> Result<(), HubError> {
        let Numbers { family, hidden, .. } = *self.numbers;
        let Experts { count, inner, shared, .. } = experts;
        let module = if family == Family::Mixtral { "block_sparse_moe" } else { "mlp" };
        self.part("ffn_gate_inp", &format!("{module}.gate"), "weight", &[hidden, count])?;
        for (part, dims) in [("gate", [hidden, inner]), ("up", [hidden, inner]), ("down", [inner, hidden])] {
            let dims = [dims[0], dims[1], count];
            let stack = format!("{module}.switch_mlp.{part}_proj");
            self.part(&format!("ffn_{part}_exps"), &stack, "weight", &dims)?;
        }
        if shared == 0 {
            return Ok(());
        }
        for (part, dims) in [("gate", [hidden, shared]), ("up", [hidden, shared]), ("down", [shared, hidden])]
        {
            let name = format!("mlp.shared_expert.{part}_proj");
            self.part(&format!("ffn_{part}_shexp"), &name, "weight", &dims)?;
        }
        // A matrix of one row, which the file keeps as a vector.
        self.part("ffn_gate_inp_shexp", "mlp.shared_expert_gate", "weight", &[hidden])?;
        self.sources.last_mut().into_iter().for_each(|source| source.shape = vec![1, hidden]);
        Ok(())
    }
}
