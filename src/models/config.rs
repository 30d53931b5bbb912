//! Reading config.json: checks that architectures share. What is out of range is invalid; an option that is not
//! implemented is unsupported, by its name.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ConfigError;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::Rope;

/// What `layer_types` can say of softmax attention.
pub(super) const FULL: &str = "full_attention";
/// See [`FULL`].
pub(super) const SLIDING: &str = "sliding_attention";

pub(super) fn yes() -> bool {
    true
}

pub(super) fn ten_thousand() -> f64 {
    10_000.0
}

/// Reads a config's fields.
pub(super) fn parse<C: DeserializeOwned>(config: &Value) -> Result<C, ConfigError> {
    C::deserialize(config).map_err(|error| ConfigError::Invalid(format!("config.json: {error}")))
}

pub(super) fn invalid<T>(why: impl std::fmt::Display) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid(format!("config.json: {why}")))
}

/// Checks sizes of matrices: between 1 and 2^24.
pub(super) fn sizes(named: &[(&str, i32)]) -> Result<(), ConfigError> {
    match named.iter().find(|(_, size)| !(1..=1 << 24).contains(size)) {
        Some((name, size)) => invalid(format!("{name} is {size}, not between 1 and 2^24")),
        None => Ok(()),
    }
}

/// Checks the number of layers and a factor of each of them.
pub(super) fn depth(layers: usize) -> Result<(), ConfigError> {
    if (1..=1024).contains(&layers) { Ok(()) } else { invalid(format!("num_hidden_layers is {layers}")) }
}

/// Checks heads: keys are shared by as many queries each.
pub(super) fn heads(heads: i32, kv_heads: i32, head_dim: i32) -> Result<(), ConfigError> {
    sizes(&[("num_attention_heads", heads), ("num_key_value_heads", kv_heads)])?;
    if !(1..=4096).contains(&head_dim) {
        return invalid(format!("head_dim is {head_dim}"));
    }
    if i64::from(heads) * i64::from(head_dim) > 1 << 24 {
        return invalid(format!("{heads} heads of {head_dim} are more than 2^24 numbers"));
    }
    if heads % kv_heads != 0 {
        return invalid(format!("{heads} heads do not share {kv_heads} key heads"));
    }
    Ok(())
}

/// Checks numbers that must be positive.
pub(super) fn positive(named: &[(&str, f64)]) -> Result<(), ConfigError> {
    match named.iter().find(|(_, number)| !(*number > 0.0 && number.is_finite())) {
        Some((name, number)) => invalid(format!("{name} is {number}, not above 0")),
        None => Ok(()),
    }
}

/// Checks the epsilon of norms.
pub(super) fn epsilon(eps: f32) -> Result<(), ConfigError> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { invalid(format!("rms_norm_eps is {eps}")) }
}

/// Refuses an activation that is not one of these; None is the first.
pub(super) fn activation(given: Option<&str>, known: &[&str]) -> Result<(), ConfigError> {
    match given.filter(|given| !known.contains(given)) {
        Some(other) => Err(ConfigError::Unsupported(format!("hidden_act {other:?}"))),
        None => Ok(()),
    }
}

/// Refuses a choice that is not one of these; None is the first.
pub(super) fn choice(name: &str, given: Option<&str>, known: &[&str]) -> Result<(), ConfigError> {
    match given.filter(|given| !known.contains(given)) {
        Some(other) => Err(ConfigError::Unsupported(format!("{name} {other:?}"))),
        None => Ok(()),
    }
}

/// Checks the number of experts, of those of a token, and of groups of them and of those that are kept.
pub(super) fn experts(experts: i32, chosen: i32, (groups, kept): (i32, i32)) -> Result<(), ConfigError> {
    if !(1..=1 << 16).contains(&experts) || !(1..=experts).contains(&chosen) {
        return invalid(format!("{chosen} of {experts} experts"));
    }
    let even = groups >= 1 && experts % groups == 0 && (1..=groups).contains(&kept);
    // A group counts by its two best, and those that are kept must have enough.
    let enough = even && (groups == 1 || experts / groups >= 2 && kept * (experts / groups) >= chosen);
    if enough { Ok(()) } else { invalid(format!("{kept} of {groups} groups of {experts} experts")) }
}

/// In single precision.
#[allow(clippy::cast_possible_truncation, reason = "factors are a few units")]
pub(super) fn single(number: f64) -> f32 {
    number as f32
}

/// Refuses an option that is on.
pub(super) fn off(config: &Value, options: &[&str]) -> Result<(), ConfigError> {
    let on = options.iter().find(|option| match config.get(**option) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(_) => true,
    });
    on.map_or(Ok(()), |on| Err(ConfigError::Unsupported((*on).to_owned())))
}

/// The kinds of all layers, each of them known; as many as layers.
pub(super) fn layer_kinds(kinds: &[String], layers: usize, known: &[&str]) -> Result<(), ConfigError> {
    if let Some(other) = kinds.iter().find(|kind| !known.contains(&kind.as_str())) {
        return Err(ConfigError::Unsupported(format!("layer type {other:?}")));
    }
    if kinds.len() != layers {
        return invalid("layer_types does not name every layer");
    }
    Ok(())
}

/// The window of a layer of this kind.
pub(super) fn window(kind: &str, sliding_window: Option<i32>) -> Result<i32, ConfigError> {
    match (kind, sliding_window) {
        (SLIDING, Some(window)) if window > 0 => Ok(window),
        (SLIDING, _) => invalid("sliding_attention without a sliding_window"),
        _ => Ok(0),
    }
}

/// A rotation of the first `dims` numbers of a head.
pub(super) fn rope(
    dims: i32,
    theta: f64,
    traditional: bool,
    scaling: Option<&Value>,
    config: &Value,
) -> Result<Rope, ConfigError> {
    positive(&[("rope_theta", theta)])?;
    let context = config.get("max_position_embeddings").and_then(Value::as_u64);
    let context = context.and_then(|context| u32::try_from(context).ok());
    Rope::new(dims, theta, traditional, scaling, context).map_err(ConfigError::Unsupported)
}

/// `size * part`, cut to a whole number, as mlx-lm does it for partial rotations.
#[allow(clippy::cast_possible_truncation, reason = "a head has a few hundred numbers")]
pub(super) fn part_of(size: i32, part: f64) -> i32 {
    (f64::from(size) * part) as i32
}

/// Attention of a layer over this many positions; 0 is all.
pub(super) fn windowed(state: TokenState, window: i32) -> TokenState {
    TokenState { window, ..state }
}
