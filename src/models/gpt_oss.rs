//! gpt-oss (<https://arxiv.org/abs/2508.10925>): a mixture of experts in each layer, biases everywhere,
//! attention with sinks, every other layer with a window. The release's own files are taken too: their
//! experts are MXFP4 as MLX has it, with the rows of gate and up interleaved.

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype};
use serde_json::Value;

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::layers::{Attention, Gate, Mixture, Router, Scoring, Sublayer};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    num_hidden_layers: Key::Or(36),
    vocab_size: Key::Or(201_088),
    rms_norm_eps: Key::Or(1e-5),
    hidden_size: Key::Or(2880),
    intermediate_size: Key::Or(2880),
    head_dim: Key::Or(Some(64)),
    num_attention_heads: Key::Or(64),
    num_key_value_heads: Key::Or(Some(8)),
    attention_bias: Key::Always(true),
    rope_theta: Key::Or(150_000.0),
    ..Keys::USUAL
};

struct GptOss {
    common: Common,
    experts: i32,
    /// Experts of a token.
    chosen: i32,
    windows: Vec<i32>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    // Without one, the two readers rotate differently.
    if ["rope_scaling", "rope_parameters"].iter().all(|key| given.get(key).is_none_or(Value::is_null)) {
        return config::invalid("rope_parameters is missing");
    }
    let mut common = Common::rotated(given, &KEYS)?;
    common.attention.sinks = true;
    if !Key::Or(true).read(given, "attention_bias")? {
        return config::unsupported("attention_bias false");
    }
    let experts = Key::Or(128).read(given, "num_local_experts")?;
    let chosen = Key::Or(4).read(given, "num_experts_per_tok")?;
    config::experts(experts, chosen, (1, 1))?;
    for (name, known) in [("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)] {
        let value: f64 = Key::Or(known).read(given, name)?;
        if value != known {
            return config::unsupported(format!("{name} {value}"));
        }
    }
    let window = Key::Or(Some(128)).read(given, "sliding_window")?;
    let windows = config::windows(given, common.layers, |layer| layer.is_multiple_of(2), window)?;
    Ok(loader(GptOss { common, experts, chosen, windows }, setup))
}

/// Returns the name that mlx-lm gives to a tensor of the release's experts.
fn renamed(name: &str) -> Option<String> {
    let (_, part) = name.split_once(".mlp.experts.")?;
    if !part.starts_with("gate_up_proj") && !part.starts_with("down_proj") {
        return None;
    }
    let kinds = [("_blocks", "weight"), ("_scales", "scales"), ("_bias", "bias")];
    kinds.iter().find_map(|(end, kind)| Some(format!("{}.{kind}", name.strip_suffix(end)?)))
}

/// Returns bytes `[experts, out, groups, 16]` as words `[experts, out, words]`; words stay as they are.
fn words(blocks: &Array) -> mlx_rs::error::Result<Array> {
    match *blocks.shape() {
        [experts, out, _, _] if blocks.dtype() == Dtype::Uint8 => {
            blocks.view_dtype(Dtype::Uint32)?.reshape(&[experts, out, -1])
        }
        _ => Ok(blocks.clone()),
    }
}

/// Returns `[experts, 2 * inner, ..]`, whose gates and ups are interleaved, with all gates before all ups.
fn deinterleaved(both: &Array) -> mlx_rs::error::Result<Array> {
    let shape = both.shape();
    let [experts, out, rest @ ..] = shape else {
        return Err(Exception::custom(format!("gate_up_proj of shape {shape:?}")));
    };
    let pairs: Vec<i32> = [*experts, *out / 2, 2].iter().chain(rest).copied().collect();
    both.reshape(&pairs)?.swap_axes(1, 2)?.reshape(shape)
}

impl Architecture for GptOss {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.rename(renamed);
        weights.change(|name| name.contains(".mlp.experts.") && name.ends_with(".weight"), words)?;
        weights.change(|name| name.contains(".mlp.experts.gate_up_proj."), deinterleaved)?;
        for layer in 0..self.common.layers {
            let experts = format!("model.layers.{layer}.mlp.experts");
            for kind in ["weight", "scales", "bias"] {
                let parts = ["gate_proj", "up_proj"].map(|part| format!("{experts}.{part}.{kind}"));
                weights.split(&format!("{experts}.gate_up_proj.{kind}"), 1, &parts)?;
            }
        }
        Ok(())
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let heads = self.common.attention.heads;
        Ok(Box::new(Attention {
            sinks: Some(weights.floats(&layer.name("self_attn.sinks"), &[heads])?),
            ..self.common.attention(layer, weights)?
        }))
    }

    fn mixture(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        let Common { hidden, inner, .. } = self.common;
        let logits = weights.linear(&layer.name("mlp.router"), self.experts, hidden, true)?;
        let stack = layer.name("mlp.experts");
        let router = Router {
            logits,
            experts: self.experts,
            chosen: self.chosen,
            scoring: Scoring::SoftmaxOfBest,
            expert_scale: None,
        };
        let experts = weights.gated_experts(&stack, [self.experts, hidden, inner], Gate::Oss, true)?;
        Ok(Some(Mixture { router, experts, shared: None, shared_gate: None }))
    }
}
