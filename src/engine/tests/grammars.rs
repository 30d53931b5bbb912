//! Outputs that obey grammars: each as it would be alone, ended where its grammar ends, and failed alone.

use super::*;
use crate::backend::fake::{among, drawn_token};
use crate::engine::task::uniform;
use crate::grammar::{Allowed, Grammar, GrammarLimits, Source, Vocabulary};
use crate::output::{Parser, Reasoning, Start, Syntax};

/// A token that ends outputs.
const END: u32 = 7;

/// Texts of one to nine words of three digits.
const WORDS: &str = "( t[1-9][0-9]{2}){1,9}";

pub(in crate::engine) fn grammar(tokenizer: &Tokenizer, regex: &str, ends: &[u32]) -> Arc<Grammar> {
    let vocabulary = Vocabulary::new(tokenizer, 1000, ends).unwrap();
    Arc::new(Grammar::compile(&vocabulary, &Source::Regex(regex.into()), &GrammarLimits::default()).unwrap())
}

/// Returns what a constrained output is alone, up to its end or `most` tokens; `draw` says what is drawn
/// after a context without the grammar.
pub(in crate::engine) fn constrained_by(
    grammar: &Grammar,
    prompt: &[u32],
    (most, ends): (usize, &[u32]),
    draw: impl Fn(&[u32]) -> u32,
) -> Vec<u32> {
    let (mut matcher, mut context) = (grammar.matcher(), prompt.to_vec());
    while context.len() < prompt.len() + most {
        let Allowed::Tokens(allowed) = matcher.allowed().unwrap() else { break };
        let token = among(draw(&context), &allowed);
        context.push(token);
        if ends.contains(&token) {
            break;
        }
        matcher.advance(token).unwrap();
    }
    context.split_off(prompt.len())
}

/// The same of a greedy one.
fn constrained(grammar: &Grammar, prompt: &[u32], most: usize) -> Vec<u32> {
    constrained_by(grammar, prompt, (most, &[END]), next_token)
}

/// Returns what outputs obey from their beginning.
pub(in crate::engine) fn constraint(grammar: &Arc<Grammar>) -> Constraint {
    Constraint { grammar: Arc::clone(grammar), starts: Starts::Immediately }
}

impl Bench {
    fn constrained(
        &mut self,
        grammar: &Arc<Grammar>,
        prompt: &[u32],
        max_tokens: u32,
        change: impl FnOnce(&mut GenerateWork),
    ) -> Events {
        let (mut work, events) = self.work(prompt, max_tokens);
        work.constraint = Some(constraint(grammar));
        work.stopping.stop_token_ids = vec![END];
        change(&mut work);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    /// Submits a request of somebody else that goes before the others.
    fn interactive(&mut self, prompt: &[u32], max_tokens: u32) -> Events {
        let (mut work, events) = self.work(prompt, max_tokens);
        work.origin.priority = Priority::Interactive;
        work.origin.owner = self.origin("other").owner;
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }
}

#[test]
fn constrained_and_free_outputs_of_a_batch_are_as_they_are_alone() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, WORDS, &[END]);
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| prompt(seed, 20 + seed)).collect();
    let events: Vec<Events> = prompts
        .iter()
        .enumerate()
        .map(|(number, prompt)| {
            if number % 2 == 0 {
                bench.constrained(&grammar, prompt, 12, |_| {})
            } else {
                bench.submit(prompt, 12)
            }
        })
        .collect();
    bench.run();
    for ((number, prompt), events) in prompts.iter().enumerate().zip(events) {
        let outcome = drain(events);
        let expected = if number % 2 == 0 { constrained(&grammar, prompt, 12) } else { alone(prompt, 12) };
        assert_eq!(outcome.tokens, expected, "request {number}");
    }
}

#[test]
fn workers_change_nothing() {
    let run = |threads| {
        let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.mask_threads = threads);
        let grammar = grammar(&bench.tokenizer, WORDS, &[END]);
        let events: Vec<Events> =
            (0..8).map(|seed| bench.constrained(&grammar, &prompt(seed, 30), 20, |_| {})).collect();
        bench.run();
        events.into_iter().map(|events| drain(events).tokens).collect::<Vec<_>>()
    };
    assert_eq!(run(0), run(2));
}

