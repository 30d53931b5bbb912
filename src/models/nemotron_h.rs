//! Nemotron-H (NVIDIA, <https://arxiv.org/abs/2504.03624>): layers of one kind each, Mamba-2 mixers,
//! attention without positions, MLPs or mixtures of experts.

use mlx_rs::Array;
use mlx_rs::error::Result as MlxResult;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::given::Given;
use super::parts::{ExpertSizes, GroupedExperts, Layer, convolution, mlx_kernels};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::LayerState;
use crate::mlx::layers::{
    Activation, Attention, Experts, ForwardContext, Linear, Mamba, Residual, Router, Sublayer, squared_relu,
};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    eps_key: "layer_norm_epsilon",
    attention_bias: Key::Or(false),
    mlp_bias: Key::Or(false),
    // Attention does not rotate.
    rope_theta: Key::Always(0.0),
    activation: "relu2",
    activation_keys: &["mlp_hidden_act"],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    mamba_num_heads: i32,
    mamba_head_dim: i32,
    #[serde(default)]
    mamba_proj_bias: bool,
    ssm_state_size: i32,
    conv_kernel: i32,
    n_groups: i32,
    #[serde(default = "config::yes")]
    use_conv_bias: bool,
    hybrid_override_pattern: Option<Value>,
    layers_block_type: Option<Vec<String>>,
    layer_types: Option<Vec<String>>,
    moe_intermediate_size: Option<i32>,
    moe_shared_expert_intermediate_size: Option<i32>,
    moe_latent_size: Option<i32>,
    #[serde(default = "config::or::<1, _>")]
    n_group: i32,
    n_routed_experts: Option<i32>,
    n_shared_experts: Option<i32>,
    #[serde(default = "config::or::<1, _>")]
    topk_group: i32,
    num_experts_per_tok: Option<i32>,
    norm_topk_prob: Option<bool>,
    #[serde(default = "config::or::<1, _>")]
    routed_scaling_factor: f32,
    #[serde(default, deserialize_with = "pair")]
    time_step_limit: Option<(Value, Value)>,
    /// The same by the name of Mamba-2's own code.
    #[serde(default, deserialize_with = "pair")]
    mamba_dt_limit: Option<(Value, Value)>,
    #[serde(default = "silu")]
    mamba_hidden_act: String,
    #[serde(default)]
    use_bias: bool,
}

/// Reads a pair; it may be left out, and not be null.
fn pair<'de, D: Deserializer<'de>>(of: D) -> Result<Option<(Value, Value)>, D::Error> {
    <(Value, Value)>::deserialize(of).map(Some)
}

fn unlimited() -> (Value, Value) {
    (json!(0.0), json!({ "__float__": "Infinity" }))
}

fn silu() -> String {
    "silu".into()
}

/// The kind of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mamba,
    Attention,
    Mlp,
    Experts,
}

struct NemotronH {
    common: Common,
    config: Config,
    kinds: Vec<Kind>,
    step_limit: (f32, f32),
    dtype: mlx_rs::Dtype,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let config: Config = given.parse()?;
    let kinds = config.kinds()?;
    let (common, _) = Common::read(given, &Keys { num_hidden_layers: Key::Always(kinds.len()), ..KEYS })?;
    config.check(&kinds)?;
    let step_limit = config.step_limit()?;
    Ok(loader(NemotronH { common, config, kinds, step_limit, dtype: setup.dtype }, setup))
}

