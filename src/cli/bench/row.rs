//! The measurements: one sample per request, and one row that summarizes a level's samples.

use std::collections::BTreeMap;
use std::time::Duration;

use mlxd::clock::Moment;

use super::plan::Load;

/// Tokens that arrived together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: Moment,
    pub(super) tokens: u32,
}

/// The daemon's own figures for a successful request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) queue: Duration,
}

/// One request, measured at the client.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) long: bool,
    pub(super) start: Moment,
    pub(super) pieces: Vec<Piece>,
    /// The daemon's figures, or the reason of the failure.
    pub(super) outcome: Result<Done, String>,
}

impl Sample {
    fn time_to_first_token(&self) -> Option<Duration> {
        self.pieces.first().map(|piece| piece.at - self.start)
    }

    /// Returns the times between consecutive pieces, each with the arrival of the later one.
    fn gaps(&self) -> impl Iterator<Item = (Moment, Duration)> {
        self.pieces.windows(2).map(|pair| (pair[1].at, pair[1].at - pair[0].at))
    }
}

/// Percentiles of times, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
}

impl Spread {
    /// Computes the percentiles of `times`; None if there are none.
    pub(super) fn of(times: impl IntoIterator<Item = Duration>) -> Option<Self> {
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_unstable();
        let percentile = |percent| nearest_rank(&times, percent).map(|time| time.as_secs_f64());
        Some(Self { p50: percentile(50)?, p95: percentile(95)?, p99: percentile(99)? })
    }
}

/// Returns the smallest of the sorted values that at least `percent` % of them do not exceed.
fn nearest_rank<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (percent * sorted.len()).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Measurements of the long prompts of a mix, and of their effect on the other requests.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LongRow {
    pub(super) requests: usize,
    pub(super) time_to_first_token: Option<Spread>,
    /// Gaps of the other streams that overlap the prefill of a long prompt.
    pub(super) others_gaps_beside: Option<Spread>,
    /// Gaps of the other streams at all other times.
    pub(super) others_gaps_apart: Option<Spread>,
}

/// Results of one level of the sweep.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) load: Load,
    /// Successful requests, long ones included.
    pub(super) requests: usize,
    /// Failed requests by reason.
    pub(super) errors: BTreeMap<String, usize>,
    pub(super) wall_s: f64,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) cached_tokens: u64,
    /// Time to first token of requests that are not long.
    pub(super) time_to_first_token: Option<Spread>,
    /// Inter-token latency of requests that are not long.
    pub(super) inter_token_latency: Option<Spread>,
    /// Queue time of requests that are not long.
    pub(super) queue_time: Option<Spread>,
    pub(super) long: Option<LongRow>,
    /// Whether Ctrl-C ended the level early.
    pub(super) interrupted: bool,
}

impl Row {
    /// Summarizes the samples of a level that took `wall`.
    pub(super) fn new(load: Load, samples: &[Sample], wall: Duration, mixed: bool) -> Self {
        let mut errors = BTreeMap::new();
        let (mut requests, mut input_tokens, mut cached_tokens) = (0, 0, 0);
        for sample in samples {
            match &sample.outcome {
                Ok(done) => {
                    requests += 1;
                    input_tokens += u64::from(done.prompt_tokens);
                    cached_tokens += u64::from(done.cached_tokens);
                }
                Err(reason) => *errors.entry(reason.clone()).or_default() += 1,
            }
        }
        let (long, short): (Vec<_>, Vec<_>) =
            samples.iter().filter(|sample| sample.outcome.is_ok()).partition(|sample| sample.long);
        let queue = |sample: &&Sample| sample.outcome.as_ref().ok().map(|done| done.queue);
        let pieces = samples.iter().flat_map(|sample| &sample.pieces);
        Self {
            load,
            requests,
            errors,
            wall_s: wall.as_secs_f64(),
            input_tokens,
            output_tokens: pieces.map(|piece| u64::from(piece.tokens)).sum(),
            cached_tokens,
            time_to_first_token: Spread::of(short.iter().filter_map(|sample| sample.time_to_first_token())),
            inter_token_latency: Spread::of(
                short.iter().flat_map(|sample| sample.gaps()).map(|(_, gap)| gap),
            ),
            queue_time: Spread::of(short.iter().filter_map(queue)),
            long: mixed.then(|| LongRow::new(&long, &short)),
            interrupted: false,
        }
    }

