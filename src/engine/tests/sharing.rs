//! How requests share a model: places, priority, deadlines, and readers that do not read.

use std::collections::BTreeMap;

use super::*;
use crate::backend::fake::{KV_BYTES, WEIGHT_BYTES};

impl Bench {
    pub(super) fn ask(
        &mut self,
        client: &str,
        priority: Priority,
        tokens: u32,
        change: impl Fn(&mut GenerateWork),
    ) -> Events {
        let (mut work, events) = self.work(&prompt(tokens, 20), tokens);
        work.origin = WorkOrigin { priority, ..self.origin(client) };
        change(&mut work);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    pub(super) fn pass(&mut self, time: Duration) {
        *self.clock.0.lock().unwrap() += time;
    }
}

fn with_places(places: u32) -> Bench {
    Bench::with(Fake::default(), 10_000_000, |settings| settings.running_sequences_max = places)
}

/// Returns whether it runs or ran.
fn has_started(events: &mut Events) -> bool {
    matches!(events.try_recv(), Ok(GenerateEvent::Started { .. }))
}

#[test]
fn clients_share_places_whatever_they_ask_for() {
    let mut bench = with_places(6);
    let mut outstanding: Vec<(&str, Events, u64)> = Vec::new();
    let mut tokens: BTreeMap<&str, usize> = BTreeMap::new();
    let mut waits = Vec::new();
    for tick in 0..6000 {
        for (client, count) in [("one", 1), ("four", 4), ("sixteen", 16)] {
            while outstanding.iter().filter(|(whose, ..)| *whose == client).count() < count {
                let events =
                    bench.ask(client, Priority::Normal, 24 + u32::try_from(tick % 8).unwrap(), |_| {});
                outstanding.push((client, events, tick));
            }
        }
        bench.ticks(1);
        let running = bench.stats().models[0].running_sequences;
        assert!(tick == 0 || running >= 5, "tick {tick}: {running} of 6 run");
        outstanding.retain_mut(|(client, events, since)| {
            while let Ok(event) = events.try_recv() {
                match event {
                    GenerateEvent::Started { .. } if *client == "one" => waits.push(tick - *since),
                    GenerateEvent::Delta(delta) => *tokens.entry(client).or_default() += delta.tokens.len(),
                    GenerateEvent::Ended(outcome) => {
                        outcome.unwrap();
                        return false;
                    }
                    GenerateEvent::Started { .. } | GenerateEvent::Progress { .. } => {}
                }
            }
            true
        });
    }
    waits.sort_unstable();
    assert!(waits[waits.len() * 95 / 100] <= 2, "{waits:?}");
    #[allow(clippy::cast_precision_loss, reason = "small counts")]
    let ratio = tokens["four"] as f64 / tokens["sixteen"] as f64;
    assert!((0.95..1.05).contains(&ratio), "{tokens:?}");
}

#[test]
fn a_preempted_sequence_continues_where_it_was() {
    let mut bench = with_places(2);
    let runs: Vec<Events> = (0..2).map(|_| bench.ask("a", Priority::Normal, 60, |_| {})).collect();
    bench.ticks(20);
    let mut other = bench.ask("b", Priority::Normal, 30, |_| {});
    bench.ticks(2);
    assert!(has_started(&mut other));
    bench.run();
    assert_eq!(bench.stats().counters.preemptions_total, 1);
    for events in runs {
        let outcome = drain(events);
        assert_eq!(outcome.tokens, alone(&prompt(60, 20), 60));
        assert_eq!(outcome.cached, 0, "it starts once");
    }
    let stats = bench.stats();
    // Two prompts of 20 tokens and a third; what was parked is not run again.
    assert_eq!(stats.counters.prefill_tokens_total, 60);
    assert_eq!((stats.counters.finished_total, stats.models[0].kv_reserved_bytes), (3, 0));
}

#[test]
fn a_preempted_sequence_is_not_slow_when_its_reader_reads() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| {
        settings.running_sequences_max = 1;
        settings.priority_ageing = Duration::from_secs(1000);
    });
    let (mut work, _) = bench.work(&prompt(1, 20), 400);
    let (events, mut reader) = mpsc::channel(4);
    work.events = events;
    work.origin.priority = Priority::Background;
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(60);
    let first = bench.ask("b", Priority::Interactive, 1000, |_| {});
    bench.ticks(2);
    let mut seen = Vec::new();
    for _ in 0..200 {
        while let Ok(event) = reader.try_recv() {
            match event {
                GenerateEvent::Delta(delta) => seen.extend(delta.tokens),
                GenerateEvent::Ended(end) => assert!(end.is_ok()),
                GenerateEvent::Started { .. } | GenerateEvent::Progress { .. } => {}
            }
        }
        bench.pass(Duration::from_secs(1));
        bench.ticks(10);
    }
    assert_eq!(drain(first).tokens.len(), 1000);
    assert_eq!(seen, alone(&prompt(1, 20), 400));
}

