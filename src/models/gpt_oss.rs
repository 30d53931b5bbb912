//! gpt-oss (<https://arxiv.org/abs/2508.10925>): a mixture of experts in each layer, biases everywhere, attention with
//! sinks, every other layer with a window. Defaults for missing config keys are mlx-lm's (models/gpt_oss.py). The
//! release's own files are taken too: their experts are MXFP4 as MLX has it, with gate and up row by row in turns.

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype};
use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Mixture, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct Config {
    num_hidden_layers: usize,
    num_local_experts: i32,
    num_experts_per_tok: i32,
    vocab_size: i32,
    rms_norm_eps: f32,
    hidden_size: i32,
    intermediate_size: i32,
    head_dim: i32,
    num_attention_heads: i32,
    num_key_value_heads: i32,
    sliding_window: i32,
    rope_theta: f64,
    rope_scaling: Option<Value>,
    layer_types: Option<Vec<String>>,
    hidden_act: Option<String>,
    swiglu_limit: Option<f64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_hidden_layers: 36,
            num_local_experts: 128,
            num_experts_per_tok: 4,
            vocab_size: 201_088,
            rms_norm_eps: 1e-5,
            hidden_size: 2880,
            intermediate_size: 2880,
            head_dim: 64,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            sliding_window: 128,
            rope_theta: 150_000.0,
            rope_scaling: None,
            layer_types: None,
            hidden_act: None,
            swiglu_limit: None,
        }
    }
}

struct GptOss {
    config: Config,
    state: TokenState,
    windows: Vec<i32>,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let Config { num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, .. } = config;
    let Config { num_local_experts: experts, num_experts_per_tok: chosen, num_hidden_layers: layers, .. } =
        config;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::experts(experts, chosen, (1, 1))?;
    config::depth(layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    if let Some(limit) = config.swiglu_limit.filter(|&limit| limit != 7.0) {
        return Err(ConfigError::Unsupported(format!("swiglu_limit {limit}")));
    }
    let turns = || [config::SLIDING, config::FULL].into_iter().cycle().take(layers).map(str::to_owned);
    let listed = config.layer_types.clone().filter(|listed| !listed.is_empty());
    let kinds = listed.unwrap_or_else(|| turns().collect());
    config::layer_kinds(&kinds, layers, &[config::FULL, config::SLIDING])?;
    let windows = kinds.iter().map(|kind| config::window(kind, Some(config.sliding_window)));
    let windows = windows.collect::<Result<_, _>>()?;
    let rope = config::rope(head_dim, config.rope_theta, false, config.rope_scaling.as_ref(), value)?;
    let state = TokenState { sinks: true, ..TokenState::new(heads, kv_heads, head_dim) };
    Ok(loader(GptOss { config, state, windows, rope }, setup))
}

/// The name that MLX's layers have for a tensor of the release's experts.
fn renamed(name: &str) -> Option<String> {
    let (_, part) = name.split_once(".mlp.experts.")?;
    if !part.starts_with("gate_up_proj") && !part.starts_with("down_proj") {
        return None;
    }
    let kinds = [("_blocks", "weight"), ("_scales", "scales"), ("_bias", "bias")];
    kinds.iter().find_map(|(end, kind)| Some(format!("{}.{kind}", name.strip_suffix(end)?)))
}

/// Bytes `[experts, out, groups, 16]` as words `[experts, out, words]`; what is words already stays.
fn words(blocks: &Array) -> mlx_rs::error::Result<Array> {
    match *blocks.shape() {
        [experts, out, _, _] if blocks.dtype() == Dtype::Uint8 => {
            blocks.view_dtype(Dtype::Uint32)?.reshape(&[experts, out, -1])
        }
        _ => Ok(blocks.clone()),
    }
}

/// All gates, then all ups, of `[experts, 2 * inner, ..]` where they take turns.
fn unwoven(both: &Array) -> mlx_rs::error::Result<Array> {
    let shape = both.shape();
    let [experts, out, rest @ ..] = shape else {
        return Err(Exception::custom(format!("gate_up_proj of shape {shape:?}")));
    };
    let pairs: Vec<i32> = [*experts, *out / 2, 2].iter().chain(rest).copied().collect();
    both.reshape(&pairs)?.swap_axes(1, 2)?.reshape(shape)
}

impl Architecture for GptOss {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, false)
    }

    fn states(&self) -> Vec<LayerState> {
        let state = |&window: &i32| LayerState::Tokens(config::windowed(self.state, window));
        self.windows.iter().map(state).collect()
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.rename(renamed);
        weights.change(|name| name.contains(".mlp.experts.") && name.ends_with(".weight"), words)?;
        weights.change(|name| name.contains(".mlp.experts.gate_up_proj."), unwoven)?;
        for layer in 0..self.layers() {
            let experts = format!("model.layers.{layer}.mlp.experts");
            for kind in ["weight", "scales", "bias"] {
                let parts = ["gate_proj", "up_proj"].map(|part| format!("{experts}.{part}.{kind}"));
                weights.split(&format!("{experts}.gate_up_proj.{kind}"), 1, &parts)?;
            }
        }
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let Config { num_local_experts: experts, num_experts_per_tok: chosen, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, mlp) = (format!("{prefix}.self_attn"), format!("{prefix}.mlp"));
        let attention = Attention {
            sinks: Some(weights.floats(&format!("{module}.sinks"), &[self.state.heads])?),
            ..Attention::load(weights, &module, (index, &self.state), hidden, (true, true))?
        };
        let router = Router {
            logits: weights.linear(&format!("{mlp}.router"), experts, hidden, true)?,
            experts,
            chosen,
            scoring: Scoring::SoftmaxOfBest,
            expert_scale: None,
        };
        let switch = format!("{mlp}.experts");
        let experts = weights.gated_experts(&switch, [experts, hidden, inner], Gate::Oss, true)?;
        let mixture = Mixture { router, experts, shared: None, shared_gate: None };
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mixture)])
    }
}
