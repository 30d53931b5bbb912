//! Rotary position embedding (Su et al., <https://arxiv.org/abs/2104.09864>) for packed tokens, each with
//! a position of its own, in the variants default, linear and llama3.
//!
//! On the CPU the rotation is by tables made once per step: our attention turns queries and keys itself; in MLX's
//! operations it is `x * cos + flip(x) * sin`, three a layer where MLX's own rope takes a chain of some twenty.
//! On GPUs it is MLX's fused kernel.

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Axes, fast};
use serde_json::Value;

use super::Ops;
use crate::device::dim;

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    head_dim: usize,
    pub(crate) traditional: bool,
    ops: Ops,
    /// Radians per position of each pair.
    frequencies: Vec<f32>,
    /// Their reciprocals, as MLX's kernel wants them.
    pub(crate) wavelengths: Array,
}

/// The rotation of one step's tokens.
#[derive(Clone, Debug)]
pub(crate) enum Rotation {
    /// Tables that broadcast over heads: `[tokens, 1, 2, head_dim / 2]`, or the last two swapped.
    Tables { cos: Array, sin: Array },
    /// Positions, for MLX's kernel.
    Fused(Array),
    /// `[tokens, head_dim / 2]`, for our own.
    Angles { cos: Array, sin: Array },
}

/// The scaling of a config.json: `rope_scaling`, by mlx-lm's reading of it (rope_utils.py): `type` counts
/// before `rope_type`.
fn scale_frequencies(frequencies: &mut [f32], scaling: &Value) -> std::result::Result<(), String> {
    let kind = scaling.get("type").or_else(|| scaling.get("rope_type"));
    let kind = kind.and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| scaling.get(key).and_then(Value::as_f64);
    let factor = || match number("factor") {
        Some(factor) if factor > 0.0 => Ok(factor),
        _ => Err(format!("rope_scaling of type {kind:?} without a positive factor")),
    };
    match kind {
        "default" => {}
        "linear" => {
            let factor = factor()?;
            for frequency in frequencies {
                *frequency = to_f32(f64::from(*frequency) / factor);
            }
        }
        "llama3" => {
            let factor = factor()?;
            let low = number("low_freq_factor").unwrap_or(1.0);
            let high = number("high_freq_factor").unwrap_or(4.0);
            let original = number("original_max_position_embeddings").unwrap_or(8192.0);
            if high <= low {
                return Err("rope_scaling: high_freq_factor must exceed low_freq_factor".into());
            }
            for frequency in frequencies {
                *frequency = to_f32(llama3(f64::from(*frequency), factor, low, high, original));
            }
        }
        other => return Err(format!("rope_scaling of type {other:?}")),
    }
    Ok(())
}

/// Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1's release; the
/// formula is in mlx-lm's rope_utils.py).
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength > original / low {
        frequency / factor
    } else if wavelength > original / high {
        let smooth = (original / wavelength - low) / (high - low);
        frequency * ((1.0 - smooth) / factor + smooth)
    } else {
        frequency
    }
}

#[allow(clippy::cast_possible_truncation, reason = "tables are f32, as MLX has them")]
fn to_f32(x: f64) -> f32 {
    x as f32
}

impl Rope {
    /// Frequencies for heads of `head_dim` numbers. Errors name what is not implemented.
    pub(crate) fn new(
        head_dim: usize,
        theta: f64,
        traditional: bool,
        scaling: Option<&Value>,
        ops: Ops,
    ) -> std::result::Result<Self, String> {
        if !head_dim.is_multiple_of(2) {
            return Err(format!("an odd head_dim of {head_dim}"));
        }
        let mut frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|pair| to_f32(theta.powf(-2.0 * f64::from(dim(pair)) / f64::from(dim(head_dim)))))
            .collect();
        if let Some(scaling) = scaling.filter(|scaling| !scaling.is_null()) {
            scale_frequencies(&mut frequencies, scaling)?;
        }
        let wavelengths: Vec<f32> = frequencies.iter().map(|frequency| frequency.recip()).collect();
        let wavelengths = Array::from_slice(&wavelengths, &[dim(wavelengths.len())]);
        Ok(Self { head_dim, traditional, ops, frequencies, wavelengths })
    }

    /// The rotation for tokens at these positions.
    pub(crate) fn rotation(&self, positions: &[i32]) -> Rotation {
        let tokens = dim(positions.len());
        match self.ops {
            Ops::Fused => return Rotation::Fused(Array::from_slice(positions, &[tokens])),
            Ops::Kernels(_) => return self.angles(positions),
            Ops::Composed => {}
        }
        let half = self.frequencies.len();
        let mut cos = vec![0.0f32; positions.len() * 2 * half];
        let mut sin = cos.clone();
        for (row, &position) in positions.iter().enumerate() {
            for (pair, &frequency) in self.frequencies.iter().enumerate() {
                let (s, c) = (f64::from(position) * f64::from(frequency)).sin_cos();
                let (s, c) = (to_f32(s), to_f32(c));
                let (first, second) =
                    if self.traditional { (2 * pair, 2 * pair + 1) } else { (pair, half + pair) };
                let base = row * 2 * half;
                cos[base + first] = c;
                cos[base + second] = c;
                sin[base + first] = -s;
                sin[base + second] = s;
            }
        }
        let shape = if self.traditional { [tokens, 1, dim(half), 2] } else { [tokens, 1, 2, dim(half)] };
        Rotation::Tables { cos: Array::from_slice(&cos, &shape), sin: Array::from_slice(&sin, &shape) }
    }

    fn angles(&self, positions: &[i32]) -> Rotation {
        let angle = |position: i32, frequency: f32| f64::from(position) * f64::from(frequency);
        let table = |of: fn(f64) -> f64| {
            let rows = positions.iter().flat_map(|&position| {
                self.frequencies.iter().map(move |&frequency| to_f32(of(angle(position, frequency))))
            });
            let table: Vec<f32> = rows.collect();
            Array::from_slice(&table, &[dim(positions.len()), dim(self.frequencies.len())])
        };
        Rotation::Angles { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Rotates `x` `[tokens, heads, head_dim]`.
    pub(crate) fn apply(&self, x: &Array, rotation: &Rotation) -> Result<Array> {
        let (tokens, heads, head_dim) = (x.dim(0), x.dim(1), dim(self.head_dim));
        match rotation {
            Rotation::Tables { cos, sin } => {
                let (pairs, axis) = if self.traditional {
                    (x.reshape(&[tokens, heads, head_dim / 2, 2])?, -1)
                } else {
                    (x.reshape(&[tokens, heads, 2, head_dim / 2])?, -2)
                };
                let turned = pairs.flip(Axes::Axis(axis))?.multiply(sin)?;
                pairs.multiply(cos)?.add(turned)?.reshape(&[tokens, heads, head_dim])
            }
            Rotation::Angles { .. } => Err(Exception::custom("attention turns by angles itself")),
            Rotation::Fused(positions) => {
                // The kernel takes one offset for each row of a batch, so each token is a row of its own.
                let rows = x.reshape(&[tokens, heads, 1, head_dim])?;
                fast::rope_dynamic(
                    &rows,
                    head_dim,
                    self.traditional,
                    None,
                    1.0,
                    positions,
                    &self.wavelengths,
                )?
                .reshape(&[tokens, heads, head_dim])
            }
        }
    }
}
