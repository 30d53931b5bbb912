//! What a tick may prefill, all models together: their steps run on one device, one after another, so a
//! prompt of one model delays the tokens of all. The time is shared out before the tick: the highest priority
//! class first, and within it evenly among the models that need it. What they do not need is there for
//! prompts that begin in the tick.

use std::collections::BTreeMap;
use std::time::Duration;

use super::PaceLimits;
use crate::ids::ModelName;

/// What one model wants to run in a tick.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand {
    /// Time of its step that only decodes; None if it does not decode, or nothing is known yet.
    pub decode: Option<Duration>,
    /// Highest priority class of the prompts that it runs; None if it runs none.
    pub class: Option<u32>,
    /// Time that these prompts take; None while nothing is known.
    pub prefill: Option<Duration>,
}

/// The time for prefill in a tick.
#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// Shares of the models that run prompts.
    shares: BTreeMap<ModelName, Duration>,
    /// Time that is nobody's share.
    left: Duration,
}

impl Allowance {
    /// Shares out the time of the next tick.
    #[must_use]
    pub fn new(demands: &BTreeMap<ModelName, Demand>, limits: PaceLimits) -> Self {
        let decode = demands.values().filter_map(|demand| demand.decode).reduce(|a, b| a + b);
        let stretch = limits.stretch_percent.saturating_sub(100);
        let whole = decode.map(|decode| decode.saturating_mul(stretch) / 100);
        let mut left = whole.map_or(limits.step_max, |whole| whole.min(limits.step_max));
        // Who needs least comes first, so that the others share what it leaves.
        let need = |demand: &Demand| demand.prefill.unwrap_or(Duration::MAX);
        let mut order: Vec<_> =
            demands.iter().filter_map(|(name, demand)| Some((demand.class?, need(demand), name))).collect();
        order.sort_unstable();
        let mut shares = BTreeMap::new();
        for group in order.chunk_by(|(a, ..), (b, ..)| a == b) {
            if left == Duration::ZERO && !shares.is_empty() {
                break;
            }
            for (&(_, need, name), others) in group.iter().zip((1..=group.len()).rev()) {
                let share = need.min(left / u32::try_from(others).unwrap_or(u32::MAX));
                shares.insert(name.clone(), share);
                left -= share;
            }
        }
        Self { shares, left }
    }

    /// Takes a model's share and what is nobody's; None if it may not prefill in this tick.
    pub fn take(&mut self, model: &ModelName) -> Option<Duration> {
        let share = self.shares.get(model).copied();
        if share.is_none() && self.left == Duration::ZERO && !self.shares.is_empty() {
            return None;
        }
        Some(share.unwrap_or_default() + std::mem::take(&mut self.left))
    }

    /// Gives back what a model did not need.
    pub fn give_back(&mut self, time: Duration) {
        self.left += time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PaceLimits =
        PaceLimits { prefill_tokens_max: 512, stretch_percent: 250, step_max: Duration::from_millis(500) };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn decodes(time: u64) -> Demand {
        Demand { decode: Some(ms(time)), ..Demand::default() }
    }

    fn prefills(class: u32, time: u64) -> Demand {
        Demand { class: Some(class), prefill: Some(ms(time)), ..Demand::default() }
    }

    fn share(demands: &[(&str, Demand)]) -> Allowance {
        let demands = demands.iter().map(|(name, demand)| (ModelName::from(*name), *demand)).collect();
        Allowance::new(&demands, LIMITS)
    }

    #[test]
    fn a_prompt_of_one_model_is_bounded_by_what_another_decodes() {
        let mut tick = share(&[("a", decodes(100)), ("b", prefills(1, 9000))]);
        assert_eq!((tick.take(&"b".into()), tick.take(&"a".into())), (Some(ms(150)), None));
        let mut alone = share(&[("b", prefills(1, 9000))]);
        assert_eq!(alone.take(&"b".into()), Some(ms(500)), "nobody waits for a token");
    }

    #[test]
    fn models_with_prompts_share_evenly_and_use_what_is_left() {
        let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 9000))]);
        assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (Some(ms(75)), Some(ms(75))));
        let mut one = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 50))]);
        assert_eq!((one.take(&"b".into()), one.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
        let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 40)), ("c", prefills(1, 50))]);
        assert_eq!(short.take(&"b".into()), Some(ms(40 + 60)));
        short.give_back(ms(60));
        assert_eq!(short.take(&"c".into()), Some(ms(110)));
        short.give_back(ms(60));
        assert_eq!(short.take(&"a".into()), Some(ms(60)), "for a prompt that begins in this tick");
    }

    #[test]
    fn a_higher_class_comes_first() {
        let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 9000))]);
        assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (None, Some(ms(150))));
        let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 50))]);
        assert_eq!((short.take(&"b".into()), short.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
    }

    #[test]
    fn what_is_not_known_counts_as_much_and_somebody_always_prefills() {
        let unknown = Demand { class: Some(1), ..Demand::default() };
        let mut tick = share(&[("a", decodes(100)), ("b", unknown), ("c", prefills(1, 50))]);
        assert_eq!((tick.take(&"c".into()), tick.take(&"b".into())), (Some(ms(50)), Some(ms(100))));
        let mut no_time = share(&[("a", decodes(0)), ("b", unknown), ("c", prefills(2, 9000))]);
        assert_eq!((no_time.take(&"c".into()), no_time.take(&"b".into())), (None, Some(ms(0))));
        let mut idle = share(&[("a", decodes(0))]);
        assert_eq!(idle.take(&"a".into()), Some(ms(0)), "the first prompt of all begins");
    }
}
