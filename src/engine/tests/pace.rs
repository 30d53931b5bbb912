//! How long a stream waits for its next token, whatever other models do.

use super::*;

const DECODE: Duration = Duration::from_millis(100);
const TOKEN: Duration = Duration::from_millis(3);

/// Two models on a device that takes this time for a step, and for each prefilled token of it.
fn two_models() -> Bench {
    let mut bench = Bench::with(Fake::default(), 100_000_000, |settings| {
        settings.prefill_chunk_tokens = 512;
        settings.prefill_step = Duration::from_millis(500);
        settings.prefill_stretch_percent = 250;
    });
    let clock = Arc::clone(&bench.clock);
    bench.engine.backend.pass =
        Some(Box::new(move |prefilled| *clock.0.lock().unwrap() += DECODE + TOKEN * prefilled));
    let (sender, _events) = mpsc::channel(8);
    bench.engine.command(Command::Load(LoadWork::new(spec("other"), sender)));
    bench.run();
    bench
}

impl Bench {
    fn ask_model(&mut self, model: &str, prompt: &[u32], max_tokens: u32) -> Events {
        let (mut work, events) = self.work(prompt, max_tokens);
        work.model = self.lease(model);
        self.engine.command(Command::Generate(Box::new(work)));
        events
    }

    /// Ticks; returns the times between the deltas of a stream.
    fn gaps(&mut self, events: &mut Events, ticks: u32) -> Vec<Duration> {
        let (mut gaps, mut last) = (Vec::new(), None);
        for _ in 0..ticks {
            self.engine.tick();
            while let Ok(event) = events.try_recv() {
                if let GenerateEvent::Delta(_) = event {
                    let now = self.clock.now();
                    gaps.extend(last.map(|last| now - last));
                    last = Some(now);
                }
            }
        }
        gaps
    }
}

#[test]
fn a_prompt_of_another_model_delays_a_stream_no_more_than_one_of_its_own() {
    for (stream, other) in [("m", "other"), ("other", "m"), ("m", "m")] {
        let mut bench = two_models();
        let mut events = bench.ask_model(stream, &prompt(1, 20), 2000);
        let quiet = bench.gaps(&mut events, 20);
        assert!(quiet.iter().all(|gap| *gap == DECODE), "{quiet:?}");
        let mut prompts: Vec<Events> =
            (2..6).map(|seed| bench.ask_model(other, &prompt(seed, 3000), 1)).collect();
        // What a token costs is learned from the first.
        bench.gaps(&mut events, 8);
        let mut gaps = bench.gaps(&mut events, 60);
        gaps.sort_unstable();
        // Another model's step, if it only prefills, has a time of its own.
        let most = DECODE * 5 / 2 + if stream == other { Duration::ZERO } else { DECODE };
        assert!(gaps[gaps.len() * 95 / 100] <= most + TOKEN, "{stream} beside {other}: {gaps:?}");
        assert!(prompts.iter_mut().any(|prompt| prompt.try_recv().is_ok()), "the prompts move on");
    }
}

#[test]
fn prompts_of_two_models_share_the_time_beside_a_stream() {
    let mut bench = two_models();
    let mut events = bench.ask_model("m", &prompt(1, 20), 2000);
    bench.gaps(&mut events, 20);
    let mut long = [bench.ask_model("m", &prompt(2, 3000), 1), bench.ask_model("other", &prompt(3, 3000), 1)];
    bench.gaps(&mut events, 8);
    let mut gaps = bench.gaps(&mut events, 100);
    gaps.sort_unstable();
    assert!(gaps[95] <= DECODE * 5 / 2 + DECODE + TOKEN, "{gaps:?}");
    let done = long.each_mut().map(|events| {
        let done = std::iter::from_fn(|| events.try_recv().ok()).filter_map(|event| match event {
            GenerateEvent::Progress { done_tokens } => Some(done_tokens),
            _ => None,
        });
        done.last().unwrap_or(0)
    });
    assert!(done.iter().all(|done| *done > 800), "both move on: {done:?}");
}
