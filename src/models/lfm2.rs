//! LFM2 (Liquid AI, 2025): gated short convolutions, and attention in some layers.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::given::Given;
use super::parts::{Layer, convolution, mlx_kernels};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{
    Attention, Convolution, Gate, HeadNorms, Mlp, Residual, ShortConvolution, Sublayer,
};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    head_dim: Key::Or(None),
    eps_key: "norm_eps",
    rope_theta: Key::Or(1e6),
    activation_keys: &[],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    #[serde(default)]
    conv_bias: bool,
    #[serde(rename = "conv_L_cache")]
    kernel: i32,
    block_dim: Option<i32>,
    #[serde(default = "config::or::<256, _>")]
    block_multiple_of: i32,
    #[serde(default = "config::or::<1, _>")]
    block_ffn_dim_multiplier: f64,
    block_auto_adjust_ff_dim: bool,
    block_ff_dim: Option<i32>,
    intermediate_size: Option<i32>,
    tie_embedding: Option<bool>,
    full_attn_idxs: Option<Vec<usize>>,
    layer_types: Option<Vec<String>>,
}

struct Lfm2 {
    common: Common,
    config: Config,
    /// Whether each layer attends.
    attends: Vec<bool>,
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = given.parse()?;
    let intermediate_size = Key::Always(config.inner()?);
    let mut common = Common::rotated(given, &Keys { intermediate_size, ..KEYS })?;
    common.tied = config.tie_embedding.or(common.tied);
    config::kernel("conv_L_cache", config.kernel)?;
    if config.block_dim.is_some_and(|size| size != common.hidden) {
        return config::unsupported("a block_dim that is not hidden_size");
    }
    let attends = config.attends(common.layers)?;
    Ok(loader(Lfm2 { common, config, attends, dtype: setup.dtype }, setup))
}

impl Config {
    /// Returns the inner size of the MLP, which the config may leave to a rule.
    fn inner(&self) -> Result<i32, OpenError> {
        let Some(size) = self.block_ff_dim.or(self.intermediate_size) else {
            return config::invalid("neither block_ff_dim nor intermediate_size");
        };
        config::sizes(&[("block_ff_dim", size), ("block_multiple_of", self.block_multiple_of)])?;
        if !self.block_auto_adjust_ff_dim {
            return Ok(size);
        }
        let factor = self.block_ffn_dim_multiplier;
        if !(0.0..=64.0).contains(&factor) {
            return config::invalid(format!("block_ffn_dim_multiplier is {factor}"));
        }
        let (size, of) = (config::part_of(2 * size / 3, factor), self.block_multiple_of);
        Ok(size.saturating_add(of - 1) / of * of)
    }

    fn attends(&self, layers: usize) -> Result<Vec<bool>, OpenError> {
        let indices = self.full_attn_idxs.as_ref();
        let indexed = indices.map(|all| (0..layers).map(|layer| all.contains(&layer)).collect::<Vec<_>>());
        let Some(kinds) = &self.layer_types else {
            return indexed.map_or_else(|| config::invalid("layer_types is missing"), Ok);
        };
        config::layer_kinds(kinds, layers, &[config::FULL, "conv"])?;
        let listed = kinds.iter().map(|kind| kind == config::FULL).collect();
        match indexed.filter(|indexed| *indexed != listed) {
            Some(_) => config::invalid("layer_types and full_attn_idxs contradict each other"),
            None => Ok(listed),
        }
    }
}

impl Lfm2 {
    fn attention(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let Common { hidden, eps, attention: TokenState { heads, kv_heads, head_dim, .. }, .. } = self.common;
        let prefix = layer.name("self_attn");
        let projections = [("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)];
        let projections = projections.map(|(name, heads)| (name, heads * head_dim));
        let qkv = weights.fused(&prefix, &projections, hidden, false)?;
        let output = weights.linear(&format!("{prefix}.out_proj"), hidden, heads * head_dim, false)?;
        let norms = HeadNorms::load(weights, &prefix, ("q_layernorm", "k_layernorm"), head_dim, eps)?;
        Ok(Attention { norms, ..Attention::new(layer.index, heads * head_dim, qkv, output) })
    }

    fn short_convolution(
        &self,
        layer: &Layer,
        weights: &mut TensorCursor,
    ) -> Result<ShortConvolution, Error> {
        let prefix = layer.name("conv");
        let (hidden, bias) = (self.common.hidden, self.config.conv_bias);
        Ok(ShortConvolution {
            layer: layer.index,
            input: weights.linear(&format!("{prefix}.in_proj"), 3 * hidden, hidden, bias)?,
            convolution: convolution(weights, &format!("{prefix}.conv"), (hidden, self.config.kernel), bias)?,
            output: weights.linear(&format!("{prefix}.out_proj"), hidden, hidden, bias)?,
        })
    }
}

impl Architecture for Lfm2 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead { norm: "model.embedding_norm", ..EmbeddingAndHead::new(&self.common) }
    }

    fn states(&self) -> Vec<LayerState> {
        let convolution = Convolution::state(self.config.kernel, self.common.hidden, self.dtype);
        let state = |&attends: &bool| match attends {
            true => LayerState::Tokens(self.common.attention),
            false => LayerState::Recurrent(vec![convolution.clone()]),
        };
        self.attends.iter().map(state).collect()
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        mlx_kernels(weights, "conv.weight")
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Common { hidden, inner, .. } = self.common;
        let mixer: Box<dyn Sublayer> = match self.attends[layer.index] {
            true => Box::new(self.attention(layer, weights)?),
            false => Box::new(self.short_convolution(layer, weights)?),
        };
        let module = layer.name("feed_forward");
        let mlp = Mlp {
            gate_up: weights.fused(&module, &[("w1", inner), ("w3", inner)], hidden, false)?,
            down: weights.linear(&format!("{module}.w2"), hidden, inner, false)?,
            gate: Gate::Silu,
            kernels: weights.kernels(),
        };
        let before = self.common.norm(&layer.name("operator_norm"), weights)?;
        let between = self.common.norm(&layer.name("ffn_norm"), weights)?;
        Ok(vec![Residual::new(before, mixer), Residual::new(between, Box::new(mlp))])
    }
}
