//! Reads config.json: the keys that most architectures have (`Common`, read as an architecture's `Keys` say),
//! and the checks that they share. A value out of range is invalid; an option that is not implemented is
//! unsupported, by its name. A missing key has its default where transformers and mlx-lm agree on one;
//! elsewhere it is invalid.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::OpenError;
use super::given::Given;
pub(super) use super::given::{invalid, unsupported};
use super::rotation::Rotation;
use crate::hub;
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

/// Reads a key that may be null and may not be missing, for serde.
pub(super) fn nullable<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    value: D,
) -> Result<Option<T>, D::Error> {
    Option::deserialize(value)
}

/// How a key is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key<T> {
    /// Neither missing nor null.
    Required,
    /// This value if the key is missing.
    Or(T),
    /// This value whatever the config says: the architecture has no such key.
    Always(T),
}

/// Returns how a release of several parts gives the size of the vocabulary: many leave it out.
pub(super) fn vocabulary_of_release(model_type: &str) -> Key<i32> {
    let size = hub::text_default(model_type, "vocab_size").and_then(|size| size.try_into().ok());
    size.map_or(Key::Required, Key::Or)
}

/// How an architecture reads the common keys.
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
        activation: "silu",
        activation_keys: &["hidden_act"],
    };

    /// Llama's, which several others share.
    pub(super) const LLAMA: Self = Self {
        num_key_value_heads: Key::Or(None),
        head_dim: Key::Or(None),
        attention_bias: Key::Or(false),
        mlp_bias: Key::Or(false),
        rope_theta: Key::Or(1e4),
        rope_traditional: Key::Or(false),
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
    /// Whether the embedding serves as head; None: the files say.
    pub(super) tied: Option<bool>,
    pub(super) rope_theta: f64,
    pub(super) rope_traditional: bool,
    /// The rotations, which attention names by index. `read` leaves them to the architecture.
    pub(super) ropes: Vec<Rope>,
}

impl<T: Copy + DeserializeOwned> Key<T> {
    /// Reads the key of this name.
    pub(super) fn read(self, given: &Given<'_>, name: &'static str) -> Result<T, OpenError> {
        if let Self::Always(value) = self {
            return Ok(value);
        }
        match (self, given.get(name)) {
            (Self::Always(value) | Self::Or(value), None) => Ok(value),
            (Self::Required, None) => invalid(format!("{} is missing", Given::called(name))),
            (Self::Required, Some(Value::Null)) => invalid(format!("{} is null", Given::called(name))),
            (_, Some(value)) => T::deserialize(value).or_else(|error| match value {
                Value::Null => invalid(format!("{} is null", Given::called(name))),
                _ => invalid(format!("{name}: {error}")),
            }),
        }
    }

    /// Returns what was read elsewhere, or the default.
    pub(super) fn or(self, read: Option<T>, name: &str) -> Result<T, OpenError> {
        match (self, read) {
            (Self::Always(value), _) | (Self::Or(value), None) => Ok(value),
            (_, Some(value)) => Ok(value),
            (Self::Required, None) => invalid(format!("{name} is missing")),
        }
    }
}

impl Common {
    /// Reads and checks the common keys.
    pub(super) fn read(given: &Given<'_>, keys: &Keys) -> Result<(Self, Rotation), OpenError> {
        let hidden = keys.hidden_size.read(given, "hidden_size")?;
        let inner = keys.intermediate_size.read(given, "intermediate_size")?;
        let vocabulary = keys.vocab_size.read(given, "vocab_size")?;
        sizes(&[("hidden_size", hidden), ("intermediate_size", inner), ("vocab_size", vocabulary)])?;
        let layers = keys.num_hidden_layers.read(given, "num_hidden_layers")?;
        if !(1..=1024).contains(&layers) {
            return invalid(format!("num_hidden_layers is {layers}, not between 1 and 1024"));
        }
        let query_heads = keys.num_attention_heads.read(given, "num_attention_heads")?;
        let kv_heads = keys.num_key_value_heads.read(given, "num_key_value_heads")?.unwrap_or(query_heads);
        let head_dim = match (keys.head_dim, given.get("head_dim")) {
            (Key::Or(Some(_)), Some(Value::Null)) => return invalid("head_dim is null"),
            (key, _) => key.read(given, "head_dim")?.unwrap_or(hidden / query_heads.max(1)),
        };
        heads(query_heads, kv_heads, head_dim)?;
        let eps: f32 = keys.rms_norm_eps.read(given, keys.eps_key)?;
        if !(eps >= 0.0 && eps.is_finite()) {
            return invalid(format!("{} is {eps}", keys.eps_key));
        }
        activation(given, keys)?;
        let attention_bias = keys.attention_bias.read(given, "attention_bias")?;
        let rotation = match keys.rope_theta {
            // Whatever stands in the keys of rotations, they are not this architecture's.
            Key::Always(theta) => Rotation { theta: Some(theta), part: None, scaling: Value::Null },
            Key::Required | Key::Or(_) => Rotation::read(given)?,
        };
        let common = Self {
            hidden,
            layers,
            inner,
            vocabulary,
            eps,
            attention: TokenState::new(query_heads, kv_heads, head_dim),
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: keys.mlp_bias.read(given, "mlp_bias")?,
            tied: match given.get("tie_word_embeddings") {
                Some(_) => Some(Key::Required.read(given, "tie_word_embeddings")?),
                None => None,
            },
            rope_theta: keys.rope_theta.or(rotation.theta, "rope_theta, in rope_parameters or beside it,")?,
            rope_traditional: keys.rope_traditional.read(given, "rope_traditional")?,
            ropes: Vec::new(),
        };
        Ok((common, rotation))
    }