#[test]
fn a_sequence_that_can_run_alone_is_not_refused_for_the_slot_it_begins_in() {
    // Room for a slot of 1024 tokens, but not for one of 256 beside it.
    let mut bench = Bench::with(Fake::default(), WEIGHT_BYTES + 1100 * KV_BYTES, |_| {});
    let fits = bench.submit(&prompt(1, 20), 900);
    bench.run();
    assert_eq!(drain(fits).tokens, alone(&prompt(1, 20), 900));
    let refused = bench.submit(&prompt(1, 20), 1100);
    assert!(matches!(drain_after(&mut bench, refused), Err(Error::KvTooLarge { .. })));
}

fn drain_after(bench: &mut Bench, events: Events) -> Result<Generated, Error> {
    bench.run();
    drain(events).end
}

#[test]
fn background_is_preempted_for_interactive_and_rises_with_waiting() {
    let mut bench = with_places(1);
    let mut background = bench.ask("a", Priority::Background, 2000, |_| {});
    bench.ticks(3);
    assert!(has_started(&mut background));
    let first = bench.ask("b", Priority::Interactive, 5, |_| {});
    let mut waiting = bench.ask("c", Priority::Background, 5, |_| {});
    bench.ticks(10);
    assert_eq!(drain(first).tokens.len(), 5);
    bench.pass(Duration::from_secs(20));
    let mut late = bench.ask("d", Priority::Interactive, 5, |_| {});
    bench.ticks(2);
    assert!(has_started(&mut waiting), "it has waited for two classes");
    assert!(!has_started(&mut late));
    bench.run();
    assert_eq!(bench.stats().counters.finished_total, 4);
}

#[test]
fn a_client_with_too_many_waiting_is_refused_and_others_are_not() {
    let mut bench =
        Bench::with(Fake::default(), 10_000_000, |settings| settings.queue_length_per_client_max = 1);
    let waiting = bench.ask("a", Priority::Normal, 1, |_| {});
    let refused = bench.ask("a", Priority::Normal, 1, |_| {});
    let other = bench.ask("b", Priority::Normal, 1, |_| {});
    let refusal = drain(refused).end;
    assert!(matches!(refusal, Err(Error::QueueFull { limit: "queue_length_per_client_max", value: 1, .. })));
    bench.run();
    assert!(drain(waiting).end.is_ok() && drain(other).end.is_ok());
    assert_eq!(bench.stats().counters.refused_total, 1);
}

#[test]
fn a_deadline_out_of_reach_is_refused_at_once_but_not_permanently() {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |settings| settings.prefill_chunk_tokens = 64);
    let taught = bench.ask("a", Priority::Normal, 10, |work| work.prompt = prompt(1, 1000).into());
    // Each tick takes a second, so each prompt token about a sixtieth of one.
    while !bench.engine.is_idle() {
        bench.ticks(1);
        bench.pass(Duration::from_secs(1));
    }
    drop(taught);
    let ask = |bench: &mut Bench, seconds| {
        let deadline = Some(bench.clock.now().after(Duration::from_secs(seconds)));
        bench.ask("a", Priority::Normal, 1, |work| {
            work.prompt = prompt(9, 2000).into();
            work.origin.deadline = deadline;
        })
    };
    let refused = ask(&mut bench, 10);
    assert!(matches!(drain(refused).end, Err(Error::DeadlineUnmeetable { .. })));
    // The device may be faster by now: a request has to try.
    let tries = (0..20).map(|_| ask(&mut bench, 10)).collect::<Vec<_>>();
    let fine = ask(&mut bench, 10_000);
    bench.run();
    let outcomes: Vec<bool> = tries.into_iter().map(|tried| drain(tried).end.is_ok()).collect();
    assert!(!outcomes[0] && outcomes[19], "{outcomes:?}");
    assert!(drain(fine).end.is_ok());
}

