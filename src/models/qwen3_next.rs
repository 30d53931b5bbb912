//! Qwen3-Next (Alibaba, 2025) and the text part of Qwen3.5: gated delta nets, gated attention in every fourth layer,
//! and in most of them a mixture of experts. Defaults are mlx-lm's (models/qwen3_next.py, qwen3_5.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{
    Attention, Convolution, DeltaNet, Fused, Gate, HeadNorms, Linear, Mixture, Residual, Rope, Router,
    Scoring, by_kernel,
};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: Option<i32>,
    num_attention_heads: i32,
    num_key_value_heads: i32,
    head_dim: Option<i32>,
    linear_num_value_heads: i32,
    linear_num_key_heads: i32,
    linear_key_head_dim: i32,
    linear_value_head_dim: i32,
    linear_conv_kernel_dim: i32,
    #[serde(default)]
    num_experts: i32,
    #[serde(default)]
    num_experts_per_tok: i32,
    #[serde(default = "one")]
    decoder_sparse_step: usize,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    #[serde(default)]
    shared_expert_intermediate_size: i32,
    #[serde(default)]
    moe_intermediate_size: i32,
    norm_topk_prob: Option<bool>,
    rms_norm_eps: f32,
    vocab_size: i32,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    full_attention_interval: Option<usize>,
    hidden_act: Option<String>,
}

fn one() -> usize {
    1
}

struct Qwen3Next {
    config: Config,
    state: TokenState,
    rope: Rope,
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    config.check()?;
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
    config::heads(heads, kv_heads, head_dim)?;
    let parameters = config.rope_parameters.as_ref().filter(|parameters| !parameters.is_null());
    let nested = |key: &str| parameters.and_then(|parameters| parameters.get(key)).and_then(Value::as_f64);
    let theta = nested("rope_theta").or(config.rope_theta).unwrap_or(100_000.0);
    let part = nested("partial_rotary_factor").or(config.partial_rotary_factor).unwrap_or(0.25);
    if !(0.0..=1.0).contains(&part) {
        return config::invalid(format!("partial_rotary_factor is {part}"));
    }
    let scaling = parameters.or(config.rope_scaling.as_ref());
    let rope = config::rope(config::part_of(head_dim, part), theta, false, scaling, value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Qwen3Next { config, state, rope, dtype: setup.dtype }, setup))
}

impl Config {
    fn check(&self) -> Result<(), ConfigError> {
        config::sizes(&[
            ("hidden_size", self.hidden_size),
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size.unwrap_or(1)),
            ("moe_intermediate_size", self.moe_intermediate_size.max(1)),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.max(1)),
        ])?;
        config::depth(self.num_hidden_layers)?;
        config::epsilon(self.rms_norm_eps)?;
        config::activation(self.hidden_act.as_deref(), &["silu"])?;
        config::heads(self.linear_num_value_heads, self.linear_num_key_heads, self.linear_key_head_dim)?;
        config::heads(self.linear_num_value_heads, self.linear_num_key_heads, self.linear_value_head_dim)?;
        if !(2..=64).contains(&self.linear_conv_kernel_dim) {
            return config::invalid(format!("linear_conv_kernel_dim is {}", self.linear_conv_kernel_dim));
        }
        if self.full_attention_interval == Some(0) || self.decoder_sparse_step == 0 {
            return config::invalid("an interval of layers is 0");
        }
        if self.num_experts == 0 {
            return Ok(());
        }
        config::experts(self.num_experts, self.num_experts_per_tok, (1, 1))
    }

    fn is_next(&self) -> bool {
        self.model_type == "qwen3_next"
    }

    fn attends(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.full_attention_interval.unwrap_or(4))
    }

    fn mixes(&self, layer: usize) -> bool {
        let listed = self.is_next()
            && (self.mlp_only_layers.contains(&layer)
                || !(layer + 1).is_multiple_of(self.decoder_sparse_step));
        self.num_experts > 0 && !listed
    }
}

