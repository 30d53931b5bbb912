//! Quantization as a choice: the formats that MLX has, the mixed recipes, and which matrix of a model gets
//! which format. The rules are those of mlx-lm 0.32 (convert.py, `mixed_quant_predicate_builder`; utils.py,
//! `quantize_model`; `quant_predicate` of each architecture), so that a model quantized here is the model
//! quantized there. Pure; a conversion and a load both ask it.

/// The format of packed elements, as MLX names it (mlx/ops.h, `quantize`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QuantMode {
    /// `scale * q + bias`, both floats.
    #[default]
    Affine,
    /// E2M1 elements with E8M0 scales.
    Mxfp4,
    /// E4M3 elements with E8M0 scales.
    Mxfp8,
    /// E2M1 elements with E4M3 scales.
    Nvfp4,
}

/// How a matrix is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantFormat {
    /// Format of an element.
    pub mode: QuantMode,
    /// Bits of an element.
    pub bits: u32,
    /// Number of columns that share a scale.
    pub group_size: u32,
}

/// Mixed recipes: matrices that matter more get more bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// 2 bits, some matrices 6.
    Mixed2And6,
    /// 3 bits, some matrices 4.
    Mixed3And4,
    /// 3 bits, some matrices 6.
    Mixed3And6,
    /// 4 bits, some matrices 6.
    Mixed4And6,
}

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Format of every matrix that no rule gives another.
    pub format: QuantFormat,
    /// Recipe that decides the bits of each matrix.
    pub recipe: Option<Recipe>,
}

/// Why a quantization is refused; the text names the values that are allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct QuantizationError(String);

impl QuantMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Mxfp8, Self::Nvfp4];

    /// Returns the word that MLX and configs use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Mxfp8 => "mxfp8",
            Self::Nvfp4 => "nvfp4",
        }
    }

    /// Returns the format of this mode where nothing else is said: the only one, but for affine.
    #[must_use]
    pub const fn usual(self) -> QuantFormat {
        let (bits, group_size) = match self {
            Self::Affine => (4, 64),
            Self::Mxfp4 => (4, 32),
            Self::Mxfp8 => (8, 32),
            Self::Nvfp4 => (4, 16),
        };
        QuantFormat { mode: self, bits, group_size }
    }
}

impl Recipe {
    /// Returns mlx-lm's name of it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mixed2And6 => "mixed_2_6",
            Self::Mixed3And4 => "mixed_3_4",
            Self::Mixed3And6 => "mixed_3_6",
            Self::Mixed4And6 => "mixed_4_6",
        }
    }

    /// Returns the bits of most matrices, and of those that matter more.
    const fn bits(self) -> (u32, u32) {
        match self {
            Self::Mixed2And6 => (2, 6),
            Self::Mixed3And4 => (3, 4),
            Self::Mixed3And6 => (3, 6),
            Self::Mixed4And6 => (4, 6),
        }
    }
}

impl Quantization {
    /// Completes and checks what a user asks for; None is the mode's usual value.
    ///
    /// # Errors
    /// MLX has no such format, or a recipe is asked for together with bits or another mode.
    pub fn new(
        mode: QuantMode,
        bits: Option<u32>,
        group_size: Option<u32>,
        recipe: Option<Recipe>,
    ) -> Result<Self, QuantizationError> {
        let refuse = |why: String| Err(QuantizationError(why));
        let usual = mode.usual();
        let format = QuantFormat {
            mode,
            bits: bits.unwrap_or(usual.bits),
            group_size: group_size.unwrap_or(usual.group_size),
        };
        let QuantFormat { bits: given_bits, group_size, .. } = format;
        if mode != QuantMode::Affine && format != usual {
            let QuantFormat { bits, group_size, .. } = usual;
            return refuse(format!("{} has {bits} bits in groups of {group_size} only", mode.as_str()));
        }
        if mode == QuantMode::Affine && !matches!(given_bits, 2 | 3 | 4 | 5 | 6 | 8) {
            return refuse(format!(
                "there is no affine quantization of {given_bits} bits: 2, 3, 4, 5, 6 or 8"
            ));
        }
        if mode == QuantMode::Affine && !matches!(group_size, 32 | 64 | 128) {
            return refuse(format!("a group cannot have {group_size} columns: 32, 64 or 128"));
        }
        if let Some(recipe) = recipe {
            if mode != QuantMode::Affine {
                return refuse(format!("{} is affine, not {}", recipe.as_str(), mode.as_str()));
            }
            if bits.is_some() {
                return refuse(format!("{} says the bits itself", recipe.as_str()));
            }
        }
        Ok(Self { format, recipe })
    }
}