#[test]
fn a_reader_that_does_not_read_pauses_and_is_ended_and_others_run_on() {
    let mut bench = Bench::new();
    let (mut work, _) = bench.work(&prompt(1, 20), 2000);
    let (events, unread) = mpsc::channel(4);
    work.events = events;
    bench.engine.command(Command::Generate(Box::new(work)));
    bench.ticks(400);
    let stalled = bench.stats();
    assert_eq!(stalled.models[0].stalled_sequences, 1);
    assert!(!bench.engine.tick(), "nothing is left to do");
    let other = bench.ask("b", Priority::Normal, 50, |_| {});
    bench.ticks(60);
    assert_eq!(drain(other).tokens.len(), 50);
    bench.pass(Duration::from_secs(61));
    bench.run();
    let outcome = drain(unread);
    assert!(matches!(outcome.end, Err(Error::SlowReader { .. })));
    assert_eq!(
        outcome.tokens,
        alone(&prompt(1, 20), outcome.tokens.len()),
        "what came before the end is whole"
    );
    assert_eq!(bench.stats().models[0].slabs[0].slots_in_use, 0);
}

#[test]
fn a_slow_reader_loses_nothing() {
    let mut bench = Bench::new();
    let (mut work, _) = bench.work(&prompt(1, 20), 1000);
    let (events, mut slow) = mpsc::channel(4);
    work.events = events;
    bench.engine.command(Command::Generate(Box::new(work)));
    let mut tokens = vec![];
    while !bench.engine.is_idle() {
        bench.ticks(300);
        if let Ok(GenerateEvent::Delta(delta)) = slow.try_recv() {
            tokens.extend(delta.tokens);
        }
    }
    tokens.extend(drain(slow).tokens);
    assert_eq!(tokens, alone(&prompt(1, 20), 1000));
}

#[test]
fn invented_names_do_not_shut_others_out_of_the_queue() {
    let mut bench = Bench::with(Fake::default(), 10_000_000, |settings| {
        (settings.queue_length_max, settings.queue_length_per_client_max) = (12, 6);
    });
    let on =
        |connection| move |work: &mut GenerateWork| work.origin.owner.connection = ConnectionId(connection);
    // Two connections, each with a new name for every call, fill the queue.
    let mut flood: Vec<Events> = Vec::new();
    for number in 0..20 {
        flood.push(bench.ask(&format!("name-{number}"), Priority::Normal, 2, on(number % 2)));
    }
    let honest: Vec<Events> = (0..4).map(|_| bench.ask("honest", Priority::Normal, 2, on(7))).collect();
    let crowd: Vec<Events> =
        (0..6).map(|number| bench.ask(&format!("late-{number}"), Priority::Normal, 2, on(1))).collect();
    bench.run();
    assert!(honest.into_iter().all(|events| drain(events).end.is_ok()));
    let refused = |events: Vec<Events>| {
        let limit = |outcome: Outcome| match outcome.end {
            Ok(_) => None,
            Err(Error::QueueFull { limit, .. }) => Some(limit),
            Err(other) => panic!("{other}"),
        };
        events.into_iter().filter_map(|events| limit(drain(events))).collect::<Vec<_>>()
    };
    let of_flood = refused(flood);
    let count = |name: &str| of_flood.iter().filter(|limit| **limit == name).count();
    assert_eq!((count("queue_length_per_client_max"), count("queue_length_max")), (8, 4));
    assert_eq!(refused(crowd).len(), 6, "those who have most displace nobody");
}

/// Callers with always as many requests as given: connection, client, and number. Returns the tokens that
/// each got.
fn tokens_of_busy<const N: usize>(bench: &mut Bench, callers: [(u64, &str, usize); N]) -> [usize; N] {
    let mut open: [Vec<Events>; N] = std::array::from_fn(|_| vec![]);
    let mut tokens = [0; N];
    for tick in 0..3000 {
        for (at, (connection, client, count)) in callers.into_iter().enumerate() {
            while open[at].len() < count {
                let on = |work: &mut GenerateWork| work.origin.owner.connection = ConnectionId(connection);
                open[at].push(bench.ask(client, Priority::Normal, 24 + tick % 8, on));
            }
        }
        bench.ticks(1);
        for (tokens, open) in tokens.iter_mut().zip(&mut open) {
            open.retain_mut(|events| {
                while let Ok(event) = events.try_recv() {
                    match event {
                        GenerateEvent::Delta(delta) => *tokens += delta.tokens.len(),
                        GenerateEvent::Ended(outcome) => return outcome.is_err(),
                        GenerateEvent::Started { .. } | GenerateEvent::Progress { .. } => {}
                    }
                }
                true
            });
        }
    }
    tokens
}