impl Qwen3Next {
    fn attention(&self, index: usize, prefix: &str, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let (hidden, bias) = (self.config.hidden_size, self.config.attention_bias);
        let TokenState { heads, kv_heads, head_dim, .. } = self.state;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        // Each head's queries are followed by its gate.
        let both = weights.linear(&format!("{prefix}.q_proj"), 2 * queries, hidden, bias)?;
        let rows = |from: i32| -> Vec<i32> {
            (0..queries).map(|row| row / head_dim * 2 * head_dim + from + row % head_dim).collect()
        };
        let k = weights.linear(&format!("{prefix}.k_proj"), keys, hidden, bias)?;
        let v = weights.linear(&format!("{prefix}.v_proj"), keys, hidden, bias)?;
        let qkv = Fused::new(vec![both.pick(&rows(0))?, k, v])?;
        let gate = Some(both.pick(&rows(head_dim))?);
        let eps = self.config.rms_norm_eps;
        let norms = HeadNorms::load(weights, prefix, ("q_norm", "k_norm"), head_dim, eps)?;
        let output = weights.linear(&format!("{prefix}.o_proj"), hidden, queries, bias)?;
        Ok(Attention { norms, gate, ..Attention::new(index, queries, qkv, output) })
    }

    /// What a delta net takes: queries, keys, values, gates `z`, `b` and `a`, each by heads.
    fn input(&self, prefix: &str, weights: &mut TensorCursor) -> Result<Fused, Error> {
        let config = &self.config;
        let (hidden, key_heads, value_heads) =
            (config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads);
        let (keys, values) =
            (key_heads * config.linear_key_head_dim, value_heads * config.linear_value_head_dim);
        if !config.is_next() {
            let parts = [
                ("in_proj_qkv", 2 * keys + values),
                ("in_proj_z", values),
                ("in_proj_b", value_heads),
                ("in_proj_a", value_heads),
            ];
            return weights.fused(prefix, &parts, hidden, false);
        }
        // By key head: its query, its key, values and gates of the value heads that share it.
        let all = weights.linear(&format!("{prefix}.in_proj_qkvz"), 2 * keys + 2 * values, hidden, false)?;
        let gates = weights.linear(&format!("{prefix}.in_proj_ba"), 2 * value_heads, hidden, false)?;
        let (key, value) = (config.linear_key_head_dim, values / key_heads);
        let of_head = [key, key, value, value];
        let mut parts = sorted(&all, key_heads, &of_head)?;
        parts.extend(sorted(&gates, key_heads, &[value_heads / key_heads; 2])?);
        Ok(Fused::new(parts)?)
    }

    fn delta_net(&self, index: usize, prefix: &str, weights: &mut TensorCursor) -> Result<DeltaNet, Error> {
        let config = &self.config;
        let (hidden, kernel) = (config.hidden_size, config.linear_conv_kernel_dim);
        let (key_heads, value_heads) = (config.linear_num_key_heads, config.linear_num_value_heads);
        let (key_dim, value_dim) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let channels = 2 * key_heads * key_dim + value_heads * value_dim;
        let taps = weights.floats(&format!("{prefix}.conv1d.weight"), &[channels, kernel, 1])?;
        Ok(DeltaNet {
            layer: index,
            input: self.input(prefix, weights)?,
            convolution: Convolution { weight: by_kernel(&taps)?, bias: None },
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            decay_log: weights.single(&format!("{prefix}.A_log"), &[value_heads])?,
            decay_bias: weights.single(&format!("{prefix}.dt_bias"), &[value_heads])?,
            norm: weights.rms_norm(&format!("{prefix}.norm"), value_dim, config.rms_norm_eps)?,
            output: weights.linear(&format!("{prefix}.out_proj"), hidden, value_heads * value_dim, false)?,
        })
    }