#[test]
fn an_output_ends_where_its_grammar_does() {
    let mut bench = Bench::new();
    // With a token for the end it is drawn, without one the output just ends.
    for ends in [vec![END], vec![]] {
        let grammar = grammar(&bench.tokenizer, " t[1-9][0-9]{2} t500", &ends);
        let events = bench.constrained(&grammar, &prompt(1, 10), 50, |work| {
            work.stopping.stop_token_ids.clone_from(&ends);
        });
        bench.run();
        let outcome = drain(events);
        let end = outcome.end.unwrap();
        let finish = if ends.is_empty() { Finish::Complete } else { Finish::StopToken };
        assert_eq!((end.finish, end.tokens.len()), (finish, 2 + ends.len()));
        assert_eq!(end.tokens[1], 500);
    }
}

#[test]
fn max_tokens_cuts_a_structure_and_says_so() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, "( t[0-9]{3}){5}", &[END]);
    let events = bench.constrained(&grammar, &prompt(1, 10), 3, |_| {});
    bench.run();
    let end = drain(events).end.unwrap();
    assert_eq!((end.finish, end.tokens.len()), (Finish::Length, 3));
}

/// Constrains an output to a word that `work` begins after reasoning, which these tokens open and close.
fn reasoning_first(work: &mut GenerateWork, (open, close): (u32, u32), start: Start) {
    let tokenizer = tokenizer_with(&[(open, "<think>"), (close, "</think>")]);
    work.detokenizer = tokenizer.detokenizer();
    let syntax = Syntax { format: None, reasoning: Some(Reasoning::Think) };
    let parser = Parser::new(syntax, [].into(), start);
    work.reading = Some(Box::new(Reading { parser, calls: false, one_call: false, budget: None }));
    let opening = if start == Start::Text { [open].into() } else { [].into() };
    let barred = Arc::new(Barred { ends: vec![END], closing: vec![] });
    work.constraint.as_mut().unwrap().starts = Starts::AfterReasoning { opening, barred };
}

/// Returns whether an output obeys the grammar of a word from here on.
fn is_word(tokens: &[u32]) -> bool {
    tokens.first() == Some(&500) && tokens.iter().all(|token| [500, END].contains(token))
}

#[test]
fn a_grammar_begins_where_reasoning_ends() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, "( t500)+", &[END]);
    let (free, asked) = (alone(&prompt(3, 10), 30), prompt(3, 10));
    let events = bench.constrained(&grammar, &asked, 30, |work| {
        reasoning_first(work, (600, free[4]), Start::Reasoning);
    });
    bench.run();
    let tokens = drain(events).tokens;
    assert_eq!(tokens[..5], free[..5]);
    assert!(is_word(&tokens[5..]), "{tokens:?}");
}

#[test]
fn nothing_of_an_answer_comes_unseen_behind_its_reasoning() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, "( t500)+", &[END]);
    let (free, asked) = (alone(&prompt(3, 10), 30), prompt(3, 10));
    // The two that would come there end the reasoning, and bring more with it.
    let events = bench.constrained(&grammar, &asked, 30, |work| {
        let tokenizer = tokenizer_with(&[(free[4], "</thi"), (free[5], "nk>x")]);
        work.detokenizer = tokenizer.detokenizer();
        let syntax = Syntax { format: None, reasoning: Some(Reasoning::Think) };
        let parser = Parser::new(syntax, [].into(), Start::Reasoning);
        work.reading = Some(Box::new(Reading { parser, calls: false, one_call: false, budget: None }));
        let mut closing = vec![vec![]; 8];
        closing[5].push(free[5]);
        let barred = Arc::new(Barred { ends: vec![END], closing });
        work.constraint.as_mut().unwrap().starts = Starts::AfterReasoning { opening: [].into(), barred };
    });
    bench.run();
    let tokens = drain(events).tokens;
    assert_eq!(tokens[..5], free[..5]);
    assert_ne!(tokens[5], free[5]);
    assert_eq!(tokens.len(), 30, "it goes on to reason");
}

