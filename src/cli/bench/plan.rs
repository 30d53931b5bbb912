//! The workload: lengths, prompts and arrival times, all drawn from one seed. A request depends only on the
//! seed, its level and its number, not on the order of the answers.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// A number of tokens, or an inclusive range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    pub(super) min: u32,
    pub(super) max: u32,
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a number of tokens"));
        let (min, max) = (number(min)?, number(max)?);
        if min == 0 || max < min {
            return Err("must be a number from 1, or a range A..B with A <= B".into());
        }
        Ok(Self { min, max })
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.min, self.max) {
            (min, max) if min == max => write!(f, "{min}"),
            (min, max) => write!(f, "{min}..{max}"),
        }
    }
}

/// Arrival pattern of the requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Load {
    /// Constant concurrency: a request starts when another has ended.
    Closed(u32),
    /// Mean arrival rate per second, at random, whether or not earlier requests have ended.
    Open(f64),
}

impl Load {
    /// Returns the position on the plot's axis: concurrency or rate.
    pub(super) fn value(self) -> f64 {
        match self {
            Self::Closed(count) => f64::from(count),
            Self::Open(rate) => rate,
        }
    }
}

/// One request to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) prompt: Vec<u32>,
    pub(super) output_tokens: u32,
    /// Whether it is one of the long prompts that are mixed in.
    pub(super) long: bool,
}

/// Long prompts mixed in among the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LongMix {
    pub(super) tokens: u32,
    /// Period: request number `every`, 2 `every` and so on is long.
    pub(super) every: u32,
}

/// Distribution of the requests.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) seed: u64,
    pub(super) vocabulary: u32,
    pub(super) prompt: Lengths,
    pub(super) output: Lengths,
    /// Fraction of each prompt, 0 to 1, that is a prefix common to all prompts.
    pub(super) shared_prefix: f64,
    pub(super) long: Option<LongMix>,
}

/// Independent streams of random numbers, one per purpose.
const PREFIX: u64 = 1;
const REQUEST: u64 = 2;
const ARRIVAL: u64 = 3;

impl Workload {
    /// Returns request `number` of `level`.
    pub(super) fn request(&self, level: u64, number: u64) -> Plan {
        let mut rng = random(self.seed, [REQUEST, level, number]);
        let long = self.long.filter(|mix| number % u64::from(mix.every) == u64::from(mix.every) - 1);
        let length =
            long.map_or_else(|| rng.random_range(self.prompt.min..=self.prompt.max), |mix| mix.tokens);
        let output_tokens = rng.random_range(self.output.min..=self.output.max);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a u32")]
        let shared = (f64::from(length) * self.shared_prefix) as u32;
        let mut prefix = random(self.seed, [PREFIX, 0, 0]);
        let token = |of: &mut StdRng| of.random_range(0..self.vocabulary);
        let prompt = (0..length).map(|i| token(if i < shared { &mut prefix } else { &mut rng })).collect();
        Plan { prompt, output_tokens, long: long.is_some() }
    }

    /// Returns arrival times since the level's start: a Poisson process of `rate` per second.
    pub(super) fn arrivals(&self, level: u64, rate: f64) -> impl Iterator<Item = Duration> + use<> {
        let mut rng = random(self.seed, [ARRIVAL, level, 0]);
        let mut at = 0.0;
        std::iter::repeat_with(move || {
            // The inverse of the exponential distribution; 1 - [0, 1) is never 0.
            at -= (1.0 - rng.random::<f64>()).ln() / rate;
            Duration::from_secs_f64(at)
        })
    }

    /// Returns the maximum number of tokens of a prompt and its answer.
    pub(super) fn tokens_max(&self) -> u64 {
        let prompt = self.long.map_or(0, |mix| mix.tokens).max(self.prompt.max);
        u64::from(prompt) + u64::from(self.output.max)
    }
}

/// Seeds a generator for one purpose; mixes the words of the key as `SplitMix64` mixes its state.
fn random(seed: u64, key: [u64; 3]) -> StdRng {
    let mixed = key.into_iter().fold(seed, |state, word| {
        let mut z = state.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    });
    StdRng::seed_from_u64(mixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        let long = Some(LongMix { tokens: 40, every: 4 });
        let (prompt, output) = ("8..16".parse().unwrap(), "3".parse().unwrap());
        Workload { seed: 7, vocabulary: 100, prompt, output, shared_prefix: 0.5, long }
    }

    #[test]
    fn lengths_are_a_number_or_a_range() {
        let parsed = ["64", "1..2", "3..3"].map(|text| text.parse::<Lengths>().unwrap().to_string());
        assert_eq!(parsed, ["64", "1..2", "3"]);
        for wrong in ["", "0", "0..4", "5..4", "..", "1..", "-1", "a"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_request_depends_on_seed_level_and_number_alone() {
        let workload = workload();
        assert_eq!(workload.request(0, 5), workload.request(0, 5));
        assert_ne!(workload.request(0, 5), workload.request(1, 5));
        assert_ne!(workload.request(0, 5), workload.request(0, 6));
        assert_ne!(workload.request(0, 5), Workload { seed: 8, ..workload.clone() }.request(0, 5));
    }

    #[test]
    fn lengths_stay_in_their_ranges_and_tokens_in_the_vocabulary() {
        let workload = workload();
        let plans: Vec<_> = (0..200).map(|number| workload.request(0, number)).collect();
        for (number, plan) in plans.iter().enumerate() {
            assert_eq!(plan.long, number % 4 == 3);
            assert!(if plan.long { plan.prompt.len() == 40 } else { (8..=16).contains(&plan.prompt.len()) });
            assert!(plan.prompt.iter().all(|token| *token < 100));
            assert_eq!(plan.output_tokens, 3);
        }
        let lengths = plans.iter().filter(|plan| !plan.long).map(|plan| plan.prompt.len());
        assert_eq!((lengths.clone().min(), lengths.max()), (Some(8), Some(16)));
        assert_eq!(workload.tokens_max(), 43);
    }

    #[test]
    fn prompts_share_their_beginning_and_nothing_else() {
        let long = None;
        let workload = Workload { prompt: Lengths { min: 64, max: 64 }, long, ..workload() };
        let [a, b] = [0, 1].map(|level| workload.request(level, 0).prompt);
        assert_eq!(a[..32], b[..32]);
        assert_ne!(a[32..40], b[32..40]);
        let none = Workload { shared_prefix: 0.0, ..workload.clone() };
        assert_ne!(none.request(0, 0).prompt[..8], none.request(0, 1).prompt[..8]);
        let all = Workload { shared_prefix: 1.0, ..workload };
        assert_eq!(all.request(0, 0).prompt, all.request(0, 1).prompt);
    }

    #[test]
    fn arrivals_are_a_poisson_process_of_the_rate() {
        let workload = workload();
        let times: Vec<_> = workload.arrivals(0, 50.0).take(5000).collect();
        assert!(times.is_sorted());
        let mean = times[4999].as_secs_f64() / 5000.0;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        // In an exponential distribution 1 - 1/e of the pauses are shorter than the mean.
        let short = times.windows(2).filter(|pair| (pair[1] - pair[0]).as_secs_f64() < 0.02).count();
        assert!((3000..3320).contains(&short), "{short}");
        assert_eq!(times[..9], workload.arrivals(0, 50.0).take(9).collect::<Vec<_>>());
        assert_ne!(times[0], workload.arrivals(1, 50.0).next().unwrap());
    }
}