    /// Reads and checks the common keys of a model that rotates whole heads, all layers alike.
    pub(super) fn rotated(given: &Given<'_>, keys: &Keys) -> Result<Self, OpenError> {
        let (mut common, rotation) = Self::read(given, keys)?;
        if rotation.part.is_some_and(|part| part != 1.0) {
            return unsupported("partial_rotary_factor");
        }
        common.ropes = vec![common.rope(common.attention.head_dim, &rotation, given)?];
        Ok(common)
    }

    /// Returns the rotation of the first `dims` elements of a head.
    pub(super) fn rope(&self, dims: i32, rotation: &Rotation, given: &Given<'_>) -> Result<Rope, OpenError> {
        rope(dims, self.rope_theta, self.rope_traditional, &rotation.scaling, given)
    }
}

/// Refuses an activation that is not the architecture's.
fn activation(given: &Given<'_>, keys: &Keys) -> Result<(), OpenError> {
    let Some((key, value)) = keys.activation_keys.iter().find_map(|&key| Some((key, given.get(key)?))) else {
        return Ok(());
    };
    match value {
        Value::Null => invalid(format!("{key} is null")),
        value if value.as_str() == Some(keys.activation) => Ok(()),
        value => unsupported(format!("{key} {value}")),
    }
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
        return invalid(format!(
            "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        ));
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
pub(super) fn off(given: &Given<'_>, options: &[&'static str]) -> Result<(), OpenError> {
    let on = options.iter().find(|option| match given.get(option) {
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
        return invalid(format!("num_hidden_layers is {layers}, and layer_types names {}", kinds.len()));
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

/// Returns the window of each layer by `layer_types`; without that key by the rule `slides`.
pub(super) fn windows(
    given: &Given<'_>,
    layers: usize,
    slides: impl Fn(usize) -> bool,
    sliding_window: Option<i32>,
) -> Result<Vec<i32>, OpenError> {
    let by_rule = |layer| (if slides(layer) { SLIDING } else { FULL }).to_owned();
    let kinds = match listed_kinds(given)? {
        Some(kinds) => kinds,
        None => (0..layers).map(by_rule).collect(),
    };
    layer_kinds(&kinds, layers, &[FULL, SLIDING])?;
    kinds.iter().map(|kind| window(kind, sliding_window)).collect()
}

/// Returns `layer_types`.
pub(super) fn listed_kinds(given: &Given<'_>) -> Result<Option<Vec<String>>, OpenError> {
    #[derive(Deserialize)]
    struct Listed {
        layer_types: Option<Vec<String>>,
    }
    Ok(given.parse::<Listed>()?.layer_types)
}

/// Returns the windows of a Qwen, whose layers have one by the rule `slides`, which gets `max_window_layers`,
/// if `use_sliding_window` says so.
pub(super) fn qwen_windows(
    given: &Given<'_>,
    layers: usize,
    slides: impl Fn(usize, usize) -> bool,
) -> Result<Vec<i32>, OpenError> {
    let uses = Key::Or(false).read(given, "use_sliding_window")?;
    let first = if uses { Key::Required } else { Key::Or(0) }.read(given, "max_window_layers")?;
    if !uses {
        return windows(given, layers, |_| false, None);
    }
    let window = Key::Required.read(given, "sliding_window")?;
    windows(given, layers, |layer| slides(layer, first), Some(window))
}

/// Returns the rotation of the first `dims` elements of a head.
pub(super) fn rope(
    dims: i32,
    theta: f64,
    traditional: bool,
    scaling: &Value,
    given: &Given<'_>,
) -> Result<Rope, OpenError> {
    positive(&[("rope_theta", theta)])?;
    let context = given.get("max_position_embeddings").and_then(Value::as_u64);
    let context = context.and_then(|context| u32::try_from(context).ok());
    Rope::new(dims, theta, traditional, Some(scaling), context).or_else(unsupported)
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
