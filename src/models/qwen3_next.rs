//! Qwen3-Next (Alibaba, 2025) and the text part of Qwen3.5: gated delta nets, gated attention in every fourth
//! layer, and in most of them a mixture of experts.

use serde::Deserialize;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::{ExpertSizes, Layer, convolution, mlx_kernels};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, DeltaNet, Fused, Linear, Mixture, Scoring, Sublayer};
use crate::mlx::tensors::TensorCursor;

/// The size of the expert that every token goes through.
const SHARED: &str = "shared_expert_intermediate_size";

const KEYS: Keys = Keys { attention_bias: Key::Or(false), ..Keys::USUAL };

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    intermediate_size: Option<i32>,
    linear_num_value_heads: i32,
    linear_num_key_heads: i32,
    linear_key_head_dim: i32,
    linear_value_head_dim: i32,
    linear_conv_kernel_dim: i32,
    #[serde(default)]
    num_experts: i32,
    #[serde(default)]
    num_experts_per_tok: i32,
    #[serde(default = "config::or::<1, _>")]
    decoder_sparse_step: usize,
    mlp_only_layers: Option<Vec<usize>>,
    #[serde(default)]
    shared_expert_intermediate_size: i32,
    #[serde(default)]
    moe_intermediate_size: i32,
    norm_topk_prob: Option<bool>,
    full_attention_interval: Option<usize>,
    layer_types: Option<Vec<String>>,
}

struct Qwen3Next {
    common: Common,
    config: Config,
    /// Whether each layer attends.
    attends: Vec<bool>,
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = given.parse()?;
    config.check(given)?;
    let intermediate_size = Key::Always(config.intermediate_size.unwrap_or(1));
    let (mut common, rotation) = Common::read(given, &Keys { intermediate_size, ..KEYS })?;
    let part = rotation.part.unwrap_or(0.25);
    let dims = config::rotated_part(common.attention.head_dim, part)?;
    common.ropes = vec![common.rope(dims, &rotation, given)?];
    let attends = config.attends(common.layers)?;
    Ok(loader(Qwen3Next { common, config, attends, dtype: setup.dtype }, setup))
}

impl Config {
    fn check(&self, given: &Given<'_>) -> Result<(), OpenError> {
        config::sizes(&[
            ("moe_intermediate_size", self.moe_intermediate_size.max(1)),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.max(1)),
        ])?;
        config::heads(self.linear_num_value_heads, self.linear_num_key_heads, self.linear_key_head_dim)?;
        config::heads(self.linear_num_value_heads, self.linear_num_key_heads, self.linear_value_head_dim)?;
        config::kernel("linear_conv_kernel_dim", self.linear_conv_kernel_dim)?;
        if self.full_attention_interval == Some(0) || self.decoder_sparse_step == 0 {
            return config::invalid("an interval of layers is 0");
        }
        if self.has_experts() {
            for key in ["num_experts", "num_experts_per_tok", "moe_intermediate_size", SHARED] {
                Key::<i32>::Required.read(given, key)?;
            }
        }
        if self.is_next() {
            Key::<bool>::Required.read(given, "norm_topk_prob")?;
        }
        if self.num_experts == 0 {
            return Ok(());
        }
        config::experts(self.num_experts, self.num_experts_per_tok, (1, 1))
    }

    fn is_next(&self) -> bool {
        self.model_type == "qwen3_next"
    }

    /// Whether the architecture has mixtures.
    fn has_experts(&self) -> bool {
        self.is_next() || self.model_type.contains("_moe")
    }

    /// Returns whether each layer attends: by `layer_types`, by `full_attention_interval`, or by both if they
    /// agree.
    fn attends(&self, layers: usize) -> Result<Vec<bool>, OpenError> {
        let every =
            |interval: usize| (1..=layers).map(|layer| layer.is_multiple_of(interval)).collect::<Vec<_>>();
        let Some(kinds) = &self.layer_types else {
            return Ok(every(self.full_attention_interval.unwrap_or(4)));
        };
        config::layer_kinds(kinds, layers, &[config::FULL, "linear_attention"])?;
        let listed: Vec<bool> = kinds.iter().map(|kind| kind == config::FULL).collect();
        match self.full_attention_interval.filter(|&interval| every(interval) != listed) {
            Some(_) => config::invalid("layer_types and full_attention_interval contradict each other"),
            None => Ok(listed),
        }
    }

    fn mixes(&self, layer: usize) -> bool {
        let listed = self.is_next()
            && (self.mlp_only_layers.as_ref().is_some_and(|listed| listed.contains(&layer))
                || !(layer + 1).is_multiple_of(self.decoder_sparse_step));
        self.num_experts > 0 && !listed
    }
}

