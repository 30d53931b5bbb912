//! Nemotron-H (NVIDIA, <https://arxiv.org/abs/2504.03624>): layers of one kind each, Mamba-2 mixers, attention without
//! positions, MLPs or mixtures of experts. Defaults are mlx-lm's (models/nemotron_h.py).

use mlx_rs::Array;
use mlx_rs::error::Result as MlxResult;
use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{
    Activation, Attention, Convolution, Experts, ForwardContext, Linear, Mamba, Residual, Rope, Router,
    Scoring, Sublayer, by_kernel, squared_relu,
};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    vocab_size: i32,
    hidden_size: i32,
    #[serde(default = "one")]
    intermediate_size: i32,
    num_attention_heads: i32,
    num_key_value_heads: i32,
    head_dim: Option<i32>,
    #[serde(default)]
    attention_bias: bool,
    mamba_num_heads: i32,
    mamba_head_dim: i32,
    #[serde(default)]
    mamba_proj_bias: bool,
    ssm_state_size: i32,
    conv_kernel: i32,
    n_groups: i32,
    #[serde(default)]
    mlp_bias: bool,
    layer_norm_epsilon: f32,
    #[serde(default = "config::yes")]
    use_conv_bias: bool,
    hybrid_override_pattern: Option<Value>,
    layers_block_type: Option<Vec<String>>,
    layer_types: Option<Vec<String>>,
    moe_intermediate_size: Option<i32>,
    moe_shared_expert_intermediate_size: Option<i32>,
    moe_latent_size: Option<i32>,
    #[serde(default = "one")]
    n_group: i32,
    n_routed_experts: Option<i32>,
    n_shared_experts: Option<i32>,
    #[serde(default = "one")]
    topk_group: i32,
    num_experts_per_tok: Option<i32>,
    #[serde(default)]
    norm_topk_prob: bool,
    routed_scaling_factor: Option<f32>,
    time_step_limit: Option<(Value, Value)>,
    mlp_hidden_act: Option<String>,
    mamba_hidden_act: Option<String>,
}

fn one() -> i32 {
    1
}

/// What a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mamba,
    Attention,
    Mlp,
    Experts,
}

struct NemotronH {
    config: Config,
    kinds: Vec<Kind>,
    state: TokenState,
    step_limit: (f32, f32),
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let kinds = config.kinds()?;
    config.check(&kinds)?;
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
    config::heads(heads, kv_heads, head_dim)?;
    let limit = |value: &Value| crate::hub::config_f64(value).filter(|limit| !limit.is_nan());
    let step_limit = match &config.time_step_limit {
        None => Some((0.0, f64::INFINITY)),
        Some((low, high)) => limit(low).zip(limit(high)),
    };
    let Some((low, high)) = step_limit else {
        return config::invalid("time_step_limit is no pair of numbers");
    };
    let step_limit = (config::single(low), config::single(high));
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(NemotronH { config, kinds, state, step_limit, dtype: setup.dtype }, setup))
}

impl Config {
    fn kinds(&self) -> Result<Vec<Kind>, ConfigError> {
        let named = self.layers_block_type.as_ref().or(self.layer_types.as_ref());
        let names: Vec<String> = match (&self.hybrid_override_pattern, named) {
            (Some(Value::String(pattern)), _) => pattern.chars().map(String::from).collect(),
            (Some(Value::Array(list)), _) => {
                list.iter().map(|kind| kind.as_str().unwrap_or_default().to_owned()).collect()
            }
            (_, Some(named)) => named.clone(),
            _ => return config::invalid("neither hybrid_override_pattern nor layers_block_type"),
        };
        let kind = |name: &String| match name.as_str() {
            "M" | "mamba" | "linear_attention" | "conv" => Ok(Kind::Mamba),
            "*" | "attention" | "full_attention" => Ok(Kind::Attention),
            "-" | "mlp" => Ok(Kind::Mlp),
            "E" | "moe" => Ok(Kind::Experts),
            other => Err(ConfigError::Unsupported(format!("layer type {other:?}"))),
        };
        names.iter().map(kind).collect()
    }

