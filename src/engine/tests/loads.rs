//! Loads beside each other and beside questions: who shares one and as what, what a load evicts and in which
//! order, and what a question leaves alone.

use super::stays::{LARGE, Loading, empty, end, for_seconds, seconds, shortage};
use super::*;
use crate::backend::fake::KV_BYTES;
use crate::error::MemoryRule;
use crate::quantize::{QuantMode, Quantization};

impl Bench {
    /// Asks for a model in these formats.
    fn wish_as(&mut self, model: &str, formats: Formats) -> Loading {
        let (events, loading) = mpsc::channel(8);
        let spec = LoadSpec { formats, ..spec(model) };
        self.engine.command(Command::Load(LoadWork::new(spec, events)));
        loading
    }

    fn would_fit(&mut self, model: &str) -> Result<Fit, Error> {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Fits(spec(model), reply));
        answer.try_recv().unwrap()
    }

    /// Leaves a cache of `tokens` tokens in a model, and lets a second pass.
    fn cache(&mut self, model: &str, tokens: u32) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let work = self.work_with(self.lease(model), &prompt(tokens, tokens), 1, events);
        self.engine.command(Command::Generate(Box::new(work)));
        self.run();
        drain(receiver).end.unwrap();
        self.engine.rest();
        self.wait(1);
    }

    /// Bytes of the caches of each model, by name.
    fn cached(&mut self) -> Vec<u64> {
        self.stats().models.iter().map(|model| model.kv_idle_bytes).collect()
    }
}

const ANY: Formats = Formats { dtype: ComputeDtype::Auto, kv: KvDtype::Auto, quantize: None };

fn four_bits() -> Formats {
    let quantize = Some(Quantization::new(QuantMode::Affine, Some(4), None, None).unwrap());
    Formats { quantize, ..ANY }
}