#[test]
fn a_budget_ends_reasoning_that_is_part_of_a_grammar() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, "( t[1-9][0-9]{2})+", &[END]);
    let asked = prompt(3, 10);
    let events = bench.constrained(&grammar, &asked, 12, |work| {
        let syntax = Syntax { format: None, reasoning: Some(Reasoning::Think) };
        let parser = Parser::new(syntax, [].into(), Start::Reasoning);
        let budget = Some(ReasoningBudget { tokens: 3, closing: [700, 701].into() });
        work.reading = Some(Box::new(Reading { parser, calls: false, one_call: false, budget }));
    });
    bench.run();
    let tokens = drain(events).tokens;
    assert_eq!(tokens[..3], constrained(&grammar, &asked, 3));
    assert_eq!(tokens[3..5], [700, 701]);
}

#[test]
fn an_output_may_begin_with_reasoning_or_with_its_grammar() {
    let mut began = [0; 2];
    for seed in 0..12 {
        let mut bench = Bench::new();
        let grammar = grammar(&bench.tokenizer, "( t500)+", &[END]);
        let asked = prompt(seed, 10);
        let open = [&asked[..], &[600]].concat();
        let free = alone(&open, 4);
        let events = bench.constrained(&grammar, &asked, 20, |work| {
            reasoning_first(work, (600, free[2]), Start::Text);
        });
        bench.run();
        let tokens = drain(events).tokens;
        let thinks = tokens[0] == 600;
        began[usize::from(thinks)] += 1;
        if thinks {
            assert_eq!(tokens[1..4], free[..3]);
        }
        assert!(is_word(&tokens[if thinks { 4 } else { 0 }..]), "{tokens:?}");
    }
    assert!(began[0] > 0 && began[1] > 0, "{began:?}");
}

#[test]
fn a_grammar_that_fails_ends_its_own_output_only() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, WORDS, &[END]);
    let neighbour = bench.submit(&prompt(1, 10), 12);
    let failing = bench.constrained(&grammar, &prompt(2, 10), 12, |_| {});
    bench.ticks(4);
    bench.engine.masks.hold();
    bench.ticks(2);
    bench.engine.masks.fail_held();
    assert_eq!(bench.engine.masks.release(), 1);
    bench.run();
    assert!(matches!(drain(failing).end, Err(Error::GrammarTooComplex(_))));
    assert_eq!(drain(neighbour).tokens, alone(&prompt(1, 10), 12));
    // Its slot is free again.
    assert_eq!(bench.stats().models[0].running_sequences, 0);
}

#[test]
fn a_preempted_output_goes_on_where_it_was() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 1);
    let grammar = grammar(&bench.tokenizer, "( t[1-9][0-9]{2}){20}", &[END]);
    let asked = prompt(2, 10);
    let events = bench.constrained(&grammar, &asked, 20, |work| work.origin.priority = Priority::Background);
    bench.ticks(5);
    let other = bench.interactive(&prompt(1, 10), 4);
    bench.run();
    assert_eq!(drain(other).tokens, alone(&prompt(1, 10), 4));
    assert_eq!(drain(events).tokens, constrained(&grammar, &asked, 20));
}

#[test]
fn choices_of_a_prompt_obey_its_grammar_each_for_itself() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, WORDS, &[END]);
    let asked = prompt(4, 20);
    let (others, receivers): (Vec<_>, Vec<_>) = (1..4).map(|_| mpsc::channel(EVENTS)).unzip();
    let first = bench.constrained(&grammar, &asked, 12, |work| {
        (work.sampling.temperature, work.sampling.seed) = (1.0, 7);
        work.others = others;
    });
    bench.run();
    let mut different = std::collections::BTreeSet::new();
    for (number, events) in (0..).zip(std::iter::once(first).chain(receivers)) {
        let draw = |context: &[u32]| drawn_token(context, 1.0, uniform(7 + number, context.len() as u64));
        let expected = constrained_by(&grammar, &asked, (12, &[END]), draw);
        assert_eq!(drain(events).tokens, expected, "choice {number}");
        different.insert(expected);
    }
    assert_eq!(different.len(), 4, "each has its own random numbers");
}

