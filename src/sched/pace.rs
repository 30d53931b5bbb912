//! How fast a model runs, learned from its steps by what their spans were for: the time of a step of
//! decoding, and the time that each prefilled token adds. From it follow what a tick may prefill
//! (`allowance`), how many tokens that is, and when a first token is possible.

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

/// Bounds of what a tick may prefill.
#[derive(Clone, Copy, Debug)]
pub struct PaceLimits {
    /// Most tokens of one model.
    pub prefill_tokens_max: u32,
    /// Longest time while somebody decodes, whichever model, in percent of a tick that only decodes.
    pub stretch_percent: u32,
    /// Longest time of the prefill in any case.
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

    /// Returns the time of a step that only decodes; None while nothing is known.
    #[must_use]
    pub fn decode_step(&self) -> Option<Duration> {
        self.decode_step.map(seconds)
    }

    /// Returns the time that prefilling `tokens` adds to a step; None while nothing is known.
    #[must_use]
    pub fn prefill(&self, tokens: u32) -> Option<Duration> {
        self.prefill_token.map(|token| seconds(token * f64::from(tokens)))
    }

    /// Returns the number of tokens to prefill in a given time: at least `least`, whatever they cost, and at
    /// most `most`.
    #[must_use]
    pub fn prefill_tokens(&self, time: Duration, least: u32, most: u32) -> u32 {
        let affordable = self
            .prefill_token
            .map_or(FIRST_TOKENS, |token| whole(time.as_secs_f64() / token.max(f64::MIN_POSITIVE)));
        affordable.max(least).min(most)
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

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as is wanted")]
fn whole(x: f64) -> u32 {
    x as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(decoding: u32, prefilled: u32) -> StepLoad {
        StepLoad { decoding, prefilled }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_tells_what_decoding_and_a_prefilled_token_cost() {
        let mut pace = Pace::default();
        assert_eq!((pace.decode_step(), pace.prefill(9)), (None, None));
        assert_eq!(pace.prefill_tokens(ms(1), 16, 512), 64);
        pace.observe(load(4, 0), ms(40));
        pace.observe(load(4, 64), ms(40 + 128));
        assert_eq!((pace.decode_step(), pace.prefill(9)), (Some(ms(40)), Some(ms(18))));
        assert_eq!(pace.prefill_tokens(ms(80), 16, 512), 40, "at 2 ms a token");
    }

    #[test]
    fn fast_models_are_bounded_by_tokens_and_slow_ones_go_on() {
        let mut pace = Pace::default();
        pace.observe(load(0, 64), Duration::from_micros(64));
        assert_eq!(pace.prefill_tokens(ms(400), 16, 512), 512);
        let mut slow = Pace::default();
        slow.observe(load(0, 64), Duration::from_secs(64));
        assert_eq!(slow.prefill_tokens(ms(400), 16, 512), 16);
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
        assert!((300..=400).contains(&pace.prefill_tokens(ms(400), 16, 512)));
        pace.observe(load(0, 64), ms(5000));
        assert!(pace.prefill_tokens(ms(400), 16, 512) >= 240);
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
