//! How fast a model runs, learned from its steps by what their spans were for: the time of a step that
//! decodes, by its rows (`curve`), and the time that each prefilled token adds. From it follow what a tick
//! may run (`allowance`), how many tokens that is, and when a first token is possible.

use std::time::Duration;

use super::curve::Curve;
use super::estimate::{LEARNING_RATE, LEARNING_RATE_FASTER, RISE_MAX, TIME_MIN, learn};
use crate::backend::SpanKind;

/// As [`LEARNING_RATE_FASTER`], for the usual time: there faster steps count for less, since it is the slow
/// ones that somebody waits for.
const LEARNING_RATE_USUAL_FASTER: f64 = 0.125;

/// Factor by which a step must be faster than the usual one to show that an exception was learned before.
const FASTER_BY: f64 = 2.0;

/// Prefilled tokens from which on a step's time tells what one of them costs.
const TELLING_TOKENS: f64 = 64.0;

/// Longest time that is estimated, whatever a clock that was set or a machine that slept has shown.
const TIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// Tokens to prefill while nothing is known: enough to learn from, too few to be noticed.
const FIRST_TOKENS: u32 = 64;

/// A deadline is out of reach only if it is so at this many times the speed that was seen.
const DOUBT: u32 = 2;

/// Factor on an estimate after a request was refused by it.
const KEPT_AFTER_REFUSAL: f64 = 0.9;

/// Steps with prefill from which on the estimate is believed: the first ones compile kernels.
const TELLING_STEPS: u32 = 8;

/// Steps with prefill between two that only decode, where there is always something to prefill.
const LOOK_STEPS: u32 = 12;

/// Least part of a step's time that its prefill takes, whatever the step would have taken without it.
const PREFILL_SHARE_MIN: f64 = 0.1;

/// Bounds of what a tick may prefill.
#[derive(Clone, Copy, Debug)]
pub struct PaceLimits {
    /// Most tokens of one model.
    pub prefill_tokens_max: u32,
    /// Longest time of a tick while somebody decodes, whichever model, in percent of what whoever has fewest
    /// takes by itself; see `allowance`.
    pub stretch_percent: u32,
    /// Longest time of the prefill in any case.
    pub step_max: Duration,
}

/// What a step computes, as far as its time tells something.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepLoad {
    /// Number of spans that decode.
    pub decoding: u32,
    /// Number of prompts of which it computes the last token: each costs what a row that decodes does.
    pub last: u32,
    /// Number of prefilled tokens, without those.
    pub prefilled: u32,
}

impl StepLoad {
    /// Adds a span of `tokens` tokens.
    pub fn add(&mut self, kind: SpanKind, tokens: u32) {
        match kind {
            SpanKind::Decode | SpanKind::Verify => self.decoding += 1,
            SpanKind::Prefill if tokens == 1 => self.last += 1,
            SpanKind::Prefill => self.prefilled += tokens,
        }
    }
}

/// The speed of a model, in seconds.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// The least that a step takes which only decodes: the measure of what a stream may wait.
    decode: Curve,
    /// What one takes usually, as a factor on the least.
    slowness: Option<f64>,
    /// The least that a prefilled token takes: for deadlines, which are refused only if out of reach.
    prefill_token: Option<f64>,
    /// What one takes usually, as many as a step has had of late: for sizes of steps, which with the least
    /// would all take longer than they may.
    prefill_token_usual: Option<f64>,
    /// Tokens that a step has prefilled of late.
    prefill_tokens: f64,
    /// Steps since the last one that only decoded.
    since_decode: u32,
    /// Number of steps that prefilled.
    prefills: u32,
}

