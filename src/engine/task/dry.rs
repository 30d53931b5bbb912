//! DRY ("don't repeat yourself"): which tokens would go on with a repetition, and the penalty on each. The
//! formula is that of its proposal (<https://github.com/oobabooga/text-generation-webui/pull/5677>), without
//! a limit of the length, as llama.cpp has it (`llama_sampler_dry`): a token that followed an earlier copy of
//! the last n tokens loses multiplier * base^(n - `allowed_length`), unless a breaker stands in that token.
//!
//! The copies are kept from token to token: only those that the new token followed go on, so that a token
//! costs as much as it has occurrences. A prompt is looked through once, in linear time, by the Z-function
//! (Gusfield, Algorithms on Strings, Trees, and Sequences, 1.3).

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::cache::Transcript;
use crate::engine::api::DrySampling;
use crate::text::Tokenizer;

/// Most that a logit loses: no logit outweighs it, and sums of many stay finite.
const PENALTY_MAX: f32 = 10_000.0;

/// What is known of the copies in a transcript, as far as it was read.
#[derive(Clone, Debug)]
pub(super) struct Dry {
    sampling: DrySampling,
    tokenizer: Tokenizer,
    /// Number of tokens that were read, and that had been when the window was last read whole.
    read: usize,
    fresh: usize,
    /// Places of each token in the window, ascending.
    places: HashMap<u32, VecDeque<usize>>,
    /// Earlier copies of the last tokens, by their ends, ascending.
    copies: Vec<Stretch>,
    /// The first token that a copy may have: the one after the last breaker.
    since: usize,
    /// The end of the text, as long as a breaker that is not complete.
    tail: Vec<u8>,
}

/// Some consecutive tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    /// The place after the last of them.
    end: usize,
    /// Their number, at least 1.
    length: usize,
}

impl Dry {
    /// Returns the state before the first token.
    pub(super) fn new(sampling: DrySampling, tokenizer: Tokenizer) -> Self {
        let (places, copies, tail) = (HashMap::new(), Vec::new(), Vec::new());
        Self { sampling, tokenizer, read: 0, fresh: 0, places, copies, since: 0, tail }
    }

    /// Returns what each token would lose after the transcript, which goes on from what was read.
    pub(super) fn penalties(&mut self, transcript: &Transcript) -> BTreeMap<u32, f32> {
        match transcript.len().saturating_sub(self.read) {
            0 => {}
            // Now and then, so that places out of the window are forgotten.
            1 if !self.is_stale() => transcript.last(1).for_each(|token| self.add(token)),
            _ => self.read_anew(transcript),
        }
        let allowed = self.sampling.allowed_length as usize;
        let mut longest = BTreeMap::new();
        for copy in self.copies.iter().filter(|copy| copy.length >= allowed) {
            for next in transcript.tokens(copy.end..copy.end + 1) {
                let length = longest.entry(next).or_insert(copy.length);
                *length = copy.length.max(*length);
            }
        }
        let repeats = longest.into_iter().filter(|(token, _)| !self.is_breaker(*token));
        repeats.map(|(token, length)| (token, self.penalty(length - allowed))).collect()
    }

    /// Returns whether a breaker stands in a token: structure may repeat itself.
    fn is_breaker(&self, token: u32) -> bool {
        let text = self.tokenizer.piece(token);
        let stands = |breaker: &String| text.windows(breaker.len()).any(|part| part == breaker.as_bytes());
        self.sampling.breakers.iter().any(stands)
    }

    fn penalty(&self, beyond: usize) -> f32 {
        let growth = self.sampling.base.powi(i32::try_from(beyond).unwrap_or(i32::MAX));
        (self.sampling.multiplier * growth).min(PENALTY_MAX)
    }

    /// Returns the first place of the window that ends at `len`.
    fn start(&self, len: usize) -> usize {
        match self.sampling.context_size {
            0 => 0,
            size => len.saturating_sub(size as usize),
        }
    }

    /// Returns whether as many tokens were read one by one as the window has.
    fn is_stale(&self) -> bool {
        let size = self.sampling.context_size as usize;
        size > 0 && self.read - self.fresh >= size
    }

    /// Reads one more token.
    fn add(&mut self, token: u32) {
        let (at, len) = (self.read, self.read + 1);
        let start = self.start(len);
        if self.breaks(token) {
            self.since = len;
        }
        let most = len - self.since;
        let places = self.places.entry(token).or_default();
        let gone = places.partition_point(|&place| place < start);
        places.drain(..gone);
        let mut before = self.copies.iter().peekable();
        let goes_on = places.iter().filter_map(|&place| {
            #[cfg(test)]
            tests::LOOKED_AT.with(|number| number.set(number.get() + 1));
            while before.next_if(|copy| copy.end < place).is_some() {}
            let so_far = before.next_if(|copy| copy.end == place).map_or(0, |copy| copy.length);
            let end = place + 1;
            let length = (so_far + 1).min(end - start).min(most);
            (length > 0).then_some(Stretch { end, length })
        });
        let copies = goes_on.collect();
        places.push_back(at);
        (self.copies, self.read) = (copies, len);
    }

