//! Reads config.json: the keys that most architectures have (`Common`, read as an architecture's `Keys` say),
//! and the checks that they share. A value out of range is invalid; an option that is not implemented is
//! unsupported, by its name. A key that has no effect here has none in mlx-lm either.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::OpenError;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::Rope;

/// A value of `layer_types`: softmax attention to all positions.
pub(super) const FULL: &str = "full_attention";
/// A value of `layer_types`: softmax attention within a window.
pub(super) const SLIDING: &str = "sliding_attention";

/// The default of a key that is true if missing, for serde.
pub(super) fn yes() -> bool {
    true
}

/// The default `N` of a key, for serde.
pub(super) fn or<const N: u16, T: From<u16>>() -> T {
    N.into()
}

/// How a key is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key<T> {
    /// Neither missing nor null.
    Required,
    /// This value if the key is missing.
    Or(T),
    /// This value whatever the config says: mlx-lm does not read the key.
    Always(T),
}

/// How an architecture reads the common keys, as its `ModelArgs` in mlx-lm does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    pub(super) hidden_size: Key<i32>,
    pub(super) num_hidden_layers: Key<usize>,
    pub(super) intermediate_size: Key<i32>,
    pub(super) num_attention_heads: Key<i32>,
    /// None: as many as query heads.
    pub(super) num_key_value_heads: Key<Option<i32>>,
    /// None: `hidden_size / num_attention_heads`.
    pub(super) head_dim: Key<Option<i32>>,
    pub(super) rms_norm_eps: Key<f32>,
    /// The name of the key of the norms' epsilon.
    pub(super) eps_key: &'static str,
    pub(super) vocab_size: Key<i32>,
    pub(super) attention_bias: Key<bool>,
    pub(super) mlp_bias: Key<bool>,
    pub(super) rope_theta: Key<f64>,
    pub(super) rope_traditional: Key<bool>,
    pub(super) tie_word_embeddings: Key<bool>,
    /// The only activation of the MLPs that is implemented.
    pub(super) activation: &'static str,
    /// The keys that may name it; the first one present counts.
    pub(super) activation_keys: &'static [&'static str],
}

impl Keys {
    /// All keys are required, but for those that most architectures do not read: biases and
    /// `rope_traditional`.
    pub(super) const USUAL: Self = Self {
        hidden_size: Key::Required,
        num_hidden_layers: Key::Required,
        intermediate_size: Key::Required,
        num_attention_heads: Key::Required,
        num_key_value_heads: Key::Required,
        head_dim: Key::Required,
        rms_norm_eps: Key::Required,
        eps_key: "rms_norm_eps",
        vocab_size: Key::Required,
        attention_bias: Key::Always(false),
        mlp_bias: Key::Always(false),
        rope_theta: Key::Required,
        rope_traditional: Key::Always(false),
        tie_word_embeddings: Key::Required,
        activation: "silu",
        activation_keys: &["hidden_act"],
    };

    /// Llama's (mlx-lm's models/llama.py), which several others share.
    pub(super) const LLAMA: Self = Self {
        num_key_value_heads: Key::Or(None),
        head_dim: Key::Or(None),
        attention_bias: Key::Or(false),
        mlp_bias: Key::Or(false),
        rope_theta: Key::Or(1e4),
        rope_traditional: Key::Or(false),
        tie_word_embeddings: Key::Or(true),
        ..Self::USUAL
    };
}

/// The common keys, checked.
#[derive(Clone, Debug)]
pub(super) struct Common {
    /// Elements of a hidden state.
    pub(super) hidden: i32,
    pub(super) layers: usize,
    /// Inner size of an MLP.
    pub(super) inner: i32,
    pub(super) vocabulary: i32,
    /// Epsilon of the norms.
    pub(super) eps: f32,
    /// Attention of a layer, before an architecture changes its scale or gives it a window.
    pub(super) attention: TokenState,
    /// Whether the projections to queries, keys and values have biases.
    pub(super) qkv_bias: bool,
    /// Whether the projection after attention has a bias.
    pub(super) output_bias: bool,
    pub(super) mlp_bias: bool,
    /// Whether the embedding serves as head.
    pub(super) tied: bool,
    pub(super) rope_theta: f64,
    pub(super) rope_traditional: bool,
    /// The rotations, which attention names by index. `read` leaves them to the architecture.
    pub(super) ropes: Vec<Rope>,
}

impl<T: Copy + DeserializeOwned> Key<T> {
    /// Reads the key of this name.
    pub(super) fn read(self, config: &Value, name: &str) -> Result<T, OpenError> {
        match (self, config.get(name)) {
            (Self::Always(value), _) | (Self::Or(value), None) => Ok(value),
            (Self::Required, None | Some(Value::Null)) => invalid(format!("{name} is missing")),
            (Self::Required | Self::Or(_), Some(given)) => {
                T::deserialize(given).or_else(|error| invalid(format!("{name}: {error}")))
            }
        }
    }
}

