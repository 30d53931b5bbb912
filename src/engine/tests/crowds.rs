//! Requests of three models in a budget that does not hold all that they want, and that may shrink: whoever
//! has begun ends as promised, and nobody is refused who only has to wait.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::backend::fake::{KV_BYTES, WEIGHT_BYTES};
use crate::ids::ModelName;

const MODELS: [&str; 3] = ["a", "b", "c"];
const PROMPT: [u32; 3] = [1, 2, 3];

#[derive(Clone, Debug)]
struct Ask {
    model: usize,
    max_tokens: u32,
    priority: Priority,
    /// Ticks until the next one.
    pause: usize,
    /// The budget from then on, in parts of 8 of the first one.
    shrinks_to: Option<u64>,
}

fn ask() -> impl Strategy<Value = Ask> {
    let priority = prop::sample::select(vec![Priority::Background, Priority::Normal, Priority::Interactive]);
    let max_tokens = prop::sample::select(vec![9, 200, 300, 700]);
    let shrinks = prop_oneof![5 => Just(None), 1 => (1..8_u64).prop_map(Some)];
    (0..MODELS.len(), max_tokens, priority, 0..40_usize, shrinks).prop_map(
        |(model, max_tokens, priority, pause, shrinks_to)| Ask {
            model,
            max_tokens,
            priority,
            pause,
            shrinks_to,
        },
    )
}

/// Bytes of the slot that a request ends in.
fn needed(ask: &Ask) -> u64 {
    u64::from((3 + ask.max_tokens).max(256).next_power_of_two()) * KV_BYTES
}

/// A bench with all models loaded, and `kv_bytes` of room to spare.
fn with(weights: &[u64], kv_bytes: u64, places: u32) -> Bench {
    let mut fake = Fake::default();
    fake.weights =
        MODELS.iter().zip(weights).map(|(&model, &bytes)| (ModelName::from(model), bytes)).collect();
    let settings = EngineSettings { running_sequences_max: places, ..settings() };
    let clock = Arc::new(HandClock::default());
    let budget = weights.iter().sum::<u64>() + kv_bytes;
    let engine = Engine::new(fake, clock.clone(), settings, budget);
    let mut bench = Bench { engine, clock, tokenizer: tokenizer() };
    MODELS.iter().for_each(|model| bench.have(model).unwrap());
    bench
}

/// Returns whether a request can never have room, and whether it has none beside all models that others use.
fn refusals(weights: &[u64], budget: u64, asks: &[(Ask, Events)], place: usize) -> (bool, bool) {
    let (ask, _) = &asks[place];
    let own = weights[ask.model] + needed(ask);
    let others: BTreeSet<usize> = asks.iter().map(|(other, _)| other.model).collect();
    let others = others.into_iter().filter(|&model| model != ask.model).map(|model| weights[model]);
    (own > budget, own + others.sum::<u64>() > budget)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn who_has_begun_ends_as_promised_and_who_only_has_to_wait_is_not_refused(
        weights in prop::collection::vec(1..7_u64, MODELS.len()),
        kv_tokens in prop::sample::select(vec![256_u64, 600, 1100, 2100]),
        places in 1..4_u32,
        asks in prop::collection::vec(ask(), 1..9),
    ) {
        let weights: Vec<u64> = weights.into_iter().map(|weight| weight * WEIGHT_BYTES).collect();
        let mut bench = with(&weights, kv_tokens * KV_BYTES, places);
        let first = bench.engine.budget_bytes;
        let (mut least, mut asked) = (first, Vec::new());
        for ask in asks {
            bench.pass(Duration::from_millis(10));
            if let Some(parts) = ask.shrinks_to {
                least = least.min(first * parts / 8);
                bench.configure(|settings| settings.memory_budget_bytes = Some(least));
            }
            let model = MODELS[ask.model];
            if bench.engine.models.contains_key(&ModelName::from(model)) {
                let (mut work, events) = bench.work_on(model);
                work.prompt = PROMPT.to_vec().into();
                work.stopping.max_tokens = ask.max_tokens;
                work.origin.priority = ask.priority;
                bench.engine.command(Command::Generate(Box::new(work)));
                asked.push((ask.clone(), events));
            }
            bench.ticks(ask.pause);
        }
        bench.run();
        for place in 0..asked.len() {
            let (is_too_large, is_crowded) = refusals(&weights, least, &asked, place);
            let (ask, events) = &mut asked[place];
            let (mut started, mut tokens, mut end) = (false, vec![], None);
            while let Ok(event) = events.try_recv() {
                match event {
                    GenerateEvent::Started { .. } => started = true,
                    GenerateEvent::Progress { .. } => {}
                    GenerateEvent::Delta(delta) => tokens.extend(delta.tokens),
                    GenerateEvent::Ended(outcome) => end = Some(outcome),
                }
            }
            match end.unwrap() {
                Ok(_) => prop_assert_eq!(tokens, alone(&PROMPT, ask.max_tokens as usize)),
                Err(Error::KvTooLarge { .. }) => prop_assert!(!started && is_too_large),
                Err(Error::KvCrowded { .. }) => prop_assert!(!started && is_crowded),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
        bench.ticks(1);
        prop_assert!(bench.engine.used_bytes() <= least);
    }
}

/// Asks, in turn, for tokens of models; returns which requests ended well.
fn ends(bench: &mut Bench, asks: [(&str, u32); 3]) -> [bool; 3] {
    let asked = asks.map(|(model, max_tokens)| {
        bench.pass(Duration::from_millis(10));
        let (mut work, events) = bench.work_on(model);
        work.stopping.max_tokens = max_tokens;
        bench.engine.command(Command::Generate(Box::new(work)));
        events
    });
    bench.run();
    asked.map(|events| drain(events).end.is_ok())
}

#[test]
fn an_idle_model_goes_for_who_passes_one_that_waits_for_models() {
    // The second waits for `b`; the third, of `b`, has room only without `c`, which nobody uses. Once it
    // runs, a later call keeps `b` in use.
    let mut bench = with(&[WEIGHT_BYTES, 2 * WEIGHT_BYTES, 3 * WEIGHT_BYTES], 600 * KV_BYTES, 1);
    assert_eq!(ends(&mut bench, [("b", 200), ("a", 700), ("b", 300)]), [true, false, true]);
}

#[test]
fn of_three_that_wait_for_any_of_the_others_one_is_refused() {
    let mut bench = with(&[3 * WEIGHT_BYTES; 3], 400 * KV_BYTES, 1);
    assert_eq!(ends(&mut bench, [("a", 300), ("b", 300), ("c", 300)]), [true, true, false]);
}
