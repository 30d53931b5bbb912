//! Options that choose a quantization, shared by `mlxd convert` and `mlxd load`.

use clap::{Args, ValueEnum};
use mlxd::quantize::{QuantMode, Quantization, Recipe};
use mlxd_client::v1;

use super::failure::{Failure, Result};

/// How matrices are quantized.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct QuantizeArgs {
    /// Quantize to this many bits: 2, 3, 4, 5, 6 or 8
    #[arg(short, long, value_name = "BITS")]
    quantize: Option<u32>,
    /// Weights that share a scale: 32, 64 or 128 [default: 64, or the only one of --mode]
    #[arg(long, value_name = "WEIGHTS")]
    group_size: Option<u32>,
    /// Quantize to this format [default: affine]; all but affine have only one size
    #[arg(long)]
    mode: Option<Mode>,
    /// Quantize with more bits for the matrices that matter more
    #[arg(long, conflicts_with = "quantize")]
    recipe: Option<RecipeName>,
}

/// Format of quantized elements.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

/// Mixed recipe.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum RecipeName {
    #[value(name = "mixed_2_6")]
    Mixed2And6,
    #[value(name = "mixed_3_4")]
    Mixed3And4,
    #[value(name = "mixed_3_6")]
    Mixed3And6,
    #[value(name = "mixed_4_6")]
    Mixed4And6,
}

impl QuantizeArgs {
    /// Returns the quantization that any of the options asks for.
    pub(super) fn quantization(self) -> Result<Option<Quantization>> {
        let mode = self.mode.map_or(QuantMode::Affine, |mode| match mode {
            Mode::Affine => QuantMode::Affine,
            Mode::Mxfp4 => QuantMode::Mxfp4,
            Mode::Mxfp8 => QuantMode::Mxfp8,
            Mode::Nvfp4 => QuantMode::Nvfp4,
        });
        let recipe = self.recipe.map(|recipe| match recipe {
            RecipeName::Mixed2And6 => Recipe::Mixed2And6,
            RecipeName::Mixed3And4 => Recipe::Mixed3And4,
            RecipeName::Mixed3And6 => Recipe::Mixed3And6,
            RecipeName::Mixed4And6 => Recipe::Mixed4And6,
        });
        if self.quantize.is_none() && self.mode.is_none() && recipe.is_none() {
            return match self.group_size {
                Some(_) => Err(Failure::Usage("--group-size needs --quantize, --mode or --recipe".into())),
                None => Ok(None),
            };
        }
        let quantization = Quantization::new(mode, self.quantize, self.group_size, recipe);
        quantization.map(Some).map_err(|error| Failure::Usage(error.to_string()))
    }

    /// Returns the same for the wire.
    pub(super) fn options(self) -> Result<Option<v1::QuantizeOptions>> {
        Ok(self.quantization()?.map(|Quantization { format, recipe }| {
            let mode = match format.mode {
                QuantMode::Affine => v1::QuantMode::Affine,
                QuantMode::Mxfp4 => v1::QuantMode::Mxfp4,
                QuantMode::Mxfp8 => v1::QuantMode::Mxfp8,
                QuantMode::Nvfp4 => v1::QuantMode::Nvfp4,
            };
            let recipe = recipe.map_or(v1::QuantRecipe::Unspecified, |recipe| match recipe {
                Recipe::Mixed2And6 => v1::QuantRecipe::Mixed26,
                Recipe::Mixed3And4 => v1::QuantRecipe::Mixed34,
                Recipe::Mixed3And6 => v1::QuantRecipe::Mixed36,
                Recipe::Mixed4And6 => v1::QuantRecipe::Mixed46,
            });
            // A recipe says the bits itself.
            let bits = if recipe == v1::QuantRecipe::Unspecified { format.bits } else { 0 };
            v1::QuantizeOptions {
                bits,
                group_size: format.group_size,
                mode: mode.into(),
                recipe: recipe.into(),
            }
        }))
    }
}