/// Decides the format of each matrix of one model.
#[derive(Clone, Debug)]
pub struct QuantRule {
    quantization: Quantization,
    model_type: String,
    layers: usize,
}

/// Modules of an architecture that mlx-lm gives 8 bits in groups of 64: routers, whose small differences
/// decide, and for Granite those whose maxima are too small for short floats.
fn is_delicate(model_type: &str, module: &str) -> bool {
    let ends = |endings: &[&str]| endings.iter().any(|ending| module.ends_with(ending));
    match model_type {
        "qwen3_moe" => ends(&["mlp.gate"]),
        "gpt_oss" => ends(&["router"]),
        "gemma4" | "gemma4_text" | "gemma4_unified" => ends(&["router.proj"]),
        "granite" => ends(&["self_attn.o_proj", "mlp.down_proj"]) || module == "lm_head",
        _ if model_type.starts_with("qwen3_next") || model_type.starts_with("qwen3_5") => {
            ends(&["mlp.gate", "shared_expert_gate"])
        }
        _ => false,
    }
}

/// Routers that mlx-lm keeps outside of MLX's layers, and so never quantizes.
fn is_bare_router(model_type: &str, module: &str) -> bool {
    match model_type {
        "deepseek_v3" | "kimi_k2" | "joyai_llm_flash" | "glm4_moe" | "glm4_moe_lite" => {
            module.ends_with("mlp.gate")
        }
        "nemotron_h" => module.ends_with("mixer.gate"),
        _ => false,
    }
}

const DELICATE: QuantFormat = QuantFormat { mode: QuantMode::Affine, bits: 8, group_size: 64 };

impl std::fmt::Display for Quantization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let QuantFormat { mode, bits, group_size } = self.format;
        match self.recipe {
            Some(recipe) => write!(f, "{}, group {group_size}", recipe.as_str()),
            None => write!(f, "{bits}-bit {}, group {group_size}", mode.as_str()),
        }
    }
}

impl QuantRule {
    /// Returns the rule for a model of this type and number of layers.
    #[must_use]
    pub fn new(quantization: Quantization, model_type: &str, layers: usize) -> Self {
        Self { quantization, model_type: model_type.to_owned(), layers }
    }