#[allow(clippy::cast_precision_loss, reason = "small counts")]
fn ratio(one: usize, other: usize) -> f64 {
    one as f64 / other as f64
}

#[test]
fn a_connection_with_many_names_gets_what_one_with_one_name_gets() {
    let mut bench = with_places(6);
    let names: Vec<String> = (0..20).map(|number| format!("name-{number}")).collect();
    let flood: [_; 20] = std::array::from_fn(|number| (1, names[number].as_str(), 1));
    let callers: Vec<_> = flood.into_iter().chain([(2, "honest", 6)]).collect();
    let tokens = tokens_of_busy::<21>(&mut bench, callers.try_into().unwrap());
    let of_flood: usize = tokens[..20].iter().sum();
    assert!((0.9..1.1).contains(&ratio(of_flood, tokens[20])), "{tokens:?}");
    assert!(tokens.iter().all(|tokens| *tokens > 0), "each name gets some of it: {tokens:?}");
}

#[test]
fn two_clients_of_a_connection_share_what_it_gets() {
    let mut bench = with_places(6);
    let tokens = tokens_of_busy(&mut bench, [(1, "a", 12), (1, "b", 4), (2, "c", 2), (3, "d", 9)]);
    assert!((0.9..1.1).contains(&ratio(tokens[0], tokens[1])), "{tokens:?}");
    assert!((0.9..1.1).contains(&ratio(tokens[0] + tokens[1], tokens[3])), "{tokens:?}");
    assert!((0.9..1.1).contains(&ratio(tokens[2], tokens[3])), "{tokens:?}");
}

#[test]
fn invented_names_do_not_delay_the_prompt_of_another_connection() {
    let mut bench =
        Bench::with(Fake::default(), 1_000_000_000, |settings| settings.running_sequences_max = 32);
    let long = |connection, tokens| {
        move |work: &mut GenerateWork| {
            work.prompt = prompt(u32::try_from(connection).unwrap(), tokens).into();
            work.origin.owner.connection = ConnectionId(connection);
        }
    };
    let _flood: Vec<Events> = (0..20)
        .map(|number| bench.ask(&format!("name-{number}"), Priority::Normal, 1, long(1, 2000)))
        .collect();
    bench.ticks(5);
    let mut honest = bench.ask("honest", Priority::Normal, 1, long(2, 512));
    let mut ticks = 0;
    while !std::iter::from_fn(|| honest.try_recv().ok()).any(|event| matches!(event, GenerateEvent::Ended(_)))
    {
        bench.ticks(1);
        ticks += 1;
    }
    // Chunks of 16 tokens, every other one.
    assert!((32..70).contains(&ticks), "{ticks}");
}

#[test]
fn a_prompt_that_runs_rises_with_waiting() {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |_| {});
    let mut seed = 0;
    let mut ask = |bench: &mut Bench, client: &str, priority| {
        seed += 1;
        bench.ask(client, priority, 1, |work| work.prompt = prompt(seed, 500).into())
    };
    let mut waiting = ask(&mut bench, "a", Priority::Normal);
    bench.ticks(3);
    let clients = ["b", "c", "d"];
    let mut others: Vec<Events> = clients.map(|client| ask(&mut bench, client, Priority::Interactive)).into();
    let ended = |events: &mut Events| {
        std::iter::from_fn(|| events.try_recv().ok()).any(|event| matches!(event, GenerateEvent::Ended(_)))
    };
    for tick in 0..1000 {
        bench.ticks(1);
        bench.pass(Duration::from_millis(100));
        for (client, events) in clients.iter().zip(&mut others) {
            if ended(events) {
                *events = ask(&mut bench, client, Priority::Interactive);
            }
        }
        if ended(&mut waiting) {
            // Ten seconds until it rises, then a quarter of the steps.
            assert!((100..300).contains(&tick), "{tick}");
            return;
        }
    }
    panic!("the prompt starves behind those of a higher class");
}

#[test]
fn a_prompt_that_nobody_delays_does_not_rise() {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |settings| settings.prefill_chunk_tokens = 1);
    let _events = bench.ask("a", Priority::Background, 1, |work| work.prompt = prompt(1, 500).into());
    for _ in 0..100 {
        bench.ticks(1);
        bench.pass(Duration::from_secs(1));
    }
    let running = bench.engine.models.values().flat_map(|resident| resident.running.values());
    assert_eq!(running.map(|sequence| sequence.class).collect::<Vec<_>>(), [2]);
}