impl Common {
    /// Reads and checks the common keys.
    pub(super) fn read(config: &Value, keys: &Keys) -> Result<Self, OpenError> {
        let hidden = keys.hidden_size.read(config, "hidden_size")?;
        let inner = keys.intermediate_size.read(config, "intermediate_size")?;
        let vocabulary = keys.vocab_size.read(config, "vocab_size")?;
        sizes(&[("hidden_size", hidden), ("intermediate_size", inner), ("vocab_size", vocabulary)])?;
        let layers = keys.num_hidden_layers.read(config, "num_hidden_layers")?;
        if !(1..=1024).contains(&layers) {
            return invalid(format!("num_hidden_layers is {layers}, not between 1 and 1024"));
        }
        let query_heads = keys.num_attention_heads.read(config, "num_attention_heads")?;
        let kv_heads = keys.num_key_value_heads.read(config, "num_key_value_heads")?.unwrap_or(query_heads);
        let head_dim = keys.head_dim.read(config, "head_dim")?.unwrap_or(hidden / query_heads.max(1));
        heads(query_heads, kv_heads, head_dim)?;
        let eps: f32 = keys.rms_norm_eps.read(config, keys.eps_key)?;
        if !(eps >= 0.0 && eps.is_finite()) {
            return invalid(format!("{} is {eps}", keys.eps_key));
        }
        let given =
            keys.activation_keys.iter().find_map(|key| config.get(*key).filter(|given| !given.is_null()));
        if let Some(other) = given.filter(|given| given.as_str() != Some(keys.activation)) {
            return unsupported(format!("{} {other}", keys.activation_keys[0]));
        }
        let attention_bias = keys.attention_bias.read(config, "attention_bias")?;
        Ok(Self {
            hidden,
            layers,
            inner,
            vocabulary,
            eps,
            attention: TokenState::new(query_heads, kv_heads, head_dim),
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: keys.mlp_bias.read(config, "mlp_bias")?,
            tied: keys.tie_word_embeddings.read(config, "tie_word_embeddings")?,
            rope_theta: keys.rope_theta.read(config, "rope_theta")?,
            rope_traditional: keys.rope_traditional.read(config, "rope_traditional")?,
            ropes: Vec::new(),
        })
    }

    /// Reads and checks the common keys of a model that rotates whole heads by `rope_theta` and
    /// `rope_scaling`.
    pub(super) fn rotated(config: &Value, keys: &Keys) -> Result<Self, OpenError> {
        let mut common = Self::read(config, keys)?;
        common.ropes = vec![common.rope(common.attention.head_dim, config.get("rope_scaling"), config)?];
        Ok(common)
    }

    /// Returns the rotation of the first `dims` elements of a head with this scaling.
    pub(super) fn rope(&self, dims: i32, scaling: Option<&Value>, config: &Value) -> Result<Rope, OpenError> {
        rope(dims, self.rope_theta, self.rope_traditional, scaling, config)
    }
}

/// Reads an architecture's own keys.
pub(super) fn parse<C: DeserializeOwned>(config: &Value) -> Result<C, OpenError> {
    C::deserialize(config).or_else(invalid)
}

/// Refuses a config that is missing something, malformed or contradictory.
pub(super) fn invalid<T>(why: impl std::fmt::Display) -> Result<T, OpenError> {
    Err(OpenError::Invalid(format!("config.json: {why}")))
}

/// Refuses an option that is not implemented.
pub(super) fn unsupported<T>(option: impl Into<String>) -> Result<T, OpenError> {
    Err(OpenError::Unsupported(option.into()))
}

/// Checks sizes of matrices: between 1 and 2^24.
pub(super) fn sizes(named: &[(&str, i32)]) -> Result<(), OpenError> {
    match named.iter().find(|(_, size)| !(1..=1 << 24).contains(size)) {
        Some((name, size)) => invalid(format!("{name} is {size}, not between 1 and 2^24")),
        None => Ok(()),
    }
}

/// Checks heads: an equal number of query heads shares each key head.
pub(super) fn heads(heads: i32, kv_heads: i32, head_dim: i32) -> Result<(), OpenError> {
    sizes(&[("num_attention_heads", heads), ("num_key_value_heads", kv_heads)])?;
    if !(1..=4096).contains(&head_dim) {
        return invalid(format!("head_dim is {head_dim}, not between 1 and 4096"));
    }
    if i64::from(heads) * i64::from(head_dim) > 1 << 24 {
        return invalid(format!("{heads} heads of {head_dim} are more than 2^24 elements"));
    }
    if heads % kv_heads != 0 {
        return invalid(format!("{heads} heads do not share {kv_heads} key heads"));
    }
    Ok(())
}

/// Checks that numbers are positive.
pub(super) fn positive(named: &[(&str, f64)]) -> Result<(), OpenError> {
    match named.iter().find(|(_, number)| !(*number > 0.0 && number.is_finite())) {
        Some((name, number)) => invalid(format!("{name} is {number}, not above 0")),
        None => Ok(()),
    }
}

