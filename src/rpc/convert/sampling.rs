//! How tokens are chosen and when generation ends: the ranges of the contract first, then, once the model is
//! known, its defaults and its vocabulary.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{at_most, within};
use crate::engine::{Penalty, Sampling, Stopping, XtcSampling};
use crate::error::Error;
use crate::hub::{ModelAssets, ModelFacts};
use crate::limits::Limits;
use crate::rpc::pb;

/// How many last tokens a penalty looks at if the request does not say.
const PENALTY_CONTEXT_DEFAULT: u32 = 20;

/// How likely a candidate must be for XTC if the request does not say.
const XTC_THRESHOLD_DEFAULT: f32 = 0.1;

/// Sampling values of a request, in range.
#[derive(Debug, Default)]
pub(in crate::rpc) struct SamplingAsk {
    sent: pb::SamplingOptions,
    logit_bias: BTreeMap<u32, f32>,
}

/// Stopping values of a request, in range.
#[derive(Debug)]
pub(in crate::rpc) struct StoppingAsk {
    max_tokens: Option<u32>,
    stop_strings: Arc<[String]>,
    stop_token_ids: Vec<u32>,
    ignore_eos: bool,
}

/// What to return besides the text.
#[derive(Clone, Copy, Debug)]
pub(in crate::rpc) struct OutputAsk {
    pub(in crate::rpc) top_logprobs: Option<u32>,
    pub(in crate::rpc) token_ids: bool,
}

/// Everything in force for a request.
#[derive(Clone, Debug)]
pub(in crate::rpc) struct Resolved {
    pub(in crate::rpc) sampling: Sampling,
    pub(in crate::rpc) stopping: Stopping,
}

impl SamplingAsk {
    pub(in crate::rpc) fn new(sent: Option<pb::SamplingOptions>, limits: &Limits) -> Result<Self, Error> {
        let mut sent = sent.unwrap_or_default();
        let logit_bias: BTreeMap<u32, f32> = std::mem::take(&mut sent.logit_bias).into_iter().collect();
        let range = |name: &str, value: Option<f32>, low, high| {
            value.map_or(Ok(()), |value| within(&format!("sampling.{name}"), value, low, high).map(drop))
        };
        range("temperature", sent.temperature, 0.0, 100.0)?;
        range("top_p", sent.top_p, 0.0, 1.0)?;
        range("min_p", sent.min_p, 0.0, 1.0)?;
        range("repetition_penalty", sent.repetition_penalty, 0.0, 100.0)?;
        range("presence_penalty", sent.presence_penalty, -100.0, 100.0)?;
        range("frequency_penalty", sent.frequency_penalty, -100.0, 100.0)?;
        range("xtc_probability", sent.xtc_probability, 0.0, 1.0)?;
        range("xtc_threshold", sent.xtc_threshold, 0.0, 0.5)?;
        at_most("sampling.logit_bias", logit_bias.len(), "logit_bias_max", limits.logit_bias_max)?;
        for (id, bias) in &logit_bias {
            within(&format!("sampling.logit_bias[{id}]"), *bias, -1000.0, 1000.0)?;
        }
        Ok(Self { sent, logit_bias })
    }

    /// `spared` finds the tokens that XTC spares.
    fn resolve(
        &self,
        facts: &ModelFacts,
        spared: impl FnOnce() -> Result<Arc<[u32]>, Error>,
    ) -> Result<Sampling, Error> {
        let Self { sent, logit_bias } = self;
        let defaults = &facts.default_sampling;
        let vocabulary = facts.vocabulary_size;
        if let Some(id) = logit_bias.keys().find(|id| **id >= vocabulary) {
            let path = format!("sampling.logit_bias[{id}]");
            return Err(Error::field(path, format!("the vocabulary has {vocabulary} tokens")));
        }
        let off_at_zero = |value: f32| if value == 0.0 { 1.0 } else { value };
        let penalty = |value: Option<f32>, unset, context_size: Option<u32>| Penalty {
            value: value.unwrap_or(unset),
            context_size: context_size.unwrap_or(PENALTY_CONTEXT_DEFAULT),
        };
        let mut repetition =
            penalty(sent.repetition_penalty, defaults.repetition_penalty, sent.repetition_context_size);
        repetition.value = off_at_zero(repetition.value);
        let probability = sent.xtc_probability.unwrap_or(0.0);
        let threshold = sent.xtc_threshold.unwrap_or(XTC_THRESHOLD_DEFAULT);
        let xtc = if probability > 0.0 {
            Some(XtcSampling { probability, threshold, spared: spared()? })
        } else {
            None
        };
        let top_k = sent.top_k.unwrap_or(defaults.top_k);
        Ok(Sampling {
            temperature: sent.temperature.unwrap_or(defaults.temperature),
            top_p: off_at_zero(sent.top_p.unwrap_or(defaults.top_p)),
            top_k: if top_k >= vocabulary { 0 } else { top_k },
            min_p: sent.min_p.unwrap_or(defaults.min_p),
            seed: sent.seed.unwrap_or_else(rand::random),
            repetition,
            presence: penalty(sent.presence_penalty, 0.0, sent.presence_context_size),
            frequency: penalty(sent.frequency_penalty, 0.0, sent.frequency_context_size),
            logit_bias: logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            xtc,
        })
    }
}