    /// Reads the whole window.
    fn read_anew(&mut self, transcript: &Transcript) {
        let len = transcript.len();
        let start = self.start(len);
        let mut tokens: Vec<u32> = transcript.tokens(start..len).collect();
        self.places.clear();
        self.tail.clear();
        self.since = start;
        for (place, &token) in (start..).zip(&tokens) {
            self.places.entry(token).or_default().push_back(place);
            if self.breaks(token) {
                self.since = place + 1;
            }
        }
        let most = len - self.since;
        // What the reversed text has in common with its own beginning.
        tokens.reverse();
        let common = common_with_beginning(&tokens);
        let copy = |back: usize| Stretch { end: len - back, length: common[back].min(most) };
        self.copies = (1..tokens.len()).rev().map(copy).filter(|copy| copy.length > 0).collect();
        (self.read, self.fresh) = (len, len);
    }

    /// Returns whether a breaker ends in the text of a token, which goes on from those before.
    fn breaks(&mut self, token: u32) -> bool {
        let breakers = &self.sampling.breakers;
        let Some(longest) = breakers.iter().map(String::len).max() else { return false };
        let old = self.tail.len();
        self.tail.extend_from_slice(self.tokenizer.piece(token));
        let tail = &self.tail;
        let ends =
            |breaker: &String| (old..tail.len()).any(|last| tail[..=last].ends_with(breaker.as_bytes()));
        let breaks = breakers.iter().any(ends);
        let gone = self.tail.len().saturating_sub(longest - 1);
        self.tail.drain(..gone);
        breaks
    }
}