/// Two constrained outputs and a free one, where the answers about the first ones are held back for a while.
fn held_back(state_bytes: u64) {
    let mut fake = Fake::default();
    fake.state_bytes = state_bytes;
    let mut bench = Bench::with(fake, 10_000_000, |_| {});
    let grammar = grammar(&bench.tokenizer, "( t[1-9][0-9]{2}){20}", &[END]);
    let prompts = [prompt(1, 12), prompt(2, 17)];
    let constrained_ones = prompts.each_ref().map(|prompt| bench.constrained(&grammar, prompt, 15, |_| {}));
    bench.ticks(5);
    bench.engine.masks.hold();
    bench.ticks(3);
    let mut neighbour = bench.submit(&prompt(3, 10), 12);
    bench.ticks(20);
    let came: usize = std::iter::from_fn(|| neighbour.try_recv().ok())
        .map(|event| if let GenerateEvent::Delta(delta) = event { delta.tokens.len() } else { 0 })
        .sum();
    assert_eq!(came, 12, "the neighbour goes on");
    assert_eq!(bench.engine.masks.release(), 2, "each asks once");
    bench.run();
    for (prompt, events) in prompts.iter().zip(constrained_ones) {
        assert_eq!(drain(events).tokens, constrained(&grammar, prompt, 15));
    }
}

#[test]
fn outputs_whose_masks_are_late_wait_alone_and_go_on_as_if_they_had_not() {
    held_back(0);
    held_back(40);
}

#[test]
fn time_in_a_queue_is_not_that_of_a_mask() {
    let mut bench = Bench::new();
    let grammar = grammar(&bench.tokenizer, "( t[1-9][0-9]{2}){20}", &[END]);
    let asked = prompt(1, 12);
    let [patient, failing] = [(); 2].map(|()| bench.constrained(&grammar, &asked, 15, |_| {}));
    let passes = |bench: &mut Bench| {
        bench.ticks(3);
        *bench.clock.0.lock().unwrap() += Duration::from_secs(61);
        bench.ticks(3);
    };
    bench.ticks(5);
    bench.engine.masks.hold();
    passes(&mut bench);
    assert_eq!(bench.engine.masks.release(), 2, "none has failed");
    bench.ticks(2);
    drop(patient);
    bench.engine.masks.hold();
    bench.ticks(2);
    bench.engine.masks.begin_held();
    passes(&mut bench);
    assert!(matches!(drain(failing).end, Err(Error::GrammarTooComplex(_))));
}

#[test]
fn an_output_that_waits_for_its_mask_can_be_preempted_and_abandoned() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = 1);
    let grammar = grammar(&bench.tokenizer, "( t[1-9][0-9]{2}){20}", &[END]);
    let asked = prompt(2, 10);
    let kept = bench.constrained(&grammar, &asked, 20, |work| work.origin.priority = Priority::Background);
    bench.ticks(5);
    bench.engine.masks.hold();
    bench.ticks(2);
    let other = bench.interactive(&prompt(1, 10), 4);
    bench.ticks(12);
    assert_eq!(drain(other).tokens, alone(&prompt(1, 10), 4));
    bench.engine.masks.release();
    bench.run();
    assert_eq!(drain(kept).tokens, constrained(&grammar, &asked, 20));
    bench.engine.masks.hold();
    let left = bench.constrained(&grammar, &asked, 20, |_| {});
    bench.ticks(6);
    drop(left);
    bench.run();
    assert!(bench.stats().models[0].slabs.iter().all(|class| class.slots_in_use == 0));
}

#[test]
fn a_dead_end_is_said_to_be_one() {
    let mut bench = Bench::new();
    // The tokens have three digits and no letters but t.
    let grammar = grammar(&bench.tokenizer, " t500( t501a| t502bb)", &[END]);
    let events = bench.constrained(&grammar, &prompt(1, 10), 9, |_| {});
    bench.run();
    assert!(
        matches!(drain(events).end, Err(Error::InvalidField { field, .. }) if field == "response_format")
    );
}