fn field(outcome: Result<(), Error>) -> String {
    match outcome {
        Err(Error::InvalidField { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_wants_other_formats_than_a_load_has_is_refused_and_the_load_goes_on() {
    for ticks in [0, 2, 1000] {
        let mut bench = empty(LARGE + 1000);
        let first = bench.wish("a", Stay::default());
        bench.ticks(ticks);
        let quantized = bench.wish_as("a", four_bits());
        let half = bench.wish_as("a", Formats { dtype: ComputeDtype::Float16, ..ANY });
        let eight_bits = bench.wish_as("a", Formats { kv: KvDtype::Int8, ..ANY });
        let same = bench.wish_as("a", Formats { dtype: ComputeDtype::Float32, kv: KvDtype::Compute, ..ANY });
        bench.run();
        end(first).unwrap();
        end(same).unwrap();
        let refused = [quantized, half, eight_bits].map(|loading| field(end(loading)));
        assert_eq!(refused, ["quantize", "compute_dtype", "kv_dtype"], "after {ticks} ticks");
        assert_eq!(bench.engine.backend.models, 1);
    }
}

#[test]
fn who_joins_a_load_sees_its_progress() {
    let mut bench = empty(2 * LARGE + 1000);
    let first = bench.wish("a", Stay::default());
    bench.ticks(1);
    let second = bench.wish("a", Stay::default());
    bench.run();
    for mut loading in [first, second] {
        let events: Vec<LoadEvent> = std::iter::from_fn(|| loading.try_recv().ok()).collect();
        assert!(matches!(events[..], [LoadEvent::Warming, LoadEvent::Loaded(..)]), "{events:?}");
    }
    assert_eq!(bench.engine.backend.models, 1);
}

#[test]
fn who_wants_no_format_takes_a_model_as_it_was_loaded() {
    let mut bench = empty(LARGE + 1000);
    let quantized = bench.wish_as("a", four_bits());
    let joined = bench.wish("a", Stay::default());
    bench.run();
    end(quantized).unwrap();
    end(joined).unwrap();
    bench.have("a").unwrap();
    end(bench.wish_as("a", four_bits())).unwrap();
}

#[test]
fn a_load_that_cannot_succeed_evicts_nothing() {
    let mut bench = empty(LARGE + 1000);
    bench.have("a").unwrap();
    bench.engine.backend.unsupported.insert("b".into());
    assert!(matches!(bench.would_fit("b"), Err(Error::ModelUnsupported { .. })), "a question tells it too");
    assert!(matches!(bench.have("b"), Err(Error::ModelUnsupported { .. })));
    assert_eq!(bench.resident(), ["a"]);
    assert_eq!(bench.stats().counters.evictions_total, 0);
}

#[test]
fn a_question_about_a_model_that_is_being_loaded_is_answered_as_its_load_would_be() {
    let mut bench = empty(LARGE + 1000);
    let loading = bench.wish("a", Stay::default());
    for ticks in [0, 2] {
        bench.ticks(ticks);
        let fit = bench.would_fit("a").unwrap();
        assert_eq!((fit.needed_bytes, fit.refused), (0, None), "it would share the load");
        let fit = bench.would_fit("b").unwrap();
        assert_eq!((fit.needed_bytes, fit.refused), (LARGE, None), "it would wait its turn");
    }
    bench.run();
    end(loading).unwrap();
    bench.have("b").unwrap();
}

#[test]
fn a_question_evicts_nothing_though_the_device_has_less_than_before() {
    let mut bench = empty(0);
    bench.configure(|settings| settings.memory_budget_bytes = None);
    bench.engine.backend.budget_bytes = LARGE;
    bench.have("a").unwrap();
    bench.engine.backend.budget_bytes = LARGE / 2;
    let fit = bench.would_fit("b").unwrap();
    assert_eq!((fit.budget_bytes, fit.refused), (LARGE / 2, Some((MemoryRule::WholeBudget, vec![]))));
    bench.ticks(3);
    assert_eq!(bench.resident(), ["a"]);
}

#[test]
fn a_load_is_planned_with_the_kv_cache_that_it_will_have() {
    for (configured, reserved) in [(KvDtype::Compute, 400), (KvDtype::Int8, 200)] {
        let mut bench = empty(LARGE + 1000);
        bench.engine.settings.kv_dtype = configured;
        bench.engine.backend.kv_reserve_bytes = 400;
        assert_eq!(bench.would_fit("a").unwrap().needed_bytes, LARGE + reserved);
        let _loading = bench.wish("a", Stay::default());
        bench.ticks(1);
        assert_eq!(bench.engine.used_bytes(), LARGE + reserved);
    }
}

#[test]
fn caches_of_models_that_stay_go_in_the_policys_order() {
    let cached = |tokens: u64| tokens * KV_BYTES;
    let mut bench = empty(3 * LARGE + 3000);
    bench.have("a").unwrap();
    bench.have("b").unwrap();
    // The cache of a is the older one, but a is used last.
    bench.cache("a", 100);
    bench.cache("b", 100);
    end(bench.wish("a", Stay::default())).unwrap();
    assert_eq!(bench.cached(), [cached(100), cached(100)]);
    bench.wait(1);
    bench.engine.backend.weights.insert("c".into(), LARGE + 3000 - cached(150));
    bench.have("c").unwrap();
    assert_eq!(bench.resident(), ["a", "b", "c"]);
    assert_eq!(bench.cached(), [cached(100), 0, 0]);
}

#[test]
fn who_left_a_load_has_no_say_in_the_models_stay() {
    let forever = Stay { keep_alive: Some(KeepAlive::Forever), pin: Some(true) };
    for first_leaves in [true, false] {
        let mut bench = empty(LARGE + 1000);
        bench.configure(|settings| settings.keep_alive = seconds(100));
        let stays = if first_leaves { [forever, Stay::default()] } else { [for_seconds(200), forever] };
        let [first, second] = stays.map(|stay| bench.wish("a", stay));
        bench.ticks(1);
        let left = if first_leaves { [first, second] } else { [second, first] };
        let [leaves, waits] = left;
        drop(leaves);
        bench.run();
        end(waits).unwrap();
        let described = bench.stats().models.remove(0);
        let keep_alive = if first_leaves { seconds(100) } else { seconds(200) };
        assert_eq!((described.pinned, described.keep_alive), (false, keep_alive));
    }
}

#[test]
fn a_warm_up_takes_no_more_than_was_reserved() {
    for reserved in [0, 5 * (500 + 16 * KV_BYTES), 1_000_000] {
        let mut bench = empty(10_000_000);
        (bench.engine.backend.state_bytes, bench.engine.backend.kv_reserve_bytes) = (500, reserved);
        bench.have("a").unwrap();
        let (peak, all) = (bench.engine.backend.kv_bytes_peak, 32 * (500 + 16 * KV_BYTES));
        // One sequence is warmed up with whatever was reserved.
        assert!(peak <= reserved.max(500 + 16 * KV_BYTES), "{peak} of {reserved}");
        assert_eq!(peak == all, reserved > all, "what is there is used");
    }
}

#[test]
fn a_load_for_which_the_system_has_no_memory_is_refused_with_the_budgets_numbers() {
    for warms in [false, true] {
        let mut bench = empty(LARGE + 1000);
        bench.engine.backend.kv_reserve_bytes = 300;
        let faults = &mut bench.engine.backend.faults;
        let available_bytes = if warms { 15 * KV_BYTES } else { LARGE - 1 };
        match warms {
            true => faults.slab_tokens_max = Some(15),
            false => faults.short_of = Some(available_bytes),
        }
        let refused = shortage(bench.have("a").unwrap_err());
        assert_eq!((refused.rule, refused.available_bytes), (MemoryRule::System, available_bytes));
        assert_eq!((refused.needed_bytes, refused.budget_bytes), (LARGE + 300, LARGE + 1000));
        assert_eq!((bench.engine.backend.held(), bench.engine.used_bytes()), (0, 0));
    }
}

#[test]
fn a_load_whose_files_are_not_opened_lets_others_go_first() {
    let mut bench = empty(2 * LARGE + 1000);
    bench.engine.backend.hanging.insert("a".into());
    let hanging = bench.wish("a", Stay::default());
    let others = ["b", "c"].map(|model| bench.wish(model, Stay::default()));
    bench.ticks(100);
    assert_eq!(bench.resident(), ["c"], "b made room for c; what hangs keeps its own");
    others.into_iter().for_each(|other| end(other).unwrap());
    let _lease = bench.lease("c");
    let waits = bench.wish("b", Stay::default());
    bench.ticks(100);
    assert_eq!(bench.resident(), ["c"], "it waits until what hangs has ended");
    bench.engine.backend.hanging.clear();
    bench.run();
    end(hanging).unwrap();
    end(waits).unwrap();
    assert_eq!(bench.resident(), ["b", "c"]);
}
