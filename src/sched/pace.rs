//! How fast a model runs, learned from its steps by what their spans were for: the time of a step of
//! decoding, and the time that each prefilled token adds. From it follow how much a step may prefill, and
//! when a first token is possible.

use std::time::Duration;

use crate::backend::SpanKind;

/// Part of an estimate that one step replaces: the last few steps count. Faster ones count for more: a step
/// may be slow because a kernel was compiled for it, or because another program was busy.
const LEARNING_RATE: f64 = 0.25;
const LEARNING_RATE_FASTER: f64 = 0.5;

/// Factor by which one step can raise an estimate at most.
const RISE_MAX: f64 = 2.0;

/// Prefilled tokens from which on a step's time tells what one of them costs.
const TELLING_TOKENS: f64 = 64.0;

/// Tokens to prefill while nothing is known: enough to learn from, too few to be noticed.
const FIRST_TOKENS: u32 = 64;

/// A deadline is out of reach only if it is so at this many times the speed that was seen.
const DOUBT: u32 = 2;

/// Factor on an estimate after a request was refused by it.
const KEPT_AFTER_REFUSAL: f64 = 0.9;

/// Steps with prefill from which on the estimate is believed: the first ones compile kernels.
const TELLING_STEPS: u32 = 8;

/// Least part of a step's time that its prefill takes, whatever the step would have taken without it.
const PREFILL_SHARE_MIN: f64 = 0.1;

/// Bounds of what a step may prefill.
#[derive(Clone, Copy, Debug)]
pub struct PaceLimits {
    /// Most tokens.
    pub prefill_tokens_max: u32,
    /// Longest time while others decode, in percent of a step that only decodes.
    pub stretch_percent: u32,
    /// Longest time of a step that does not decode.
    pub step_max: Duration,
}

/// What a step computes, as far as its time tells something.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepLoad {
    /// Number of spans that decode.
    pub decoding: u32,
    /// Number of prefilled tokens, without those of spans of one.
    pub prefilled: u32,
}

impl StepLoad {
    /// Adds a span of `tokens` tokens.
    pub fn add(&mut self, kind: SpanKind, tokens: u32) {
        match kind {
            SpanKind::Decode | SpanKind::Verify => self.decoding += 1,
            // The last token of a prompt: it adds next to nothing to a step, and tells nothing about long
            // prompts.
            SpanKind::Prefill if tokens == 1 => {}
            SpanKind::Prefill => self.prefilled += tokens,
        }
    }
}

/// The speed of a model, in seconds.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    decode_step: Option<f64>,
    prefill_token: Option<f64>,
    /// Number of steps that prefilled.
    prefills: u32,
}

fn learn(estimate: &mut Option<f64>, seen: f64, weight: f64) {
    *estimate = Some(match *estimate {
        None => seen,
        Some(old) if seen < old => old + (seen - old) * LEARNING_RATE_FASTER,
        Some(old) => old + (seen.min(old * RISE_MAX) - old) * LEARNING_RATE * weight,
    });
}

impl Pace {
    /// Learns from the time of a step.
    pub fn observe(&mut self, load: StepLoad, took: Duration) {
        let StepLoad { decoding, prefilled } = load;
        let took = took.as_secs_f64();
        if prefilled == 0 {
            if decoding > 0 {
                learn(&mut self.decode_step, took, 1.0);
            }
            return;
        }
        // A step without prefill takes mostly what reading the weights takes, which it does once in any case.
        let base = self.decode_step.unwrap_or(0.0).min(if decoding > 0 { took } else { took / 2.0 });
        let tokens = f64::from(prefilled);
        let token = (took - base).max(took * PREFILL_SHARE_MIN) / tokens;
        learn(&mut self.prefill_token, token, (tokens / TELLING_TOKENS).min(1.0));
        self.prefills = self.prefills.saturating_add(1);
    }

    /// Returns the number of tokens that the next step may prefill: at least `least`, whatever they cost.
    #[must_use]
    pub fn prefill_tokens(&self, decoding: bool, least: u32, limits: PaceLimits) -> u32 {
        self.affordable_tokens(decoding, limits).max(least).min(limits.prefill_tokens_max)
    }

