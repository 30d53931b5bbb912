//! Frequencies of rotation: the variants of rotary embedding that a config's `rope_scaling` or
//! `rope_parameters` can name, as transformers reads them (modeling_rope_utils.py). A parameter that
//! transformers and mlx-lm supply with different values must be there.

use serde_json::Value;

use super::to_f32;

/// Radians per position of each pair, and the factor of the rotated elements.
pub(super) struct Scaled {
    pub(super) frequencies: Vec<f32>,
    pub(super) magnitude: f32,
}

/// The parameters of a scaling.
struct Parameters<'a> {
    kind: &'a str,
    of: &'a Value,
}

impl Parameters<'_> {
    fn number(&self, key: &str) -> Option<f64> {
        self.of.get(key).and_then(Value::as_f64).filter(|number| number.is_finite())
    }

    /// Returns a required number above zero.
    fn positive(&self, key: &str) -> Result<f64, String> {
        let number = self.number(key).filter(|&number| number > 0.0);
        number.ok_or_else(|| format!("rope parameters of type {:?} without a positive {key}", self.kind))
    }

    /// Returns a number above zero that may be left out.
    fn optional(&self, key: &str) -> Result<Option<f64>, String> {
        match self.of.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.positive(key).map(Some),
        }
    }

    /// Returns one factor for each pair.
    fn factors(&self, key: &str, pairs: usize) -> Result<Vec<f64>, String> {
        let wrong =
            || format!("rope parameters of type {:?}: {key} must be {pairs} positive numbers", self.kind);
        let given = self.of.get(key).ok_or_else(wrong)?;
        let factors: Option<Vec<f64>> = match given {
            Value::Array(list) => list.iter().map(Value::as_f64).collect(),
            one => one.as_f64().map(|one| vec![one; pairs]),
        };
        let factors = factors.filter(|all| all.len() == pairs && all.iter().all(|&factor| factor > 0.0));
        factors.ok_or_else(wrong)
    }
}

/// Returns the frequencies of the first `dims` elements of a head; `context` is the model's longest sequence,
/// in tokens.
pub(super) fn scaled(
    dims: i32,
    theta: f64,
    scaling: Option<&Value>,
    context: Option<u32>,
) -> Result<Scaled, String> {
    let pairs = usize::try_from(dims / 2).unwrap_or(0);
    let plain: Vec<f64> =
        (0..dims / 2).map(|pair| theta.powf(-2.0 * f64::from(pair) / f64::from(dims))).collect();
    let Some(of) = scaling.filter(|scaling| !scaling.is_null()) else { return Ok(finish(plain, 1.0)) };
    let kind = kind_of(of)?;
    let parameters = Parameters { kind, of };
    match kind {
        // A plain rotation up to the model's own context, beyond which nothing is served.
        "default" | "dynamic" => Ok(finish(plain, 1.0)),
        "linear" => {
            let factor = parameters.positive("factor")?;
            Ok(finish(plain.into_iter().map(|frequency| frequency / factor).collect(), 1.0))
        }
        "llama3" => llama3(&parameters, plain),
        "yarn" => yarn(&parameters, plain, theta),
        "longrope" => long(&parameters, plain, pairs, context),
        "proportional" => proportional(&parameters, plain, theta, dims),
        other => Err(format!("rope parameters of type {other:?}")),
    }
}

/// Returns the kind of a scaling by its newer name. Old files name it by `type`, newer ones by `rope_type`,
/// some by both.
fn kind_of(of: &Value) -> Result<&str, String> {
    let named = |key: &str| match of.get(key) {
        None => Ok(None),
        Some(Value::String(kind)) => Ok(Some(match kind.as_str() {
            // Positions in three directions, which are the same for text.
            "mrope" => "default",
            "su" => "longrope",
            "deepseek_yarn" => "yarn",
            other => other,
        })),
        Some(other) => Err(format!("rope parameters: {key} is {other}")),
    };
    match (named("rope_type")?, named("type")?) {
        (Some(kind), Some(other)) if kind != other => {
            Err(format!("rope parameters of rope_type {kind:?} and of type {other:?}"))
        }
        (Some(kind), _) | (None, Some(kind)) => Ok(kind),
        (None, None) => Ok("default"),
    }
}

fn finish(frequencies: Vec<f64>, magnitude: f64) -> Scaled {
    Scaled { frequencies: frequencies.into_iter().map(to_f32).collect(), magnitude: to_f32(magnitude) }
}

/// Long waves are slowed by `factor`, short ones unchanged, those between blended (Llama 3.1's release; the
/// formula is in mlx-lm's rope_utils.py).
fn llama3(parameters: &Parameters<'_>, plain: Vec<f64>) -> Result<Scaled, String> {
    let factor = parameters.positive("factor")?;
    let (low, high) = (parameters.positive("low_freq_factor")?, parameters.positive("high_freq_factor")?);
    let original = parameters.positive("original_max_position_embeddings")?;
    if high <= low {
        return Err("rope parameters: high_freq_factor must exceed low_freq_factor".into());
    }
    let slowed = |frequency: f64| {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength > original / low {
            frequency / factor
        } else if wavelength > original / high {
            let smooth = (original / wavelength - low) / (high - low);
            frequency * ((1.0 - smooth) / factor + smooth)
        } else {
            frequency
        }
    };
    Ok(finish(plain.into_iter().map(slowed).collect(), 1.0))
}

