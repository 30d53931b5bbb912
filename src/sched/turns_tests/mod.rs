//! Who decodes when, on a device whose steps take a time of their own: by examples, and for any rows.

mod any;
mod models;
mod one_model;

use std::collections::BTreeMap;
use std::time::Duration;

use super::owner::owner;
use super::*;
use crate::backend::SpanKind;
use crate::ids::ModelName;

const LIMITS: PaceLimits =
    PaceLimits { prefill_tokens_max: 512, stretch_percent: 230, step_max: Duration::from_millis(500) };

const BOUNDS: StepBounds = StepBounds {
    prefill_tokens_min: 8,
    prefill_tokens_max: LIMITS.prefill_tokens_max,
    stretch_percent: LIMITS.stretch_percent,
};

/// What a step takes, each row and each prefilled token of it, in milliseconds; and the factor by which every
/// third step takes longer.
#[derive(Clone, Copy, Debug)]
struct Costs {
    base: f64,
    row: f64,
    token: f64,
    noise: f64,
}

/// Four rows take 20 ms, 32 take 132 ms.
const CPU: Costs = Costs { base: 4.0, row: 4.0, token: 4.0, noise: 1.0 };
const GPU: Costs = Costs { base: 6.0, row: 0.02, token: 0.1, noise: 1.3 };

/// A sequence that never ends; one with a prompt has another as soon as that one is done.
struct Run {
    sequence: u64,
    model: ModelName,
    owner: Owner,
    priority: Priority,
    /// Tokens of its prompts; 0 if it decodes.
    prompt: u32,
    pending: u32,
    /// When it was served, in milliseconds, and how many steps it waited at most.
    served: Vec<f64>,
    prefilled: u32,
    last: u32,
    waited_max: u32,
}

/// Returns what can run of a model.
fn runnable<'a>(runs: &'a [Run], model: &ModelName) -> Vec<Runnable<'a>> {
    let own = runs.iter().filter(|run| run.model == *model);
    own.map(|run| Runnable {
        sequence: run.sequence,
        owner: &run.owner,
        class: run.priority.own_class(),
        priority: run.priority.own_class(),
        kind: if run.prompt == 0 { SpanKind::Decode } else { SpanKind::Prefill },
        pending: run.pending,
        span_max: 512,
    })
    .collect()
}

/// Models on one device.
#[derive(Default)]
struct Device {
    costs: BTreeMap<ModelName, Costs>,
    models: BTreeMap<ModelName, (Shares, Turns, Pace)>,
    allowance: Allowance,
    runs: Vec<Run>,
    /// Those that begin in the next tick, after it was shared out.
    newcomers: Vec<Run>,
    sequences: u64,
    now: f64,
    ticks: u32,
}

impl Device {
    fn new(costs: Costs) -> Self {
        Self::with(&[("m", costs)])
    }

    fn with(models: &[(&str, Costs)]) -> Self {
        let costs = models.iter().map(|(name, costs)| (ModelName::from(*name), *costs)).collect();
        let models = models.iter().map(|(name, _)| (ModelName::from(*name), Default::default())).collect();
        Self { costs, models, ..Self::default() }
    }

    /// Adds sequences of an owner; those with a prompt never decode.
    fn add(&mut self, model: &str, name: &str, priority: Priority, (count, prompt): (usize, u32)) {
        for _ in 0..count {
            let owner = owner(name);
            self.models.get_mut(&model.into()).unwrap().0.arrive(&owner);
            self.sequences += 1;
            let (sequence, last) = (self.sequences, self.ticks);
            let (model, pending, served) = (model.into(), prompt.max(1), vec![]);
            let (prefilled, waited_max) = (0, 0);
            let run = Run {
                sequence,
                model,
                owner,
                priority,
                prompt,
                pending,
                served,
                prefilled,
                last,
                waited_max,
            };
            self.newcomers.push(run);
        }
    }

    fn rows(&mut self, name: &str, count: usize) {
        self.add("m", name, Priority::Normal, (count, 0));
    }

    fn tick(&mut self) {
        self.ticks += 1;
        let demands = self.models.iter().map(|(name, (shares, _, pace))| {
            let runs = runnable(&self.runs, name);
            (name.clone(), demand((shares, pace), &self.allowance, &runs, BOUNDS))
        });
        let demands = demands.collect();
        self.allowance.share_out(&demands, LIMITS);
        self.runs.append(&mut self.newcomers);
        let mut steps: Vec<(u64, u32)> = vec![];
        for (name, (shares, turns, pace)) in &mut self.models {
            let runs = runnable(&self.runs, name);
            let planning =
                Planning { shares, turns, allowance: &mut self.allowance, pace, model: name, bounds: BOUNDS };
            let spans = planning.plan(&runs);
            let mut load = StepLoad::default();
            for &(sequence, tokens) in &spans {
                let run = runs.iter().find(|run| run.sequence == sequence).unwrap();
                load.add(run.kind, tokens);
            }
            let Costs { base, row, token, noise } = self.costs[name];
            let rows = f64::from(load.decoding + load.last);
            let noise = if self.ticks.is_multiple_of(3) { noise } else { 1.0 };
            let took = (base + row * rows + token * f64::from(load.prefilled)) * noise;
            if !spans.is_empty() {
                pace.observe(load, Duration::from_secs_f64(took / 1e3));
                self.now += took;
            }
            steps.extend(spans);
        }
        for (sequence, tokens) in steps {
            let run = self.runs.iter_mut().find(|run| run.sequence == sequence).unwrap();
            run.served.push(self.now);
            run.waited_max = run.waited_max.max(self.ticks - run.last);
            run.last = self.ticks;
            if run.prompt > 0 {
                run.prefilled += tokens;
                run.pending = if run.pending == tokens { run.prompt } else { run.pending - tokens };
            }
        }
    }

    fn ticks(&mut self, ticks: u32) {
        (0..ticks).for_each(|_| self.tick());
    }

    /// Lets time pass until what steps take is known, and forgets what was served until then.
    fn settle(&mut self) {
        self.ticks(60);
        for run in &mut self.runs {
            run.served.clear();
            (run.waited_max, run.prefilled) = (0, 0);
        }
    }

    fn of(&self, name: &str) -> impl Iterator<Item = &Run> {
        let owner = owner(name);
        self.runs.iter().filter(move |run| run.owner.connection == owner.connection)
    }

    /// Returns the 95th percentile of the gaps of a connection's rows.
    fn p95(&self, name: &str) -> f64 {
        let gaps = self.of(name).flat_map(|run| run.served.windows(2).map(|pair| pair[1] - pair[0]));
        let mut gaps: Vec<f64> = gaps.collect();
        gaps.sort_by(f64::total_cmp);
        gaps[gaps.len() * 95 / 100]
    }

    fn served(&self, name: &str) -> usize {
        self.of(name).map(|run| run.served.len()).sum()
    }

    fn prefilled(&self, name: &str) -> u32 {
        self.of(name).map(|run| run.prefilled).sum()
    }

    fn waited_max(&self, name: &str) -> u32 {
        self.of(name).map(|run| run.waited_max).max().unwrap()
    }
}

/// Four streams that have decoded by themselves for a while, 20 ms a step.
fn four_streams(priority: Priority) -> Device {
    let mut device = Device::new(CPU);
    device.add("m", "honest", priority, (4, 0));
    device.ticks(40);
    device
}