    fn check(&self, kinds: &[Kind]) -> Result<(), ConfigError> {
        config::sizes(&[
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("moe_intermediate_size", self.moe_intermediate_size.unwrap_or(1)),
            ("moe_shared_expert_intermediate_size", self.moe_shared_expert_intermediate_size.unwrap_or(1)),
            ("moe_latent_size", self.moe_latent_size.unwrap_or(1)),
        ])?;
        config::depth(kinds.len())?;
        config::epsilon(self.layer_norm_epsilon)?;
        config::heads(self.mamba_num_heads, self.n_groups, self.mamba_head_dim)?;
        config::heads(self.mamba_num_heads, self.n_groups, self.ssm_state_size)?;
        config::choice("mlp_hidden_act", self.mlp_hidden_act.as_deref(), &["relu2"])?;
        config::choice("mamba_hidden_act", self.mamba_hidden_act.as_deref(), &["silu"])?;
        if !(2..=64).contains(&self.conv_kernel) {
            return config::invalid(format!("conv_kernel is {}", self.conv_kernel));
        }
        if !kinds.contains(&Kind::Experts) {
            return Ok(());
        }
        let (all, chosen) = (self.n_routed_experts.unwrap_or(0), self.num_experts_per_tok.unwrap_or(0));
        config::experts(all, chosen, (self.n_group, self.topk_group))
    }
}

/// An MLP of two matrices with a squared relu between.
struct Squared {
    up: Linear,
    down: Linear,
}

impl Squared {
    fn load(
        weights: &mut TensorCursor,
        prefix: &str,
        (hidden, inner): (i32, i32),
        bias: bool,
    ) -> Result<Self, Error> {
        Ok(Self {
            up: weights.linear(&format!("{prefix}.up_proj"), inner, hidden, bias)?,
            down: weights.linear(&format!("{prefix}.down_proj"), hidden, inner, bias)?,
        })
    }
}

impl Sublayer for Squared {
    fn forward(&self, x: &Array, _: &mut ForwardContext<'_>) -> MlxResult<Array> {
        squared_relu(&self.up.forward(x)?)
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.down)
    }

    fn arrays(&self) -> Vec<&Array> {
        self.up.arrays().into_iter().chain(self.down.arrays()).collect()
    }
}

/// Experts, in a smaller space if there is one, beside an MLP for all tokens.
struct Mixture {
    router: Router,
    latent: Option<(Linear, Linear)>,
    experts: Experts,
    shared: Option<Squared>,
}

impl Sublayer for Mixture {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> MlxResult<Array> {
        let (experts, shares) = self.router.forward(x)?;
        let routed = match &self.latent {
            Some((down, up)) => up.forward(&self.experts.forward(&down.forward(x)?, &experts, &shares)?)?,
            None => self.experts.forward(x, &experts, &shares)?,
        };
        match &self.shared {
            Some(shared) => routed.add(shared.down.forward(&shared.forward(x, context)?)?),
            None => Ok(routed),
        }
    }

    fn last(&self) -> Option<&Linear> {
        None
    }

    fn arrays(&self) -> Vec<&Array> {
        let latent = self.latent.iter().flat_map(|(down, up)| [down, up]).flat_map(Linear::arrays);
        let shared = self.shared.iter().flat_map(Sublayer::arrays);
        self.router.arrays().into_iter().chain(self.experts.arrays()).chain(latent).chain(shared).collect()
    }
}

impl NemotronH {
    fn mamba(&self, index: usize, prefix: &str, weights: &mut TensorCursor) -> Result<Mamba, Error> {
        let config = &self.config;
        let (hidden, heads, head_dim) = (config.hidden_size, config.mamba_num_heads, config.mamba_head_dim);
        let (inner, shared) = (heads * head_dim, config.n_groups * config.ssm_state_size);
        let channels = inner + 2 * shared;
        let taps = weights.floats(&format!("{prefix}.conv1d.weight"), &[channels, config.conv_kernel, 1])?;
        let bias = match config.use_conv_bias {
            true => Some(weights.floats(&format!("{prefix}.conv1d.bias"), &[channels])?),
            false => None,
        };
        let (columns, proj_bias) = (inner + channels + heads, config.mamba_proj_bias);
        Ok(Mamba {
            layer: self.state_index(index),
            input: weights.linear(&format!("{prefix}.in_proj"), columns, hidden, proj_bias)?,
            convolution: Convolution { weight: by_kernel(&taps)?, bias },
            heads,
            head_dim,
            groups: config.n_groups,
            state_dim: config.ssm_state_size,
            decay_log: weights.single(&format!("{prefix}.A_log"), &[heads])?,
            step_bias: weights.single(&format!("{prefix}.dt_bias"), &[heads])?,
            skip: weights.single(&format!("{prefix}.D"), &[heads])?,
            step_limit: self.step_limit,
            norm: weights.floats(&format!("{prefix}.norm.weight"), &[inner])?,
            norm_eps: config.layer_norm_epsilon,
            output: weights.linear(&format!("{prefix}.out_proj"), hidden, inner, proj_bias)?,
        })
    }

