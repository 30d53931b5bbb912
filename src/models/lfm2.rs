//! LFM2 (Liquid AI, 2025): gated short convolutions, and attention in some layers. Defaults are mlx-lm's (models/lfm2.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{
    Attention, Convolution, Gate, HeadNorms, Mlp, Residual, Rope, ShortConvolution, by_kernel,
};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    vocab_size: i32,
    hidden_size: i32,
    num_hidden_layers: usize,
    num_attention_heads: i32,
    num_key_value_heads: Option<i32>,
    norm_eps: f32,
    #[serde(default)]
    conv_bias: bool,
    #[serde(rename = "conv_L_cache")]
    kernel: i32,
    block_dim: Option<i32>,
    #[serde(default = "multiple")]
    block_multiple_of: i32,
    block_ffn_dim_multiplier: Option<f64>,
    #[serde(default)]
    block_auto_adjust_ff_dim: bool,
    block_ff_dim: Option<i32>,
    intermediate_size: Option<i32>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    full_attn_idxs: Option<Vec<usize>>,
    layer_types: Option<Vec<String>>,
}

fn multiple() -> i32 {
    256
}

struct Lfm2 {
    config: Config,
    state: TokenState,
    /// Whether each layer attends.
    attends: Vec<bool>,
    inner: i32,
    rope: Rope,
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let (heads, layers) = (config.num_attention_heads, config.num_hidden_layers);
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.hidden_size / heads.max(1);
    let inner = config.inner()?;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", inner),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.norm_eps)?;
    if !(2..=64).contains(&config.kernel) {
        return config::invalid(format!("conv_L_cache is {}", config.kernel));
    }
    if config.block_dim.is_some_and(|size| size != config.hidden_size) {
        return Err(ConfigError::Unsupported("a block_dim that is not hidden_size".into()));
    }
    let attends = config.attends()?;
    let parameters = config.rope_parameters.as_ref().filter(|parameters| !parameters.is_null());
    let theta = parameters.and_then(|parameters| parameters.get("rope_theta")).and_then(Value::as_f64);
    let theta = theta.or(config.rope_theta).unwrap_or(1e6);
    let rope = config::rope(head_dim, theta, false, parameters, value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Lfm2 { config, state, attends, inner, rope, dtype: setup.dtype }, setup))
}

impl Config {
    /// The size of the MLP, which the config may leave to a rule.
    fn inner(&self) -> Result<i32, ConfigError> {
        let Some(size) = self.block_ff_dim.or(self.intermediate_size) else {
            return config::invalid("neither block_ff_dim nor intermediate_size");
        };
        config::sizes(&[("block_ff_dim", size), ("block_multiple_of", self.block_multiple_of)])?;
        if !self.block_auto_adjust_ff_dim {
            return Ok(size);
        }
        let factor = self.block_ffn_dim_multiplier.unwrap_or(1.0);
        if !(0.0..=64.0).contains(&factor) {
            return config::invalid(format!("block_ffn_dim_multiplier is {factor}"));
        }
        let (size, of) = (config::part_of(2 * size / 3, factor), self.block_multiple_of);
        Ok(size.saturating_add(of - 1) / of * of)
    }

    fn attends(&self) -> Result<Vec<bool>, ConfigError> {
        let layers = self.num_hidden_layers;
        if let Some(indices) = &self.full_attn_idxs {
            return Ok((0..layers).map(|layer| indices.contains(&layer)).collect());
        }
        let kinds = self.layer_types.clone().unwrap_or_default();
        config::layer_kinds(&kinds, layers, &[config::FULL, "conv"])?;
        Ok(kinds.iter().map(|kind| kind == config::FULL).collect())
    }
}

impl Architecture for Lfm2 {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, norm_eps, .. } = self.config;
        EmbeddingAndHead {
            norm: "model.embedding_norm",
            ..EmbeddingAndHead::new(hidden_size, vocab_size, norm_eps, true)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let convolution = Convolution::state(self.config.kernel, self.config.hidden_size, self.dtype);
        let state = |&attends: &bool| {
            if attends {
                LayerState::Tokens(self.state)
            } else {
                LayerState::Recurrent(vec![convolution.clone()])
            }
        };
        self.attends.iter().map(state).collect()
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        // PyTorch has the kernel last, MLX in the middle.
        weights.change(
            |name| name.contains("conv.weight"),
            |array| match array.shape() {
                &[_, middle, last] if last > middle => array.swap_axes(1, 2),
                _ => Ok(array.clone()),
            },
        )
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, norm_eps: eps, kernel, conv_bias, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let before = weights.rms_norm(&format!("{prefix}.operator_norm"), hidden, eps)?;
        let mixer = if self.attends[index] {
            let prefix = format!("{prefix}.self_attn");
            let TokenState { heads, kv_heads, head_dim, .. } = self.state;
            let projections = [("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)];
            let projections = projections.map(|(name, heads)| (name, heads * head_dim));
            let qkv = weights.fused(&prefix, &projections, hidden, false)?;
            let output = weights.linear(&format!("{prefix}.out_proj"), hidden, heads * head_dim, false)?;
            let norms = HeadNorms::load(weights, &prefix, ("q_layernorm", "k_layernorm"), head_dim, eps)?;
            Residual::new(before, Attention { norms, ..Attention::new(index, heads * head_dim, qkv, output) })
        } else {
            let prefix = format!("{prefix}.conv");
            let taps = weights.floats(&format!("{prefix}.conv.weight"), &[hidden, kernel, 1])?;
            let bias = match conv_bias {
                true => Some(weights.floats(&format!("{prefix}.conv.bias"), &[hidden])?),
                false => None,
            };
            let body = ShortConvolution {
                layer: index,
                input: weights.linear(&format!("{prefix}.in_proj"), 3 * hidden, hidden, conv_bias)?,
                convolution: Convolution { weight: by_kernel(&taps)?, bias },
                output: weights.linear(&format!("{prefix}.out_proj"), hidden, hidden, conv_bias)?,
            };
            Residual::new(before, body)
        };
        let prefix_mlp = format!("{prefix}.feed_forward");
        let mlp = Mlp {
            gate_up: weights.fused(&prefix_mlp, &[("w1", self.inner), ("w3", self.inner)], hidden, false)?,
            down: weights.linear(&format!("{prefix_mlp}.w2"), hidden, self.inner, false)?,
            gate: Gate::Silu,
            ops: weights.ops(),
        };
        let after = weights.rms_norm(&format!("{prefix}.ffn_norm"), hidden, eps)?;
        Ok(vec![mixer, Residual::new(after, mlp)])
    }
}