    /// Returns generated tokens per second.
    pub(super) fn output_tokens_per_s(&self) -> f64 {
        per_second(self.output_tokens, self.wall_s)
    }

    /// Returns prompt tokens per second, cached ones included.
    pub(super) fn input_tokens_per_s(&self) -> f64 {
        per_second(self.input_tokens, self.wall_s)
    }
}

impl LongRow {
    fn new(long: &[&Sample], short: &[&Sample]) -> Self {
        let prefills: Vec<_> =
            long.iter().filter_map(|sample| Some((sample.start, sample.pieces.first()?.at))).collect();
        let beside = |end: Moment, gap: Duration| {
            let overlaps = |&(first, last): &(Moment, Moment)| first < end && end < last.after(gap);
            prefills.iter().any(overlaps)
        };
        let gaps = || short.iter().flat_map(|sample| sample.gaps());
        let those = |wanted: bool| {
            Spread::of(gaps().filter(|&(end, gap)| beside(end, gap) == wanted).map(|(_, gap)| gap))
        };
        Self {
            requests: long.len(),
            time_to_first_token: Spread::of(long.iter().filter_map(|sample| sample.time_to_first_token())),
            others_gaps_beside: those(true),
            others_gaps_apart: those(false),
        }
    }
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn sample(long: bool, start: u64, times: &[u64]) -> Sample {
        let pieces = times.iter().map(|at| Piece { at: Moment::at(ms(*at)), tokens: 1 }).collect();
        let done = Done { prompt_tokens: 10, cached_tokens: 4, queue: ms(1) };
        Sample { long, start: Moment::at(ms(start)), pieces, outcome: Ok(done) }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred: Vec<u32> = (1..=100).collect();
        assert_eq!([50, 95, 99, 100].map(|p| nearest_rank(&hundred, p).unwrap()), [50, 95, 99, 100]);
        assert_eq!([50, 95, 99].map(|p| nearest_rank(&[7], p).unwrap()), [7, 7, 7]);
        assert_eq!([50, 95].map(|p| nearest_rank(&[1, 2, 3, 4], p).unwrap()), [2, 4]);
        assert_eq!(nearest_rank::<u32>(&[], 50), None);
        // Unsorted times are sorted first.
        assert_eq!(Spread::of([ms(3), ms(1), ms(2)]).unwrap().p50, 0.002);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_row_adds_up_its_samples() {
        let mut failed = sample(false, 0, &[]);
        failed.outcome = Err("QUEUE_FULL".into());
        let samples = [sample(false, 0, &[20, 30, 50]), sample(false, 10, &[40, 60]), failed];
        let row = Row::new(Load::Closed(2), &samples, ms(500), false);
        assert_eq!((row.requests, row.errors["QUEUE_FULL"]), (2, 1));
        assert_eq!((row.input_tokens, row.cached_tokens, row.output_tokens), (20, 8, 5));
        assert_eq!((row.output_tokens_per_s(), row.input_tokens_per_s()), (10.0, 40.0));
        assert_eq!(row.time_to_first_token.unwrap().p95, 0.03);
        assert_eq!(row.inter_token_latency.unwrap().p50, 0.02);
        assert_eq!(row.queue_time.unwrap().p50, 0.001);
        assert_eq!(row.long, None);
        let empty = Row::new(Load::Open(1.0), &[], ms(0), false);
        assert_eq!((empty.output_tokens_per_s(), empty.time_to_first_token), (0.0, None));
    }

    #[test]
    fn gaps_beside_a_long_prefill_are_told_apart() {
        // The long prompt runs from 100 to 200: the gaps that end at 150 and 230 overlap it.
        let samples = [sample(true, 100, &[200, 201]), sample(false, 0, &[10, 30, 150, 230, 231])];
        let row = Row::new(Load::Closed(2), &samples, ms(300), true);
        let long = row.long.unwrap();
        assert_eq!((long.requests, long.time_to_first_token.unwrap().p50), (1, 0.1));
        let (beside, apart) = (long.others_gaps_beside.unwrap(), long.others_gaps_apart.unwrap());
        assert_eq!((beside.p50, beside.p99), (0.08, 0.12));
        assert_eq!((apart.p50, apart.p99), (0.001, 0.02));
        assert_eq!(row.time_to_first_token.unwrap().p99, 0.01, "the long one has its own");
    }
}