/// Returns for each place how many tokens from there on are those of the beginning.
fn common_with_beginning(tokens: &[u32]) -> Vec<usize> {
    let mut common = vec![0; tokens.len()];
    // The stretch that reaches farthest of those that are known to be like the beginning.
    let (mut from, mut to) = (0, 0);
    for place in 1..tokens.len() {
        let mut length = if place < to { common[place - from].min(to - place) } else { 0 };
        while place + length < tokens.len() && tokens[length] == tokens[place + length] {
            #[cfg(test)]
            tests::LOOKED_AT.with(|number| number.set(number.get() + 1));
            length += 1;
        }
        if place + length > to {
            (from, to) = (place, place + length);
        }
        common[place] = length;
    }
    common
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::{Arc, LazyLock};

    use proptest::prelude::*;

    use super::*;

    thread_local! {
        /// Number of places that were looked at on this thread.
        pub(super) static LOOKED_AT: Cell<usize> = const { Cell::new(0) };
    }

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(crate::engine::tests::tokenizer);

    fn dry(allowed_length: u32, context_size: u32, breakers: &[&str]) -> Dry {
        let breakers: Arc<[String]> = breakers.iter().map(ToString::to_string).collect();
        let sampling = DrySampling { multiplier: 0.8, base: 1.75, allowed_length, context_size, breakers };
        Dry::new(sampling, TOKENIZER.clone())
    }

    fn after(tokens: &[u32]) -> Transcript {
        Transcript::new(tokens.to_vec().into())
    }

    /// Returns the penalties by the definition: for every place, the longest copy that ends before it.
    fn defined(dry: &Dry, tokens: &[u32]) -> BTreeMap<u32, f32> {
        let DrySampling { multiplier, base, allowed_length, .. } = dry.sampling;
        let len = tokens.len();
        let start = dry.start(len);
        let text = |to: usize| {
            tokens[start..to].iter().flat_map(|&token| TOKENIZER.token_bytes(token)).collect::<Vec<u8>>()
        };
        let ends_in = |at: usize| {
            let (before, whole) = (text(at).len(), text(at + 1));
            let ends =
                |last: usize| dry.sampling.breakers.iter().any(|b| whole[..=last].ends_with(b.as_bytes()));
            (before..whole.len()).any(ends)
        };
        let since = (start..len).rev().find(|&at| ends_in(at)).map_or(start, |at| at + 1);
        let mut penalties = BTreeMap::new();
        for place in start + 1..len {
            let is_copy = |&n: &usize| tokens[place - n..place] == tokens[len - n..];
            let most = (place - start).min(len - since);
            let own = TOKENIZER.token_bytes(tokens[place]);
            let has = |b: &String| own.windows(b.len()).any(|part| part == b.as_bytes());
            if dry.sampling.breakers.iter().any(has) {
                continue;
            }
            let longest = (allowed_length as usize..=most).filter(is_copy).max();
            if let Some(n) = longest {
                let power = i32::try_from(n - allowed_length as usize).unwrap();
                let penalty: &mut f32 = penalties.entry(tokens[place]).or_insert(0.0);
                *penalty = penalty.max((multiplier * base.powi(power)).min(PENALTY_MAX));
            }
        }
        penalties
    }

    #[test]
    fn what_would_go_on_with_a_repetition_is_penalized_by_its_length() {
        let tokens = [101, 102, 103, 104, 105, 101, 102, 103];
        let penalties = dry(2, 0, &[]).penalties(&after(&tokens));
        assert_eq!(penalties, BTreeMap::from([(104, 0.8 * 1.75)]));
        assert_eq!(dry(3, 0, &[]).penalties(&after(&tokens)), BTreeMap::from([(104, 0.8)]));
        assert!(dry(4, 0, &[]).penalties(&after(&tokens)).is_empty(), "it is allowed");
        assert!(dry(2, 7, &[]).penalties(&after(&tokens)).contains_key(&104), "two tokens are in the window");
        assert!(dry(3, 7, &[]).penalties(&after(&tokens)).is_empty());
    }

    #[test]
    fn a_breaker_ends_what_counts_as_repeated() {
        let tokens = [101, 102, 103, 104, 105, 101, 102, 103];
        let length = |breaker: &str| {
            let lengths = (1..9).take_while(|length| {
                let breakers = [breaker];
                let breakers: &[&str] = if breaker.is_empty() { &[] } else { &breakers };
                !dry(*length, 0, breakers).penalties(&after(&tokens)).is_empty()
            });
            lengths.count()
        };
        assert_eq!([length(""), length("t101"), length("t102"), length("103")], [3, 2, 1, 0]);
        assert_eq!(length("1 t10"), 1, "one that begins in a token and ends in the next");
        assert_eq!(length("t101 t103"), 3, "one that is nowhere");
    }

    #[test]
    fn a_breaker_itself_may_repeat() {
        let tokens = [101, 102, 103, 101, 102];
        assert!(dry(2, 0, &[]).penalties(&after(&tokens)).contains_key(&103));
        assert!(dry(2, 0, &["103"]).penalties(&after(&tokens)).is_empty());
        assert!(dry(2, 0, &["2 t103"]).penalties(&after(&tokens)).contains_key(&103), "it only ends in it");
    }

    #[test]
    fn no_penalty_is_beyond_what_sums_can_take() {
        let penalties = dry(1, 0, &[]).penalties(&after(&[107; 5000]));
        assert_eq!(penalties, BTreeMap::from([(107, PENALTY_MAX)]));
    }

    #[test]
    fn neither_a_prompt_nor_a_token_costs_more_than_linear_time() {
        // The worst there is: every token is like every other.
        let tokens = vec![107; 4000];
        let mut dry = dry(2, 0, &[]);
        LOOKED_AT.set(0);
        dry.penalties(&after(&tokens[..3000]));
        assert!(LOOKED_AT.get() <= 3000, "{}", LOOKED_AT.get());
        for len in 3001..=4000 {
            LOOKED_AT.set(0);
            dry.penalties(&after(&tokens[..len]));
            assert!(LOOKED_AT.get() < len);
        }
        // What did not occur before costs nothing.
        LOOKED_AT.set(0);
        dry.penalties(&after(&[&tokens[..], &[108]].concat()));
        assert_eq!(LOOKED_AT.get(), 0);
    }

    proptest! {
        #[test]
        fn penalties_are_as_defined_however_the_tokens_come(
            tokens in prop::collection::vec(100..103u32, 1..60),
            steps in prop::collection::vec(1..4usize, 60),
            allowed_length in 1..4u32,
            context_size in prop_oneof![Just(0), 1..20u32],
            breaker in prop::sample::select(vec![vec![], vec!["t102"], vec!["t101 t1", "zz"]]),
        ) {
            let mut kept = dry(allowed_length, context_size, &breaker);
            let mut len = 0;
            for step in steps {
                len = (len + step).min(tokens.len());
                let transcript = after(&tokens[..len]);
                let expected = defined(&kept, &tokens[..len]);
                prop_assert_eq!(kept.penalties(&transcript), expected.clone());
                let anew = dry(allowed_length, context_size, &breaker).penalties(&transcript);
                prop_assert_eq!(anew, expected);
            }
        }
    }
}