/// Checks the kernel size of a convolution over tokens.
pub(super) fn kernel(name: &str, size: i32) -> Result<(), OpenError> {
    if (2..=64).contains(&size) { Ok(()) } else { invalid(format!("{name} is {size}, not between 2 and 64")) }
}

/// Refuses a choice other than the one that is implemented; None is that one.
pub(super) fn choice(name: &str, given: Option<&str>, known: &str) -> Result<(), OpenError> {
    match given.filter(|given| *given != known) {
        Some(other) => unsupported(format!("{name} {other:?}")),
        None => Ok(()),
    }
}

/// Checks the numbers of experts, of experts per token, of expert groups, and of groups kept per token.
pub(super) fn experts(experts: i32, chosen: i32, (groups, kept): (i32, i32)) -> Result<(), OpenError> {
    if !(1..=1 << 16).contains(&experts) || !(1..=experts).contains(&chosen) {
        return invalid(format!("{chosen} of {experts} experts"));
    }
    let even = groups >= 1 && experts % groups == 0 && (1..=groups).contains(&kept);
    // A group is ranked by its two best experts, and the kept groups must hold enough of them.
    let enough = even && (groups == 1 || experts / groups >= 2 && kept * (experts / groups) >= chosen);
    if enough { Ok(()) } else { invalid(format!("{kept} of {groups} groups of {experts} experts")) }
}

/// Converts to single precision.
#[allow(clippy::cast_possible_truncation, reason = "factors are a few units")]
pub(super) fn single(number: f64) -> f32 {
    number as f32
}

/// Returns the square root of a size.
pub(super) fn root(size: i32) -> f32 {
    single(f64::from(size).sqrt())
}

/// Refuses options that are on.
pub(super) fn off(config: &Value, options: &[&str]) -> Result<(), OpenError> {
    let on = options.iter().find(|option| match config.get(**option) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(_) => true,
    });
    on.map_or(Ok(()), |on| unsupported(*on))
}

/// Checks that `layer_types` names a known kind for every layer.
pub(super) fn layer_kinds(kinds: &[String], layers: usize, known: &[&str]) -> Result<(), OpenError> {
    if let Some(other) = kinds.iter().find(|kind| !known.contains(&kind.as_str())) {
        return unsupported(format!("layer type {other:?}"));
    }
    if kinds.len() != layers {
        return invalid("layer_types does not name every layer");
    }
    Ok(())
}

/// Returns the window of a layer of this kind; 0 is none.
pub(super) fn window(kind: &str, sliding_window: Option<i32>) -> Result<i32, OpenError> {
    match (kind, sliding_window) {
        (SLIDING, Some(window)) if window > 0 => Ok(window),
        (SLIDING, _) => invalid("sliding_attention without a sliding_window"),
        _ => Ok(0),
    }
}

/// Returns the window of each layer by `layer_types`; without that key the kinds of `pattern` repeat.
pub(super) fn windows(
    config: &Value,
    layers: usize,
    pattern: &[&str],
    sliding_window: Key<Option<i32>>,
) -> Result<Vec<i32>, OpenError> {
    #[derive(Deserialize)]
    struct Listed {
        layer_types: Option<Vec<String>>,
    }
    let sliding_window = sliding_window.read(config, "sliding_window")?;
    let repeated = || pattern.iter().cycle().take(layers).map(|kind| (*kind).to_owned()).collect();
    let kinds = parse::<Listed>(config)?.layer_types.unwrap_or_else(repeated);
    layer_kinds(&kinds, layers, &[FULL, SLIDING])?;
    kinds.iter().map(|kind| window(kind, sliding_window)).collect()
}

/// Returns the rotation of the first `dims` elements of a head.
pub(super) fn rope(
    dims: i32,
    theta: f64,
    traditional: bool,
    scaling: Option<&Value>,
    config: &Value,
) -> Result<Rope, OpenError> {
    positive(&[("rope_theta", theta)])?;
    let context = config.get("max_position_embeddings").and_then(Value::as_u64);
    let context = context.and_then(|context| u32::try_from(context).ok());
    Rope::new(dims, theta, traditional, scaling, context).map_err(OpenError::Unsupported)
}

/// Returns the elements of a head that are rotated where only a part of it is.
pub(super) fn rotated_part(head_dim: i32, part: f64) -> Result<i32, OpenError> {
    if part > 0.0 && part <= 1.0 {
        Ok(part_of(head_dim, part))
    } else {
        invalid(format!("partial_rotary_factor is {part}, not above 0 and at most 1"))
    }
}

/// Returns `size * part`, cut to a whole number, as mlx-lm does it.
#[allow(clippy::cast_possible_truncation, reason = "a head has a few hundred elements")]
pub(super) fn part_of(size: i32, part: f64) -> i32 {
    (f64::from(size) * part) as i32
}