    /// Returns what was asked for.
    #[must_use]
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// Checks that a recipe fits a model with these modules.
    ///
    /// # Errors
    /// No module is a `down_proj`, by which the recipes choose.
    pub fn check<'a>(&self, mut modules: impl Iterator<Item = &'a str>) -> Result<(), QuantizationError> {
        match self.quantization.recipe {
            Some(recipe) if !modules.any(|module| module.contains("down_proj")) => Err(QuantizationError(
                format!("{} does not fit {}, which has no down_proj", recipe.as_str(), self.model_type),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the format of a module's matrix with rows of `columns`; None: it stays dense.
    #[must_use]
    pub fn format(&self, module: &str, columns: usize) -> Option<QuantFormat> {
        let Quantization { format, recipe } = self.quantization;
        let fits = |format: QuantFormat| columns.is_multiple_of(format.group_size as usize);
        if !fits(format) || is_bare_router(&self.model_type, module) {
            return None;
        }
        let own = match recipe {
            Some(recipe) => QuantFormat { bits: self.bits(recipe, module), ..format },
            None if is_delicate(&self.model_type, module) => DELICATE,
            None => format,
        };
        Some(own).filter(|own| fits(*own))
    }

    /// Returns a recipe's bits for a module: more for the values and the outputs of MLPs in the first and
    /// last eighth of the layers and in every third between, and for the head.
    fn bits(&self, recipe: Recipe, module: &str) -> u32 {
        let (low, high) = recipe.bits();
        let layer = module.split('.').find_map(|part| part.parse::<usize>().ok()).unwrap_or(0);
        let eighth = self.layers / 8;
        let is_outer = layer < eighth || layer >= 7 * self.layers / 8;
        // Layers before the first eighth are outer ones, so the difference does not go below 0.
        let matters = is_outer || (layer - eighth) % 3 == 2;
        let is_value =
            ["v_proj", "v_a_proj", "v_b_proj", "down_proj"].iter().any(|part| module.contains(part));
        if is_value && matters || module.contains("lm_head") { high } else { low }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(mode: QuantMode, bits: Option<u32>, group_size: Option<u32>) -> Result<QuantFormat, String> {
        let quantization = Quantization::new(mode, bits, group_size, None);
        quantization.map(|quantization| quantization.format).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_out_is_the_usual_of_the_mode() {
        let format = |mode, bits, group_size| QuantFormat { mode, bits, group_size };
        assert_eq!(asked(QuantMode::Affine, None, None), Ok(format(QuantMode::Affine, 4, 64)));
        assert_eq!(asked(QuantMode::Affine, Some(3), Some(128)), Ok(format(QuantMode::Affine, 3, 128)));
        assert_eq!(asked(QuantMode::Mxfp8, None, Some(32)), Ok(format(QuantMode::Mxfp8, 8, 32)));
        assert_eq!(asked(QuantMode::Nvfp4, None, None), Ok(format(QuantMode::Nvfp4, 4, 16)));
    }

    #[test]
    fn formats_that_mlx_does_not_have_are_refused_with_those_that_it_has() {
        assert!(asked(QuantMode::Affine, Some(7), None).unwrap_err().contains("2, 3, 4, 5, 6 or 8"));
        assert!(asked(QuantMode::Affine, None, Some(16)).unwrap_err().contains("32, 64 or 128"));
        assert!(asked(QuantMode::Mxfp4, Some(8), None).unwrap_err().contains("4 bits in groups of 32"));
        let recipe = Some(Recipe::Mixed2And6);
        assert!(Quantization::new(QuantMode::Mxfp4, None, None, recipe).is_err());
        assert!(Quantization::new(QuantMode::Affine, Some(4), None, recipe).is_err());
        let rule =
            QuantRule::new(Quantization::new(QuantMode::Affine, None, None, recipe).unwrap(), "lfm2", 2);
        assert!(rule.check(["model.layers.0.feed_forward.w1"].into_iter()).is_err());
        assert!(rule.check(["model.layers.0.mlp.down_proj"].into_iter()).is_ok());
    }

    #[test]
    fn a_recipe_gives_more_bits_to_values_outputs_and_head() {
        let quantization = Quantization::new(QuantMode::Affine, None, None, Some(Recipe::Mixed3And6));
        let rule = QuantRule::new(quantization.unwrap(), "llama", 16);
        let bits = |module: &str| rule.format(module, 64).unwrap().bits;
        let down = |layer: usize| bits(&format!("model.layers.{layer}.mlp.down_proj"));
        let high: Vec<usize> = (0..16).filter(|&layer| down(layer) == 6).collect();
        assert_eq!(high, [0, 1, 4, 7, 10, 13, 14, 15]);
        assert_eq!(bits("model.layers.4.self_attn.v_proj"), 6);
        assert_eq!(bits("model.layers.4.self_attn.q_proj"), 3);
        assert_eq!((bits("lm_head"), bits("model.embed_tokens")), (6, 3));
    }

    #[test]
    fn routers_keep_eight_bits_or_all_of_them() {
        let format = |model_type: &str, module: &str, columns| {
            let quantization = Quantization::new(QuantMode::Affine, Some(2), Some(32), None).unwrap();
            QuantRule::new(quantization, model_type, 4).format(module, columns)
        };
        let gate = "model.layers.0.mlp.gate";
        assert_eq!(format("qwen3_moe", gate, 64), Some(DELICATE));
        assert_eq!(format("qwen3_moe", gate, 96), None);
        assert_eq!(format("deepseek_v3", gate, 64), None);
        assert_eq!(format("qwen2_moe", gate, 64).unwrap().bits, 2);
        assert_eq!(format("llama", gate, 40), None);
    }
}