/// XTC spares ends and line breaks, as in mlx-lm (generate.py): what structures a text.
fn xtc_spared(assets: &ModelAssets) -> Result<Arc<[u32]>, Error> {
    let newline = assets.tokenizer.encode("\n", false);
    let newline = newline.map_err(|error| Error::field("sampling.xtc_probability", error.to_string()))?;
    let known = |id: &u32| *id < assets.facts.vocabulary_size;
    Ok(assets.eos_token_ids.iter().copied().chain(newline).filter(known).collect())
}

impl StoppingAsk {
    pub(in crate::rpc) fn new(sent: Option<pb::StoppingOptions>, limits: &Limits) -> Result<Self, Error> {
        let pb::StoppingOptions { max_tokens, stop_strings, stop_token_ids, ignore_eos } =
            sent.unwrap_or_default();
        if max_tokens == Some(0) {
            return Err(Error::field("stopping.max_tokens", "must be at least 1"));
        }
        at_most("stopping.stop_strings", stop_strings.len(), "stop_strings_max", limits.stop_strings_max)?;
        for (index, stop) in stop_strings.iter().enumerate() {
            if stop.is_empty() || stop.len() > limits.stop_string_bytes_max as usize {
                let why =
                    format!("stop_string_bytes_max: must have 1 to {} bytes", limits.stop_string_bytes_max);
                return Err(Error::field(format!("stopping.stop_strings[{index}]"), why));
            }
        }
        let ids = stop_token_ids.len();
        at_most("stopping.stop_token_ids", ids, "stop_token_ids_max", limits.stop_token_ids_max)?;
        Ok(Self { max_tokens, stop_strings: stop_strings.into(), stop_token_ids, ignore_eos })
    }

    /// More tokens than the context leaves are cut to that: the output then ends with LENGTH.
    fn resolve(&self, assets: &ModelAssets, prompt_tokens: u32, limits: &Limits) -> Result<Stopping, Error> {
        let ModelFacts { context_length, vocabulary_size, .. } = assets.facts;
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

impl OutputAsk {
    pub(in crate::rpc) fn new(sent: Option<pb::OutputOptions>, limits: &Limits) -> Result<Self, Error> {
        let pb::OutputOptions { logprobs, return_token_ids } = sent.unwrap_or_default();
        if let Some(logprobs) = logprobs {
            within("output.logprobs", logprobs, 0, limits.top_logprobs_max)?;
        }
        Ok(Self { top_logprobs: logprobs, token_ids: return_token_ids })
    }
}

impl Resolved {
    pub(in crate::rpc) fn new(
        (sampling, stopping): (&SamplingAsk, &StoppingAsk),
        assets: &ModelAssets,
        prompt_tokens: u32,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let stopping = stopping.resolve(assets, prompt_tokens, limits)?;
        Ok(Self { sampling: sampling.resolve(&assets.facts, || xtc_spared(assets))?, stopping })
    }

    /// What the caller is told.
    pub(in crate::rpc) fn effective(&self) -> pb::EffectiveSampling {
        let Sampling { temperature, top_p, top_k, min_p, seed, repetition, presence, frequency, xtc, .. } =
            &self.sampling;
        let (xtc_probability, xtc_threshold) =
            xtc.as_ref().map_or((0.0, XTC_THRESHOLD_DEFAULT), |xtc| (xtc.probability, xtc.threshold));
        pb::EffectiveSampling {
            temperature: *temperature,
            top_p: *top_p,
            top_k: *top_k,
            min_p: *min_p,
            seed: *seed,
            repetition_penalty: repetition.value,
            presence_penalty: presence.value,
            frequency_penalty: frequency.value,
            max_tokens: self.stopping.max_tokens,
            xtc_probability,
            xtc_threshold,
        }
    }
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