impl Qwen3Next {
    fn attention(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let Common { hidden, qkv_bias, output_bias, .. } = self.common;
        let TokenState { heads, kv_heads, head_dim, .. } = self.common.attention;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let module = layer.name("self_attn");
        // Each head's queries are followed by its gate.
        let both = weights.linear(&format!("{module}.q_proj"), 2 * queries, hidden, qkv_bias)?;
        let rows = |from: i32| -> Vec<i32> {
            (0..queries).map(|row| row / head_dim * 2 * head_dim + from + row % head_dim).collect()
        };
        let k = weights.linear(&format!("{module}.k_proj"), keys, hidden, qkv_bias)?;
        let v = weights.linear(&format!("{module}.v_proj"), keys, hidden, qkv_bias)?;
        let qkv = Fused::new(vec![both.pick(&rows(0))?, k, v])?;
        let gate = Some(both.pick(&rows(head_dim))?);
        let norms = self.common.head_norms(layer, weights)?;
        let output = weights.linear(&format!("{module}.o_proj"), hidden, queries, output_bias)?;
        Ok(Attention { norms, gate, ..Attention::new(layer.index, queries, qkv, output) })
    }

    /// Takes the inputs of a delta net: queries, keys, values, gates `z`, `b` and `a`, each by heads.
    fn input(&self, prefix: &str, weights: &mut TensorCursor) -> Result<Fused, Error> {
        let config = &self.config;
        let (hidden, key_heads, value_heads) =
            (self.common.hidden, config.linear_num_key_heads, config.linear_num_value_heads);
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

    fn delta_net(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<DeltaNet, Error> {
        let prefix = &layer.name("linear_attn");
        let Self { common: Common { hidden, eps, .. }, config, .. } = self;
        let (key_heads, value_heads) = (config.linear_num_key_heads, config.linear_num_value_heads);
        let (key_dim, value_dim) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let channels = 2 * key_heads * key_dim + value_heads * value_dim;
        let sizes = (channels, config.linear_conv_kernel_dim);
        Ok(DeltaNet {
            layer: layer.index,
            input: self.input(prefix, weights)?,
            convolution: convolution(weights, &format!("{prefix}.conv1d"), sizes, false)?,
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            decay_log: weights.single(&format!("{prefix}.A_log"), &[value_heads])?,
            decay_bias: weights.single(&format!("{prefix}.dt_bias"), &[value_heads])?,
            norm: weights.rms_norm(&format!("{prefix}.norm"), value_dim, *eps)?,
            output: weights.linear(&format!("{prefix}.out_proj"), *hidden, value_heads * value_dim, false)?,
        })
    }
}

/// Returns rows that come by head, `sizes` of each kind, as one layer for each kind.
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
    fn common(&self) -> &Common {
        &self.common
    }

    fn states(&self) -> Vec<LayerState> {
        let config = &self.config;
        let heads = (config.linear_num_key_heads, config.linear_num_value_heads);
        let dims = (config.linear_key_head_dim, config.linear_value_head_dim);
        let recurrent = DeltaNet::state(heads, dims, config.linear_conv_kernel_dim, self.dtype);
        let state = |layer| {
            if self.attends[layer] { LayerState::Tokens(self.common.attention) } else { recurrent.clone() }
        };
        (0..self.common.layers).map(state).collect()
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        // Raw files have what mlx-lm's do not: convolutions by PyTorch's axes, and with them norms less 1.
        let raw = weights.any(|name, array| {
            name.ends_with("conv1d.weight") && matches!(array.shape(), &[_, _, last] if last != 1)
        });
        weights.discard(|name| name.starts_with("mtp.") || name.starts_with("model.mtp."));
        weights.stack_gated_experts(self.common.layers, self.config.num_experts)?;
        for layer in 0..self.common.layers {
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
        mlx_kernels(weights, "conv1d.weight")?;
        weights.change(
            |name| NORMS.iter().any(|norm| name.ends_with(norm)),
            |array| array.add(mlx_rs::Array::from_f32(1.0).as_dtype(array.dtype())?),
        )
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        if self.attends[layer.index] {
            return Ok(Box::new(self.attention(layer, weights)?));
        }
        Ok(Box::new(self.delta_net(layer, weights)?))
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let Self { common, config, .. } = self;
        if !config.mixes(layer.index) {
            return Ok(None);
        }
        let sizes = ExpertSizes {
            experts: config.num_experts,
            chosen: config.num_experts_per_tok,
            inner: config.moe_intermediate_size.max(1),
        };
        let scoring = Scoring::Softmax { normed: config.norm_topk_prob.unwrap_or(!config.is_next()) };
        let module = layer.name("mlp");
        let mixture = common.mixture(&module, sizes, scoring, weights)?;
        let shared = config.shared_expert_intermediate_size.max(1);
        common.with_shared(mixture, &module, shared, weights).map(Some)
    }
}