impl Config {
    fn kinds(&self) -> Result<Vec<Kind>, OpenError> {
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
            other => Err(OpenError::Unsupported(format!("layer type {other:?}"))),
        };
        names.iter().map(kind).collect()
    }

    fn check(&self, kinds: &[Kind]) -> Result<(), OpenError> {
        config::sizes(&[
            ("moe_intermediate_size", self.moe_intermediate_size.unwrap_or(1)),
            ("moe_shared_expert_intermediate_size", self.moe_shared_expert_intermediate_size.unwrap_or(1)),
            ("moe_latent_size", self.moe_latent_size.unwrap_or(1)),
        ])?;
        config::heads(self.mamba_num_heads, self.n_groups, self.mamba_head_dim)?;
        config::heads(self.mamba_num_heads, self.n_groups, self.ssm_state_size)?;
        config::choice("mamba_hidden_act", Some(&self.mamba_hidden_act), "silu")?;
        // Two names that two readers have for the same.
        if self.use_bias != self.mamba_proj_bias {
            return config::unsupported("use_bias other than mamba_proj_bias");
        }
        config::kernel("conv_kernel", self.conv_kernel)?;
        if !kinds.contains(&Kind::Experts) {
            return Ok(());
        }
        for (key, silent) in [
            ("n_routed_experts", self.n_routed_experts.is_none()),
            ("num_experts_per_tok", self.num_experts_per_tok.is_none()),
            ("moe_intermediate_size", self.moe_intermediate_size.is_none()),
            ("norm_topk_prob", self.norm_topk_prob.is_none()),
            ("n_shared_experts", self.n_shared_experts.is_none()),
        ] {
            if silent {
                return config::invalid(format!("{key} is missing"));
            }
        }
        let (all, chosen) = (self.n_routed_experts.unwrap_or(0), self.num_experts_per_tok.unwrap_or(0));
        config::experts(all, chosen, (self.n_group, self.topk_group))
    }

    fn step_limit(&self) -> Result<(f32, f32), OpenError> {
        let unlimited = unlimited();
        let (low, high) = match (&self.time_step_limit, &self.mamba_dt_limit) {
            (Some(limit), Some(other)) if limit != other => {
                return config::invalid("time_step_limit and mamba_dt_limit differ");
            }
            (Some(limit), _) | (None, Some(limit)) => limit,
            (None, None) => &unlimited,
        };
        let limit = |value: &Value| crate::hub::config_f64(value).filter(|limit| !limit.is_nan());
        match limit(low).zip(limit(high)) {
            Some((low, high)) if low <= high => Ok((config::single(low), config::single(high))),
            _ => config::invalid("time_step_limit is not a pair of numbers, the smaller first"),
        }
    }

    fn experts(&self) -> GroupedExperts {
        GroupedExperts {
            sizes: ExpertSizes {
                experts: self.n_routed_experts.unwrap_or(0),
                chosen: self.num_experts_per_tok.unwrap_or(1),
                inner: self.moe_intermediate_size.unwrap_or(1),
            },
            groups: self.n_group,
            groups_kept: self.topk_group,
            normed: self.norm_topk_prob.unwrap_or(true),
            scale: self.routed_scaling_factor,
            shared: self.n_shared_experts.map(|_| self.moe_shared_expert_intermediate_size.unwrap_or(1)),
        }
    }
}

/// An MLP of two matrices with a squared ReLU between.
struct Squared {
    up: Linear,
    down: Linear,
}

