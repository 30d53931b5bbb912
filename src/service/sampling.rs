//! How tokens are chosen and when a generation ends: the ranges of the contract first (`check`), then, once
//! the model is known, its defaults and its vocabulary (`resolve`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fields::{at_most, up_to, within};
use crate::engine::{DrySampling, Penalty, Sampling, Stopping, XtcSampling};
use crate::error::Error;
use crate::hub::{ModelAssets, ModelFacts};
use crate::limits::Limits;

/// Tokens that a penalty covers if the request does not say; the last ones.
const PENALTY_CONTEXT_DEFAULT: u32 = 20;

/// Probability threshold of XTC if the request does not say.
const XTC_THRESHOLD_DEFAULT: f32 = 0.1;

/// Growth of DRY's penalty, and the length from which it applies, if the request does not say: those of its
/// proposal (<https://github.com/oobabooga/text-generation-webui/pull/5677>).
const DRY_BASE_DEFAULT: f32 = 1.75;
const DRY_ALLOWED_LENGTH_DEFAULT: u32 = 2;

/// Texts that end a repetition, from the same source.
const DRY_BREAKERS_DEFAULT: [&str; 4] = ["\n", ":", "\"", "*"];

/// Least repetition penalty but 0, the counterpart of the greatest: a quotient by less may be infinite.
const REPETITION_PENALTY_MIN: f32 = 0.01;

/// Sampling values of a request. Unset means the model's default, then the documented one; 0 means 0.
#[derive(Clone, Debug, Default)]
pub struct SamplingOptions {
    /// Softmax temperature, 0 to 100; 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus mass, 0 to 1; 0 and 1 are off.
    pub top_p: Option<f32>,
    /// Number of most likely tokens to choose from; 0 is off.
    pub top_k: Option<u32>,
    /// Minimum probability relative to the most likely token, 0 to 1; 0 is off.
    pub min_p: Option<f32>,
    /// Seed of the random numbers; unset draws one.
    pub seed: Option<u64>,
    /// Factor on repeated tokens, 0.01 to 100; 0 and 1 are off.
    pub repetition_penalty: Option<f32>,
    /// Last tokens it covers; 0 is all.
    pub repetition_context_size: Option<u32>,
    /// Subtracted once from tokens that occurred, -100 to 100.
    pub presence_penalty: Option<f32>,
    /// Last tokens it covers; 0 is all.
    pub presence_context_size: Option<u32>,
    /// Subtracted for each occurrence, -100 to 100.
    pub frequency_penalty: Option<f32>,
    /// Last tokens it covers; 0 is all.
    pub frequency_context_size: Option<u32>,
    /// Probability of applying XTC to a token, 0 to 1; 0 is off.
    pub xtc_probability: Option<f32>,
    /// Probability from which XTC removes candidates, 0 to 0.5.
    pub xtc_threshold: Option<f32>,
    /// Added to logits, by token id, -1000 to 1000.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Mass of locally typical sampling, 0 to 1; 0 and 1 are off.
    pub typical_p: Option<f32>,
    /// DRY's penalty.
    pub dry: DryOptions,
}

/// DRY's values of a request; unset means the documented default.
#[derive(Clone, Debug, Default)]
pub struct DryOptions {
    /// Strength, 0 to 100; 0 is off.
    pub multiplier: Option<f32>,
    /// Growth with each token repeated, 1 to 100.
    pub base: Option<f32>,
    /// Length from which a repetition is penalized, at least 1.
    pub allowed_length: Option<u32>,
    /// Last tokens that are examined, up to the limit; 0 is the limit.
    pub context_size: Option<u32>,
    /// Texts that end a repetition.
    pub sequence_breakers: Option<Vec<String>>,
}

/// Stopping values of a request.
#[derive(Clone, Debug, Default)]
pub struct StoppingOptions {
    /// Tokens to generate at most, at least 1.
    pub max_tokens: Option<u32>,
    /// Texts that end the output, without being part of it.
    pub stop_strings: Arc<[String]>,
    /// Token ids that end the output, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Generates past the model's own end tokens.
    pub ignore_eos: bool,
}

/// Sampling values in force after defaults were applied, as the caller is told.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "each is the field of SamplingOptions and StoppingOptions of the same name")]
pub struct EffectiveSampling {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub seed: u64,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub typical_p: f32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    pub max_tokens: u32,
}

impl Default for EffectiveSampling {
    /// The contract's defaults, without a limit of tokens.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: XTC_THRESHOLD_DEFAULT,
            typical_p: 1.0,
            dry_multiplier: 0.0,
            dry_base: DRY_BASE_DEFAULT,
            dry_allowed_length: DRY_ALLOWED_LENGTH_DEFAULT,
            max_tokens: 0,
        }
    }
}

/// Both as the engine takes them.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub(super) sampling: Sampling,
    pub(super) stopping: Stopping,
}