    fn mixture(&self, prefix: &str, weights: &mut TensorCursor) -> Result<Mixture, Error> {
        let config = &self.config;
        let (hidden, bias) = (config.hidden_size, config.mlp_bias);
        let experts = config.n_routed_experts.unwrap_or(0);
        let inner = config.moe_intermediate_size.unwrap_or(1);
        let size = config.moe_latent_size.unwrap_or(hidden);
        let latent = match config.moe_latent_size {
            Some(size) => Some((
                weights.linear(&format!("{prefix}.fc1_latent_proj"), size, hidden, bias)?,
                weights.linear(&format!("{prefix}.fc2_latent_proj"), hidden, size, bias)?,
            )),
            None => None,
        };
        let shared = match config.n_shared_experts {
            Some(_) => {
                let sizes = (hidden, config.moe_shared_expert_intermediate_size.unwrap_or(1));
                Some(Squared::load(weights, &format!("{prefix}.shared_experts"), sizes, bias)?)
            }
            None => None,
        };
        let stack = format!("{prefix}.switch_mlp");
        Ok(Mixture {
            router: Router {
                experts,
                chosen: config.num_experts_per_tok.unwrap_or(1),
                scoring: Scoring::Sigmoid {
                    bias: weights.single(&format!("{prefix}.gate.e_score_correction_bias"), &[experts])?,
                    groups: config.n_group,
                    groups_kept: config.topk_group,
                    normed: config.norm_topk_prob,
                    scale: config.routed_scaling_factor.unwrap_or(1.0),
                },
                logits: weights.linear(&format!("{prefix}.gate"), experts, hidden, false)?,
                expert_scale: None,
            },
            latent,
            experts: Experts {
                first: vec![weights.expert_matrix(&format!("{stack}.fc1"), [experts, inner, size], false)?],
                last: weights.expert_matrix(&format!("{stack}.fc2"), [experts, size, inner], false)?,
                activation: Activation::SquaredRelu,
                ops: weights.ops(),
            },
            shared,
        })
    }

    /// The place of a layer among those that keep something.
    fn state_index(&self, layer: usize) -> usize {
        self.kinds[..layer].iter().filter(|kind| matches!(kind, Kind::Mamba | Kind::Attention)).count()
    }
}

impl Architecture for NemotronH {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, layer_norm_epsilon, .. } = self.config;
        EmbeddingAndHead {
            embedding: "backbone.embeddings",
            norm: "backbone.norm_f",
            ..EmbeddingAndHead::new(hidden_size, vocab_size, layer_norm_epsilon, false)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let config = &self.config;
        let (heads, groups) =
            ((config.mamba_num_heads, config.mamba_head_dim), (config.n_groups, config.ssm_state_size));
        let state = |kind: &Kind| match kind {
            Kind::Mamba => Some(Mamba::state(heads, groups, config.conv_kernel, self.dtype)),
            Kind::Attention => Some(LayerState::Tokens(self.state)),
            Kind::Mlp | Kind::Experts => None,
        };
        self.kinds.iter().filter_map(state).collect()
    }

    fn layers(&self) -> usize {
        self.kinds.len()
    }

    fn ropes(&self) -> Vec<Rope> {
        Vec::new()
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.discard(|name| name.starts_with("mtp."));
        weights.change(
            |name| name.ends_with("conv1d.weight"),
            |array| match array.shape() {
                &[_, _, last] if last != 1 => array.swap_axes(1, 2),
                _ => Ok(array.clone()),
            },
        )?;
        for layer in 0..self.kinds.len() {
            let mixer = format!("backbone.layers.{layer}.mixer");
            for (part, stacked) in [("up_proj", "fc1"), ("down_proj", "fc2")] {
                let experts = self.config.n_routed_experts.unwrap_or(0);
                let stack = format!("{mixer}.switch_mlp.{stacked}");
                weights.stack_experts(&format!("{mixer}.experts"), part, &stack, experts)?;
            }
        }
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, attention_bias: bias, .. } = self.config;
        let mixer = format!("backbone.layers.{index}.mixer");
        let eps = self.config.layer_norm_epsilon;
        let before = weights.rms_norm(&format!("backbone.layers.{index}.norm"), hidden, eps)?;
        Ok(vec![match self.kinds[index] {
            Kind::Mamba => Residual::new(before, self.mamba(index, &mixer, weights)?),
            Kind::Attention => {
                let state = (self.state_index(index), &self.state);
                let attention = Attention::load(weights, &mixer, state, hidden, (bias, bias))?;
                Residual::new(before, Attention { rope: None, ..attention })
            }
            Kind::Mlp => {
                let sizes = (hidden, self.config.intermediate_size);
                Residual::new(before, Squared::load(weights, &mixer, sizes, self.config.mlp_bias)?)
            }
            Kind::Experts => Residual::new(before, self.mixture(&mixer, weights)?),
        }])
    }
}