/// Returns YaRN's magnitude for a context that is `factor` times as long.
pub(crate) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// YaRN (Peng et al., <https://arxiv.org/abs/2309.00071>): pairs that rotate often in the original context
/// are unchanged, those that do not are slowed, those between are blended.
fn yarn(parameters: &Parameters<'_>, plain: Vec<f64>, theta: f64) -> Result<Scaled, String> {
    let factor = parameters.positive("factor")?;
    let original = parameters.positive("original_max_position_embeddings")?;
    let dims = f64::from(u32::try_from(plain.len() * 2).unwrap_or(u32::MAX));
    let pair_at = |rotations: f64| {
        dims * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let low = pair_at(parameters.optional("beta_fast")?.unwrap_or(32.0));
    let high = pair_at(parameters.optional("beta_slow")?.unwrap_or(1.0));
    // OpenAI's own models are trained without whole numbers here.
    let whole = parameters.of.get("truncate") != Some(&Value::Bool(false));
    let (low, high) = if whole { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
    if low == high {
        high += 0.001;
    }
    let blended = plain.into_iter().zip(0u32..).map(|(frequency, pair)| {
        let slowed = ((f64::from(pair) - low) / (high - low)).clamp(0.0, 1.0);
        frequency * (1.0 - slowed) + frequency / factor * slowed
    });
    Ok(finish(blended.collect(), yarn_factor(parameters, factor)?))
}

/// Returns the factor of rotated elements: given, or by the factor of the context. With only one of `mscale`
/// and `mscale_all_dim`, transformers and mlx-lm compute two different ones.
fn yarn_factor(parameters: &Parameters<'_>, factor: f64) -> Result<f64, String> {
    if let Some(given) = parameters.optional("attention_factor")? {
        return Ok(given);
    }
    let weight = |key: &str| parameters.number(key).filter(|&weight| weight != 0.0);
    match (weight("mscale"), weight("mscale_all_dim")) {
        (Some(of), Some(all)) => Ok(yarn_magnitude(factor, of) / yarn_magnitude(factor, all)),
        (None | Some(1.0), None) => Ok(yarn_magnitude(factor, 1.0)),
        (Some(_), None) => Err("rope parameters: mscale without mscale_all_dim".into()),
        (None, Some(_)) => Err("rope parameters: mscale_all_dim without mscale".into()),
    }
}

/// LongRoPE (Ding et al., <https://arxiv.org/abs/2402.13753>). The long factors at every length, as in
/// mlx-lm: keys that are cached could not change when a sequence becomes long. The short ones where no
/// sequence can.
fn long(
    parameters: &Parameters<'_>,
    plain: Vec<f64>,
    pairs: usize,
    context: Option<u32>,
) -> Result<Scaled, String> {
    let (long, short) =
        (parameters.factors("long_factor", pairs)?, parameters.factors("short_factor", pairs)?);
    let original = parameters.positive("original_max_position_embeddings")?;
    let is_short = context.is_some_and(|context| f64::from(context) <= original);
    let factors = if is_short { short } else { long };
    let factor = match (parameters.optional("factor")?, context) {
        (Some(factor), _) => factor,
        (None, Some(context)) => f64::from(context) / original,
        (None, None) => return Err("rope parameters: longrope without max_position_embeddings".into()),
    };
    let magnitude = match parameters.optional("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None if original <= 1.0 => {
            return Err("rope parameters: original_max_position_embeddings is 1".into());
        }
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    let slowed = plain.into_iter().zip(factors).map(|(frequency, factor)| frequency / factor);
    Ok(finish(slowed.collect(), magnitude))
}

/// Gemma 4: only a part of the head is rotated, with the frequencies that it has in the whole.
fn proportional(
    parameters: &Parameters<'_>,
    plain: Vec<f64>,
    theta: f64,
    dims: i32,
) -> Result<Scaled, String> {
    let part = parameters.number("partial_rotary_factor").unwrap_or(1.0);
    let factor = parameters.number("factor").unwrap_or(1.0);
    if !(0.0..=1.0).contains(&part) || factor <= 0.0 || theta <= 0.0 {
        return Err("rope parameters of type \"proportional\": a factor is out of range".into());
    }
    let rotated = (f64::from(dims) * part).floor();
    let paced = plain
        .into_iter()
        .zip(0u32..)
        .map(|(frequency, pair)| if 2.0 * f64::from(pair) < rotated { frequency / factor } else { 0.0 });
    Ok(finish(paced.collect(), 1.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn longrope_has_its_short_factors_where_no_sequence_can_be_long() {
        let scaling = json!({
            "rope_type": "longrope", "long_factor": [4.0, 8.0], "short_factor": [1.0, 2.0],
            "original_max_position_embeddings": 64,
        });
        let first = |context: u32| {
            let Ok(scaled) = scaled(4, 1e4, Some(&scaling), Some(context)) else { panic!("refused") };
            (scaled.frequencies[0], scaled.magnitude > 1.0)
        };
        assert_eq!([first(32), first(64), first(128)], [(1.0, false), (1.0, false), (0.25, true)]);
    }
}