    fn affordable_tokens(&self, decoding: bool, limits: PaceLimits) -> u32 {
        let Some(token) = self.prefill_token else { return FIRST_TOKENS };
        let step_max = limits.step_max.as_secs_f64();
        let time = match self.decode_step.filter(|_| decoding) {
            Some(step) => {
                (step * f64::from(limits.stretch_percent.saturating_sub(100)) / 100.0).min(step_max)
            }
            None => step_max,
        };
        whole(time / token.max(f64::MIN_POSITIVE))
    }

    /// Lowers the estimate that a request was refused by. If it is from a time when another program was busy,
    /// nothing would ever correct it while all are refused: after some refusals one is let through.
    pub fn doubt(&mut self) {
        if let Some(token) = &mut self.prefill_token {
            *token *= KEPT_AFTER_REFUSAL;
        }
    }

    /// Returns the least time that prefilling `tokens` takes; None while too little is known.
    #[must_use]
    pub fn time_to_prefill(&self, tokens: u32) -> Option<Duration> {
        let token = self.prefill_token.filter(|_| self.prefills >= TELLING_STEPS)?;
        Duration::try_from_secs_f64(f64::from(tokens) * token / f64::from(DOUBT)).ok()
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as is wanted")]
fn whole(x: f64) -> u32 {
    x as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PaceLimits =
        PaceLimits { prefill_tokens_max: 512, stretch_percent: 300, step_max: Duration::from_millis(400) };

    fn load(decoding: u32, prefilled: u32) -> StepLoad {
        StepLoad { decoding, prefilled }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn prefill_stretches_a_decode_step_by_no_more_than_it_may() {
        let mut pace = Pace::default();
        assert_eq!(pace.prefill_tokens(true, 16, LIMITS), 64);
        pace.observe(load(4, 0), ms(40));
        pace.observe(load(4, 64), ms(40 + 128));
        assert_eq!(pace.prefill_tokens(true, 16, LIMITS), 40, "two steps' time at 2 ms a token");
        assert_eq!(pace.prefill_tokens(false, 16, LIMITS), 200, "0.4 s at 2 ms a token");
    }

    #[test]
    fn fast_models_are_bounded_by_tokens_and_slow_ones_go_on() {
        let mut pace = Pace::default();
        pace.observe(load(0, 64), Duration::from_micros(64));
        assert_eq!(pace.prefill_tokens(false, 16, LIMITS), 512);
        let mut slow = Pace::default();
        slow.observe(load(0, 64), Duration::from_secs(64));
        assert_eq!(slow.prefill_tokens(true, 16, LIMITS), 16);
    }

    #[test]
    fn a_deadline_is_judged_by_twice_the_speed_that_was_seen() {
        let mut pace = Pace::default();
        pace.observe(load(1, 0), ms(10));
        pace.observe(load(1, 100), ms(60_010));
        for _ in 1..TELLING_STEPS {
            assert_eq!(pace.time_to_prefill(1000), None);
            pace.observe(load(1, 100), ms(110));
        }
        let time = pace.time_to_prefill(1000).unwrap();
        assert!((ms(500)..ms(3000)).contains(&time), "{time:?}");
    }

    #[test]
    fn one_slow_step_is_soon_forgotten() {
        let mut pace = Pace::default();
        pace.observe(load(0, 64), ms(5000));
        (0..8).for_each(|_| pace.observe(load(0, 64), ms(64)));
        assert!((300..=400).contains(&pace.prefill_tokens(false, 16, LIMITS)));
        pace.observe(load(0, 64), ms(5000));
        assert!(pace.prefill_tokens(false, 16, LIMITS) >= 240);
    }

    #[test]
    fn the_last_token_of_a_prompt_alone_teaches_nothing() {
        let mut pace = Pace::default();
        pace.observe(load(1, 0), ms(40));
        pace.observe(load(0, 64), ms(20 + 64));
        let known = (pace.decode_step, pace.prefill_token);
        let mut step = StepLoad::default();
        step.add(SpanKind::Prefill, 1);
        pace.observe(step, ms(2000));
        assert_eq!((pace.decode_step, pace.prefill_token), known);
        step.add(SpanKind::Verify, 5);
        pace.observe(step, ms(20));
        assert_eq!(
            (pace.decode_step, pace.prefill_token),
            (Some(0.03), known.1),
            "beside others it is one more row"
        );
    }
}