/// Learns the usual time, a little above the mean.
fn learn_usual(estimate: &mut Option<f64>, seen: f64, weight: f64) {
    *estimate = Some(match *estimate {
        None => seen,
        Some(old) if seen * FASTER_BY < old => old + (seen - old) * LEARNING_RATE_FASTER * weight,
        Some(old) if seen < old => old + (seen - old) * LEARNING_RATE_USUAL_FASTER * weight,
        Some(old) => old + (seen.min((old * RISE_MAX).max(TIME_MIN)) - old) * LEARNING_RATE * weight,
    });
}

impl Pace {
    /// Learns from the time of a step.
    pub fn observe(&mut self, load: StepLoad, took: Duration) {
        let StepLoad { decoding, last, prefilled } = load;
        let (took, rows) = (took.as_secs_f64(), decoding + last);
        if prefilled == 0 {
            if decoding > 0 {
                self.decode.observe(rows, took);
                let least = self.decode.time(rows).unwrap_or(took).max(f64::MIN_POSITIVE);
                learn_usual(&mut self.slowness, (took / least).clamp(1.0, RISE_MAX), 1.0);
                self.since_decode = 0;
            }
            return;
        }
        self.since_decode = self.since_decode.saturating_add(1);
        let base = self.learn_base(rows, took);
        let tokens = f64::from(prefilled);
        let token = (took - base).max(took * PREFILL_SHARE_MIN) / tokens;
        self.prefill_token = Some(learn(self.prefill_token, token, (tokens / TELLING_TOKENS).min(1.0)));
        // The rest of a prompt, of a few tokens, tells little about what others cost.
        learn_usual(&mut self.prefill_token_usual, token, (tokens / self.prefill_tokens.max(1.0)).min(1.0));
        self.prefill_tokens += (tokens - self.prefill_tokens) * LEARNING_RATE;
        self.prefills = self.prefills.saturating_add(1);
    }

    /// Returns what a step took besides its prefilled tokens: its rows, or without any mostly what reading
    /// the weights takes, which it does once in any case, and which [`Self::prefill_tokens`] takes off too. A
    /// step that is faster than that shows that what was learned of few rows is outdated.
    fn learn_base(&mut self, rows: u32, took: f64) -> f64 {
        match self.decode.time(rows.max(1)) {
            None => 0.0,
            Some(step) if rows > 0 => step.min(took),
            Some(step) if step < took => step,
            Some(_) => {
                self.decode.bound(took);
                took / 2.0
            }
        }
    }

    /// Returns whether the next step should only decode though there is something to prefill: beside prompts
    /// that follow one another, nothing else would tell what that takes.
    #[must_use]
    pub fn should_look(&self) -> bool {
        self.since_decode >= LOOK_STEPS
    }

    /// Returns the least time of a step that only decodes `rows` rows; None while nothing is known.
    #[must_use]
    pub fn step(&self, rows: u32) -> Option<Duration> {
        if rows == 0 {
            self.decode.time(1).map(|_| Duration::ZERO)
        } else {
            self.decode.time(rows).map(seconds)
        }
    }

    /// Returns the time that such a step usually takes.
    #[must_use]
    pub fn usual_step(&self, rows: u32) -> Option<Duration> {
        let slowness = self.slowness.unwrap_or(1.0);
        self.step(rows).map(|least| seconds(least.as_secs_f64() * slowness))
    }

    /// Returns the time that prefilling `tokens` usually adds to a tick, in a step that `decodes` or in one
    /// of its own, which reads the weights for them alone; None while nothing is known.
    #[must_use]
    pub fn prefill(&self, tokens: u32, decodes: bool) -> Option<Duration> {
        let base = self.base(decodes);
        self.prefill_token_usual.map(|token| seconds(base + token * f64::from(tokens)))
    }

    /// Returns the number of tokens to prefill in a given time, in such a step: at least `least`, whatever
    /// they cost, and at most `most`.
    #[must_use]
    pub fn prefill_tokens(&self, time: Duration, decodes: bool, (least, most): (u32, u32)) -> u32 {
        let left = (time.as_secs_f64() - self.base(decodes)).max(0.0);
        let affordable =
            self.prefill_token_usual.map_or(FIRST_TOKENS, |token| whole(left / token.max(f64::MIN_POSITIVE)));
        affordable.max(least).min(most)
    }