impl SamplingOptions {
    /// Refuses values outside the contract's ranges.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), Error> {
        let range = |name: &str, value: Option<f32>, low, high| {
            value.map_or(Ok(()), |value| within(&format!("sampling.{name}"), value, low, high).map(drop))
        };
        range("temperature", self.temperature, 0.0, 100.0)?;
        range("top_p", self.top_p, 0.0, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("typical_p", self.typical_p, 0.0, 1.0)?;
        let repetition = self.repetition_penalty.filter(|penalty| *penalty != 0.0);
        if repetition.is_some_and(|penalty| !(REPETITION_PENALTY_MIN..=100.0).contains(&penalty)) {
            let why = format!("must be 0, or {REPETITION_PENALTY_MIN} to 100");
            return Err(Error::field("sampling.repetition_penalty", why));
        }
        range("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        range("xtc_probability", self.xtc_probability, 0.0, 1.0)?;
        range("xtc_threshold", self.xtc_threshold, 0.0, 0.5)?;
        range("dry_multiplier", self.dry.multiplier, 0.0, 100.0)?;
        range("dry_base", self.dry.base, 1.0, 100.0)?;
        self.dry.check(limits)?;
        at_most("sampling.logit_bias", self.logit_bias.len(), "logit_bias_max", limits.logit_bias_max)?;
        for (id, bias) in &self.logit_bias {
            within(&format!("sampling.logit_bias[{id}]"), *bias, -1000.0, 1000.0)?;
        }
        Ok(())
    }

    /// Applies the model's defaults. `spared` finds the tokens that XTC never removes.
    fn resolve(
        &self,
        facts: &ModelFacts,
        (vocabulary, limits): (u32, &Limits),
        spared: impl FnOnce() -> Result<Arc<[u32]>, Error>,
    ) -> Result<Sampling, Error> {
        let defaults = &facts.default_sampling;
        if let Some(id) = self.logit_bias.keys().find(|id| **id >= vocabulary) {
            let path = format!("sampling.logit_bias[{id}]");
            return Err(Error::field(path, format!("the vocabulary has {vocabulary} tokens")));
        }
        let off_at_zero = |value: f32| if value == 0.0 { 1.0 } else { value };
        let penalty = |value: Option<f32>, unset, context_size: Option<u32>| Penalty {
            value: value.unwrap_or(unset),
            context_size: context_size.unwrap_or(PENALTY_CONTEXT_DEFAULT),
        };
        let mut repetition =
            penalty(self.repetition_penalty, defaults.repetition_penalty, self.repetition_context_size);
        repetition.value = off_at_zero(repetition.value);
        let probability = self.xtc_probability.unwrap_or(0.0);
        let threshold = self.xtc_threshold.unwrap_or(XTC_THRESHOLD_DEFAULT);
        let xtc = if probability > 0.0 {
            Some(XtcSampling { probability, threshold, spared: spared()? })
        } else {
            None
        };
        let top_k = self.top_k.unwrap_or(defaults.top_k);
        Ok(Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: off_at_zero(self.top_p.unwrap_or(defaults.top_p)),
            top_k: if top_k >= vocabulary { 0 } else { top_k },
            min_p: self.min_p.unwrap_or(defaults.min_p),
            seed: self.seed.unwrap_or_else(rand::random),
            repetition,
            presence: penalty(self.presence_penalty, 0.0, self.presence_context_size),
            frequency: penalty(self.frequency_penalty, 0.0, self.frequency_context_size),
            logit_bias: self.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            typical_p: off_at_zero(self.typical_p.unwrap_or(defaults.typical_p)),
            xtc,
            dry: self.dry.resolve(limits),
        })
    }
}

impl DryOptions {
    /// Refuses a length of nothing, and texts beyond the limits of stop strings.
    fn check(&self, limits: &Limits) -> Result<(), Error> {
        if self.allowed_length == Some(0) {
            return Err(Error::field("sampling.dry_allowed_length", "must be at least 1"));
        }
        if let Some(size) = self.context_size {
            up_to("sampling.dry_context_size", size, "dry_context_max", limits.dry_context_max)?;
        }
        let breakers = self.sequence_breakers.as_deref().unwrap_or_default();
        check_texts("sampling.dry_sequence_breakers", breakers, limits)
    }

    /// Applies the defaults; None if it is off.
    fn resolve(&self, limits: &Limits) -> Option<DrySampling> {
        let multiplier = self.multiplier.filter(|multiplier| *multiplier > 0.0)?;
        let breakers = match &self.sequence_breakers {
            Some(breakers) => breakers.iter().cloned().collect(),
            None => DRY_BREAKERS_DEFAULT.map(str::to_owned).into(),
        };
        Some(DrySampling {
            multiplier,
            base: self.base.unwrap_or(DRY_BASE_DEFAULT),
            allowed_length: self.allowed_length.unwrap_or(DRY_ALLOWED_LENGTH_DEFAULT),
            context_size: self.context_size.filter(|size| *size > 0).unwrap_or(limits.dry_context_max),
            breakers,
        })
    }
}

