//! The spans of a step: sequences that decode all run; what a step may prefill besides goes to the highest
//! priority class, and within it by rotation: to principals, to the connections of each, to the clients of
//! each of those.

use super::owner::Owner;
use super::shares::Shares;
use crate::backend::SpanKind;

/// A sequence that can run.
#[derive(Clone, Copy, Debug)]
pub struct Runnable<'a> {
    /// Its number.
    pub sequence: u64,
    /// Whose it is.
    pub owner: &'a Owner,
    /// Its priority class; 0 is the highest.
    pub class: u32,
    /// What its next span is for.
    pub kind: SpanKind,
    /// Number of its tokens that are not in its KV cache yet; at least one.
    pub pending: u32,
    /// Most tokens of it that one step may take.
    pub span_max: u32,
}

impl Runnable<'_> {
    /// Returns whether a user waits for its next token.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        match self.kind {
            SpanKind::Decode | SpanKind::Verify => true,
            SpanKind::Prefill => false,
        }
    }

    /// Returns whether it runs in every step, outside what a step may prefill. A prompt's last token does
    /// too: it costs a step no more than a token that decodes, and the first of the answer follows it.
    fn runs_always(&self) -> bool {
        self.is_decoding() || self.pending == 1
    }
}

/// Picks the spans of the next step: sequence and number of tokens. At most `prefill_tokens` go to sequences
/// that do not run always.
pub fn plan(shares: &mut Shares, runnable: &[Runnable<'_>], prefill_tokens: u32) -> Vec<(u64, u32)> {
    let always = runnable.iter().filter(|run| run.runs_always());
    let mut spans: Vec<(u64, u32)> = always.map(|run| (run.sequence, run.pending)).collect();
    let mut left = prefill_tokens;
    let mut first = None;
    for run in by_rotation(shares, runnable) {
        let tokens = run.pending.min(run.span_max).min(left);
        if tokens == 0 {
            break;
        }
        spans.push((run.sequence, tokens));
        left -= tokens;
        first.get_or_insert(run.owner);
    }
    first.into_iter().for_each(|owner| shares.turn(owner));
    spans
}

/// Returns what prefills: by class, then whose last turn is the longest ago.
fn by_rotation<'a, 'b>(shares: &Shares, runnable: &'b [Runnable<'a>]) -> Vec<&'b Runnable<'a>> {
    let mut order: Vec<_> = runnable.iter().filter(|run| !run.runs_always()).collect();
    order.sort_by_cached_key(|run| (run.class, shares.last_turns(run.owner)));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sched::owner::owner;

    /// Sequences with more than one token pending prefill, others decode.
    fn planned(shares: &mut Shares, runs: &[(u64, &str, u32, u32)], budget: u32) -> Vec<(u64, u32)> {
        let owners: Vec<Owner> = runs.iter().map(|(_, name, _, _)| owner(name)).collect();
        let runnable: Vec<Runnable<'_>> = runs
            .iter()
            .zip(&owners)
            .map(|(&(sequence, _, class, pending), owner)| Runnable {
                sequence,
                owner,
                class,
                kind: if pending > 1 { SpanKind::Prefill } else { SpanKind::Decode },
                pending,
                span_max: 512,
            })
            .collect();
        plan(shares, &runnable, budget)
    }

    /// All arrive in this order.
    fn shares(runs: &[(u64, &str, u32, u32)]) -> Shares {
        let mut shares = Shares::default();
        runs.iter().for_each(|(_, name, _, _)| shares.arrive(&owner(name)));
        shares
    }

    #[test]
    fn decoding_sequences_all_run_and_prefill_gets_the_budget() {
        let runs = [(1, "a", 1, 1), (2, "a", 1, 900), (3, "b", 2, 1)];
        assert_eq!(planned(&mut shares(&runs), &runs, 64), [(1, 1), (3, 1), (2, 64)]);
    }

    #[test]
    fn a_draft_runs_whole_in_every_step_and_so_does_the_last_token_of_a_prompt() {
        let owner = owner("a");
        let run = |sequence, kind, pending| Runnable {
            sequence,
            owner: &owner,
            class: 1,
            kind,
            pending,
            span_max: 512,
        };
        let runs = [run(1, SpanKind::Prefill, 9), run(2, SpanKind::Verify, 5), run(3, SpanKind::Prefill, 1)];
        assert_eq!(plan(&mut Shares::default(), &runs, 4), [(2, 5), (3, 1), (1, 4)]);
        assert_eq!(runs.map(|run| run.is_decoding()), [false, true, false]);
    }

    #[test]
    fn clients_rotate_at_prefill() {
        let runs = [(1, "a", 1, 900), (2, "a", 1, 900), (3, "b", 1, 900)];
        let mut shares = shares(&runs);
        assert_eq!(planned(&mut shares, &runs, 64), [(1, 64)]);
        assert_eq!(planned(&mut shares, &runs, 64), [(3, 64)]);
        assert_eq!(planned(&mut shares, &runs, 64), [(1, 64)]);
    }

    #[test]
    fn connections_rotate_at_prefill_and_within_their_turns_clients_do() {
        let runs = [(1, "a/x", 1, 900), (2, "a/y", 1, 900), (3, "a/z", 1, 900), (4, "b", 1, 900)];
        let mut shares = shares(&runs);
        let steps = (0..8).map(|_| planned(&mut shares, &runs, 64)[0].0);
        assert_eq!(steps.collect::<Vec<_>>(), [1, 4, 2, 4, 3, 4, 1, 4]);
    }

    #[test]
    fn who_comes_and_goes_does_not_keep_a_long_prompt_from_its_turn() {
        let long = (1, "long", 1, 9000);
        let mut shares = shares(&[long]);
        let mut turns = 0;
        for number in 0..30 {
            // Two at a time, always under another name and on another connection.
            let names = [0, 1].map(|more| format!("short-{}", number + more));
            names.iter().for_each(|name| shares.arrive(&owner(name)));
            let runs = [(2, names[0].as_str(), 1, 64), (3, names[1].as_str(), 1, 64), long];
            turns += u32::from(planned(&mut shares, &runs, 64)[0].0 == 1);
            shares.leave(&owner(&names[0]));
        }
        assert!(turns >= 10, "{turns} of 30");
    }

    #[test]
    fn a_higher_class_prefills_first_and_leaves_the_rest() {
        let runs = [(1, "a", 2, 900), (2, "b", 0, 10)];
        assert_eq!(planned(&mut shares(&runs), &runs, 64), [(2, 10), (1, 54)]);
    }
}