    fn mixture(&self, prefix: &str, weights: &mut TensorCursor) -> Result<Mixture, Error> {
        let config = &self.config;
        let (hidden, experts) = (config.hidden_size, config.num_experts);
        let sizes = (hidden, config.moe_intermediate_size.max(1));
        let shared = (hidden, config.shared_expert_intermediate_size.max(1));
        Ok(Mixture {
            router: Router {
                logits: weights.linear(&format!("{prefix}.gate"), experts, hidden, false)?,
                experts,
                chosen: config.num_experts_per_tok,
                scoring: Scoring::Softmax { normed: config.norm_topk_prob.unwrap_or(!config.is_next()) },
                expert_scale: None,
            },
            experts: weights.gated_experts(
                &format!("{prefix}.switch_mlp"),
                [experts, sizes.0, sizes.1],
                Gate::Silu,
                false,
            )?,
            shared: Some(weights.gated_mlp(&format!("{prefix}.shared_expert"), shared, Gate::Silu, false)?),
            shared_gate: Some(weights.linear(&format!("{prefix}.shared_expert_gate"), 1, hidden, false)?),
        })
    }
}

/// Rows that come by head, `sizes` of each kind, as one layer for each kind.
fn sorted(all: &Linear, heads: i32, sizes: &[i32]) -> Result<Vec<Linear>, Error> {
    let whole: i32 = sizes.iter().sum();
    let parts = sizes.iter().scan(0, |from, &size| {
        let first = *from;
        *from += size;
        let rows: Vec<i32> =
            (0..heads).flat_map(|head| head * whole + first..head * whole + first + size).collect();
        Some(all.pick(&rows))
    });
    Ok(parts.collect::<mlx_rs::error::Result<_>>()?)
}

impl Architecture for Qwen3Next {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
    }

    fn states(&self) -> Vec<LayerState> {
        let config = &self.config;
        let heads = (config.linear_num_key_heads, config.linear_num_value_heads);
        let dims = (config.linear_key_head_dim, config.linear_value_head_dim);
        let recurrent = DeltaNet::state(heads, dims, config.linear_conv_kernel_dim, self.dtype);
        let state = |layer| {
            if config.attends(layer) { LayerState::Tokens(self.state) } else { recurrent.clone() }
        };
        (0..config.num_hidden_layers).map(state).collect()
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        // Raw files have what mlx-lm's do not: convolutions by PyTorch's axes, and with them norms less 1.
        let raw = weights.any(|name, array| {
            name.ends_with("conv1d.weight") && matches!(array.shape(), &[_, _, last] if last != 1)
        });
        weights.discard(|name| name.contains("mtp."));
        weights.stack_gated_experts(self.config.num_hidden_layers, self.config.num_experts)?;
        for layer in 0..self.config.num_hidden_layers {
            let mlp = format!("model.layers.{layer}.mlp");
            let stack = |part: &str| format!("{mlp}.switch_mlp.{part}");
            let both = ["gate_proj", "up_proj"].map(|part| format!("{}.weight", stack(part)));
            weights.split(&format!("{mlp}.experts.gate_up_proj"), -2, &both)?;
            let down = [format!("{}.weight", stack("down_proj"))];
            weights.split(&format!("{mlp}.experts.down_proj"), -2, &down)?;
        }
        if !raw {
            return Ok(());
        }
        const NORMS: [&str; 5] = [
            ".input_layernorm.weight",
            ".post_attention_layernorm.weight",
            "model.norm.weight",
            ".q_norm.weight",
            ".k_norm.weight",
        ];
        weights.change(|name| name.ends_with("conv1d.weight"), |array| array.swap_axes(1, 2))?;
        weights.change(
            |name| NORMS.iter().any(|norm| name.ends_with(norm)),
            |array| array.add(mlx_rs::Array::from_f32(1.0).as_dtype(array.dtype())?),
        )
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, rms_norm_eps: eps, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let mixer = if self.config.attends(index) {
            Residual::new(before, self.attention(index, &format!("{prefix}.self_attn"), weights)?)
        } else {
            Residual::new(before, self.delta_net(index, &format!("{prefix}.linear_attn"), weights)?)
        };
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let mlp = format!("{prefix}.mlp");
        let second = if self.config.mixes(index) {
            Residual::new(after, self.mixture(&mlp, weights)?)
        } else {
            let inner = self.config.intermediate_size.unwrap_or(1);
            Residual::new(after, weights.gated_mlp(&mlp, (hidden, inner), Gate::Silu, false)?)
        };
        Ok(vec![mixer, second])
    }
}