impl Squared {
    fn load(weights: &mut TensorCursor, prefix: &str, sizes: (i32, i32), bias: bool) -> Result<Self, Error> {
        let (hidden, inner) = sizes;
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

/// Experts, in a smaller space if `latent` leads there and back, beside an MLP that every token goes through.
struct LatentMixture {
    router: Router,
    latent: Option<(Linear, Linear)>,
    experts: Experts,
    shared: Option<Squared>,
}

impl Sublayer for LatentMixture {
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
        let Self { common: Common { hidden, eps, .. }, config, .. } = self;
        let (heads, head_dim) = (config.mamba_num_heads, config.mamba_head_dim);
        let (inner, shared) = (heads * head_dim, config.n_groups * config.ssm_state_size);
        let channels = inner + 2 * shared;
        let (columns, proj_bias) = (inner + channels + heads, config.mamba_proj_bias);
        let sizes = (channels, config.conv_kernel);
        Ok(Mamba {
            layer: self.state_index(index),
            input: weights.linear(&format!("{prefix}.in_proj"), columns, *hidden, proj_bias)?,
            convolution: convolution(weights, &format!("{prefix}.conv1d"), sizes, config.use_conv_bias)?,
            heads,
            head_dim,
            groups: config.n_groups,
            state_dim: config.ssm_state_size,
            decay_log: weights.single(&format!("{prefix}.A_log"), &[heads])?,
            step_bias: weights.single(&format!("{prefix}.dt_bias"), &[heads])?,
            skip: weights.single(&format!("{prefix}.D"), &[heads])?,
            step_limit: self.step_limit,
            norm: weights.floats(&format!("{prefix}.norm.weight"), &[inner])?,
            norm_eps: *eps,
            output: weights.linear(&format!("{prefix}.out_proj"), *hidden, inner, proj_bias)?,
        })
    }

    fn mixture(&self, prefix: &str, weights: &mut TensorCursor) -> Result<LatentMixture, Error> {
        let Common { hidden, mlp_bias: bias, .. } = self.common;
        let grouped = self.config.experts();
        let ExpertSizes { experts, chosen, inner } = grouped.sizes;
        let size = self.config.moe_latent_size.unwrap_or(hidden);
        let latent = match self.config.moe_latent_size {
            Some(size) => Some((
                weights.linear(&format!("{prefix}.fc1_latent_proj"), size, hidden, bias)?,
                weights.linear(&format!("{prefix}.fc2_latent_proj"), hidden, size, bias)?,
            )),
            None => None,
        };
        let name = format!("{prefix}.shared_experts");
        let shared = grouped.shared.map(|inner| Squared::load(weights, &name, (hidden, inner), bias));
        let shared = shared.transpose()?;
        let scoring = grouped.scoring(prefix, weights)?;
        let logits = weights.linear(&format!("{prefix}.gate"), experts, hidden, false)?;
        let stack = format!("{prefix}.switch_mlp");
        Ok(LatentMixture {
            router: Router { logits, experts, chosen, scoring, expert_scale: None },
            latent,
            experts: Experts {
                first: vec![weights.expert_matrix(&format!("{stack}.fc1"), [experts, inner, size], false)?],
                last: weights.expert_matrix(&format!("{stack}.fc2"), [experts, size, inner], false)?,
                activation: Activation::SquaredRelu,
                kernels: weights.kernels(),
            },
            shared,
        })
    }

    /// Returns the index of a layer among those that keep a state.
    fn state_index(&self, layer: usize) -> usize {
        self.kinds[..layer].iter().filter(|kind| matches!(kind, Kind::Mamba | Kind::Attention)).count()
    }
}

impl Architecture for NemotronH {
    fn common(&self) -> &Common {
        &self.common
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead {
            embedding: "backbone.embeddings",
            norm: "backbone.norm_f",
            ..EmbeddingAndHead::new(&self.common)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let config = &self.config;
        let (heads, groups) =
            ((config.mamba_num_heads, config.mamba_head_dim), (config.n_groups, config.ssm_state_size));
        let state = |kind: &Kind| match kind {
            Kind::Mamba => Some(Mamba::state(heads, groups, config.conv_kernel, self.dtype)),
            Kind::Attention => Some(LayerState::Tokens(self.common.attention)),
            Kind::Mlp | Kind::Experts => None,
        };
        self.kinds.iter().filter_map(state).collect()
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.discard(|name| name.starts_with("mtp."));
        mlx_kernels(weights, "conv1d.weight")?;
        for layer in 0..self.common.layers {
            let mixer = format!("backbone.layers.{layer}.mixer");
            for (part, stacked) in [("up_proj", "fc1"), ("down_proj", "fc2")] {
                let experts = self.config.n_routed_experts.unwrap_or(0);
                let stack = format!("{mixer}.switch_mlp.{stacked}");
                weights.stack_experts(&format!("{mixer}.experts"), part, &stack, experts)?;
            }
        }
        Ok(())
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Common { hidden, inner, mlp_bias, qkv_bias, output_bias, .. } = self.common;
        let index = layer.index;
        let prefix = format!("backbone.layers.{index}.mixer");
        let body: Box<dyn Sublayer> = match self.kinds[index] {
            Kind::Mamba => Box::new(self.mamba(index, &prefix, weights)?),
            Kind::Attention => {
                let state = (self.state_index(index), &self.common.attention);
                let attention = Attention::load(weights, &prefix, state, hidden, (qkv_bias, output_bias))?;
                Box::new(Attention { rope: None, ..attention })
            }
            Kind::Mlp => Box::new(Squared::load(weights, &prefix, (hidden, inner), mlp_bias)?),
            Kind::Experts => Box::new(self.mixture(&prefix, weights)?),
        };
        let before = self.common.norm(&format!("backbone.layers.{index}.norm"), weights)?;
        Ok(vec![Residual::new(before, body)])
    }
}