    /// Returns what a step takes for its prefill besides its tokens.
    fn base(&self, decodes: bool) -> f64 {
        if decodes { 0.0 } else { self.decode.time(1).unwrap_or(0.0) }
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

/// Returns a time that others can be added to.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).map_or(TIME_MAX, |time| time.min(TIME_MAX))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as is wanted")]
fn whole(x: f64) -> u32 {
    x as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(decoding: u32, prefilled: u32) -> StepLoad {
        StepLoad { decoding, last: 0, prefilled }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_step_tells_what_decoding_and_a_prefilled_token_cost() {
        let mut pace = Pace::default();
        assert_eq!((pace.step(1), pace.prefill(9, true)), (None, None));
        assert_eq!(pace.prefill_tokens(ms(1), true, (16, 512)), 64);
        pace.observe(load(4, 0), ms(40));
        pace.observe(load(4, 64), ms(40 + 128));
        assert_eq!((pace.step(4), pace.prefill(9, true)), (Some(ms(40)), Some(ms(18))));
        assert_eq!(pace.prefill_tokens(ms(80), true, (16, 512)), 40, "at 2 ms a token");
    }

    #[test]
    fn a_step_of_prompts_alone_reads_the_weights_for_them() {
        let mut pace = Pace::default();
        pace.observe(load(1, 0), ms(40));
        (0..9).for_each(|_| pace.observe(load(0, 30), ms(40 + 60)));
        assert_eq!(pace.prefill(30, true), Some(ms(60)));
        assert_eq!(pace.prefill(30, false), Some(ms(100)));
        assert_eq!(pace.prefill_tokens(ms(100), true, (8, 512)), 50);
        assert_eq!(pace.prefill_tokens(ms(100), false, (8, 512)), 30);
        assert_eq!(pace.prefill_tokens(ms(30), false, (8, 512)), 8, "it goes on");
    }

    #[test]
    fn small_pieces_of_a_prompt_do_not_make_its_tokens_dear() {
        let mut pace = Pace::default();
        pace.observe(load(1, 0), ms(500));
        pace.observe(load(0, 64), ms(500 + 3 * 64));
        for _ in 0..200 {
            let tokens = pace.prefill_tokens(ms(30), false, (20, 512));
            assert_eq!(tokens, 20, "there is no time for more");
            pace.observe(load(0, tokens), ms(500 + 3 * 20));
        }
        assert_eq!(pace.prefill(100, true), Some(ms(300)));
        // So is what was learned from many rows at a time.
        (0..9).for_each(|_| pace.observe(load(0, 20), ms(40 + 3 * 20)));
        assert!(pace.step(1).unwrap() <= ms(100));
    }

    #[test]
    fn fast_models_are_bounded_by_tokens_and_slow_ones_go_on() {
        let mut pace = Pace::default();
        pace.observe(load(0, 64), Duration::from_micros(64));
        assert_eq!(pace.prefill_tokens(ms(400), true, (16, 512)), 512);
        let mut slow = Pace::default();
        slow.observe(load(0, 64), Duration::from_secs(64));
        assert_eq!(slow.prefill_tokens(ms(400), true, (16, 512)), 16);
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
        assert!((250..=400).contains(&pace.prefill_tokens(ms(400), true, (16, 512))));
        pace.observe(load(0, 64), ms(5000));
        assert!(pace.prefill_tokens(ms(400), true, (16, 512)) >= 200);
    }

    #[test]
    fn steps_are_sized_for_the_usual_time_not_for_the_least() {
        // The machine is busy in every other step, which then takes half as long again.
        let (mut pace, mut took) = (Pace::default(), 0.0);
        pace.observe(load(1, 0), ms(40));
        for step in 0..400_u32 {
            let tokens = pace.prefill_tokens(ms(60), true, (8, 512));
            let whole = (40.0 + 3.0 * f64::from(tokens)) * if step % 2 == 0 { 1.25 } else { 0.75 };
            pace.observe(load(1, tokens), Duration::from_secs_f64(whole / 1e3));
            took += if step < 200 { 0.0 } else { whole / 200.0 };
        }
        assert!((85.0..=100.5).contains(&took), "the wanted 100 ms or less in the mean, not {took}");
        let least = pace.prefill_token.unwrap_or_default();
        assert!(least < 0.8 * pace.prefill_token_usual.unwrap_or_default(), "for deadlines it is the least");
    }

    #[test]
    fn what_decoding_takes_is_looked_at_beside_endless_prompts() {
        let mut pace = Pace::default();
        // Another program is busy when the prompts begin.
        (0..20).for_each(|_| pace.observe(load(1, 0), ms(60)));
        let (mut looks, mut steps) = (0, 0);
        while pace.step(1) > Some(ms(32)) {
            steps += 1;
            let tokens = if pace.should_look() { 0 } else { pace.prefill_tokens(ms(45), true, (8, 512)) };
            looks += u32::from(tokens == 0);
            pace.observe(load(1, tokens), ms(30) + 2 * ms(tokens.into()));
            assert!(steps < 100, "{pace:?}");
        }
        assert!(looks * LOOK_STEPS <= steps, "{looks} of {steps}");
    }

    #[test]
    fn the_rest_of_a_prompt_and_a_late_host_teach_little() {
        let mut pace = Pace::default();
        (0..30).for_each(|_| pace.observe(load(1, 0), ms(30)));
        (0..9).for_each(|_| pace.observe(load(1, 40), ms(30 + 80)));
        let before = pace.prefill_tokens(ms(80), true, (8, 512));
        pace.observe(load(1, 4), ms(30));
        assert!(pace.prefill_tokens(ms(80), true, (8, 512)) <= before + 2, "a rest that cost nothing");
        pace.observe(load(1, 0), ms(150));
        assert!(pace.step(1) <= Some(ms(32)), "{pace:?}");
    }

    #[test]
    fn steps_of_no_time_leave_sound_estimates() {
        let mut pace = Pace::default();
        for took in [0, 0, 30, 0, 50, 0, 0, 30] {
            pace.observe(load(4, 0), ms(took));
            assert!(pace.usual_step(4) <= Some(ms(100)) && pace.usual_step(40) <= Some(ms(2000)), "{pace:?}");
        }
    }

    #[test]
    fn rows_are_counted_at_what_they_usually_take() {
        let mut pace = Pace::default();
        // The machine is busy in every other step.
        for step in 0..200 {
            pace.observe(load(4, 0), ms(if step % 2 == 0 { 50 } else { 40 }));
        }
        let (least, usual) = (pace.step(4).unwrap(), pace.usual_step(4).unwrap());
        assert!(least < ms(42) && (ms(44)..ms(52)).contains(&usual), "{least:?} {usual:?}");
        assert_eq!((pace.step(0), pace.usual_step(0)), (Some(ms(0)), Some(ms(0))));
    }

    #[test]
    fn the_last_token_of_a_prompt_alone_teaches_nothing_and_beside_others_it_is_a_row() {
        let mut pace = Pace::default();
        pace.observe(load(1, 0), ms(40));
        pace.observe(load(0, 64), ms(20 + 64));
        let known = (pace.step(1), pace.prefill_token);
        let mut step = StepLoad::default();
        step.add(SpanKind::Prefill, 1);
        pace.observe(step, ms(2000));
        assert_eq!((pace.step(1), pace.prefill_token), known);
        step.add(SpanKind::Verify, 5);
        pace.observe(step, ms(70));
        assert_eq!((pace.step(1), pace.step(2), pace.prefill_token), (known.0, Some(ms(70)), known.1));
    }
}