/// Refuses texts that are too many, too long or empty.
fn check_texts(path: &str, texts: &[String], limits: &Limits) -> Result<(), Error> {
    at_most(path, texts.len(), "stop_strings_max", limits.stop_strings_max)?;
    let bytes_max = limits.stop_string_bytes_max;
    let unfit = |text: &String| text.is_empty() || text.len() > bytes_max as usize;
    match texts.iter().position(unfit) {
        Some(index) => {
            let why = format!("stop_string_bytes_max: must have 1 to {bytes_max} bytes");
            Err(Error::field(format!("{path}[{index}]"), why))
        }
        None => Ok(()),
    }
}

/// Returns the tokens that XTC never removes: ends and line breaks, which structure a text (mlx-lm,
/// generate.py).
fn xtc_spared(assets: &ModelAssets) -> Result<Arc<[u32]>, Error> {
    let newline = assets.tokenizer.encode("\n", false);
    let newline = newline.map_err(|error| Error::field("sampling.xtc_probability", error.to_string()))?;
    let known = |id: &u32| *id < assets.vocabulary_size;
    Ok(assets.eos_token_ids.iter().copied().chain(newline).filter(known).collect())
}

impl StoppingOptions {
    /// Refuses values outside the contract's ranges.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), Error> {
        let Self { max_tokens, stop_strings, stop_token_ids, ignore_eos: _ } = self;
        if *max_tokens == Some(0) {
            return Err(Error::field("stopping.max_tokens", "must be at least 1"));
        }
        check_texts("stopping.stop_strings", stop_strings, limits)?;
        let ids = stop_token_ids.len();
        at_most("stopping.stop_token_ids", ids, "stop_token_ids_max", limits.stop_token_ids_max)
    }

    /// Adds the model's end tokens, and cuts `max_tokens` to what the context leaves: the output then ends
    /// with the reason Length.
    fn resolve(&self, assets: &ModelAssets, prompt_tokens: u32, limits: &Limits) -> Result<Stopping, Error> {
        let (context_length, vocabulary_size) = (assets.files.facts.context_length, assets.vocabulary_size);
        if let Some(index) = self.stop_token_ids.iter().position(|id| *id >= vocabulary_size) {
            let path = format!("stopping.stop_token_ids[{index}]");
            return Err(Error::field(path, format!("the vocabulary has {vocabulary_size} tokens")));
        }
        let left = context_length.saturating_sub(prompt_tokens);
        if left == 0 {
            return Err(Error::ContextOverflow { prompt_tokens, context_length });
        }
        let own: &[u32] = if self.ignore_eos { &[] } else { &assets.eos_token_ids };
        Ok(Stopping {
            max_tokens: self.max_tokens.unwrap_or(limits.max_tokens_default).min(left),
            stop_strings: Arc::clone(&self.stop_strings),
            stop_token_ids: own.iter().chain(&self.stop_token_ids).copied().collect(),
        })
    }
}

impl Resolved {
    /// Applies the defaults and limits of a model to a prompt of `prompt_tokens`.
    pub(super) fn new(
        (sampling, stopping): (&SamplingOptions, &StoppingOptions),
        assets: &ModelAssets,
        prompt_tokens: u32,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let stopping = stopping.resolve(assets, prompt_tokens, limits)?;
        Ok(Self {
            sampling: sampling
                .resolve(&assets.files.facts, (assets.vocabulary_size, limits), || xtc_spared(assets))?,
            stopping,
        })
    }

    /// Returns them for a request that only computes its context.
    pub(super) fn without_answer(self) -> Self {
        Self { stopping: Stopping { max_tokens: 0, ..self.stopping }, ..self }
    }

    /// Returns whether there is to be an answer.
    pub(super) fn has_answer(&self) -> bool {
        self.stopping.max_tokens > 0
    }

    /// Returns the values in force, as the caller is told.
    pub(super) fn effective(&self) -> EffectiveSampling {
        let Sampling { temperature, top_p, top_k, min_p, typical_p, seed, .. } = &self.sampling;
        let Sampling { repetition, presence, frequency, xtc, dry, .. } = &self.sampling;
        let (xtc_probability, xtc_threshold) =
            xtc.as_ref().map_or((0.0, XTC_THRESHOLD_DEFAULT), |xtc| (xtc.probability, xtc.threshold));
        let (dry_multiplier, dry_base, dry_allowed_length) =
            dry.as_ref().map_or((0.0, DRY_BASE_DEFAULT, DRY_ALLOWED_LENGTH_DEFAULT), |dry| {
                (dry.multiplier, dry.base, dry.allowed_length)
            });
        EffectiveSampling {
            temperature: *temperature,
            top_p: *top_p,
            top_k: *top_k,
            min_p: *min_p,
            seed: *seed,
            repetition_penalty: repetition.value,
            presence_penalty: presence.value,
            frequency_penalty: frequency.value,
            xtc_probability,
            xtc_threshold,
            typical_p: *typical_p,
            dry_multiplier,
            dry_base,
            dry_allowed_length,
            max_tokens: self.stopping.max_tokens,
        }
    }
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
