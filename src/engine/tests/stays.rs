//! Which models are in memory: loads that are shared, evict others or are given up, and stays that end.

use super::*;
use crate::backend::fake::WEIGHT_BYTES;
use crate::error::MemoryRule;
use crate::ids::ModelName;

pub(super) type Loading = mpsc::Receiver<LoadEvent>;

/// Weights of the large models here.
pub(super) const LARGE: u64 = 4000;

/// A bench without models whose `a`, `b` and `c` are large, with this budget.
pub(super) fn empty(budget: u64) -> Bench {
    let mut fake = Fake::default();
    fake.weights = ["a", "b", "c"].map(|model| (model.into(), LARGE)).into();
    let clock = Arc::new(HandClock::default());
    let engine = Engine::new(fake, clock.clone(), settings(), budget);
    Bench { engine, clock, tokenizer: tokenizer() }
}

pub(super) fn seconds(seconds: u64) -> KeepAlive {
    KeepAlive::For(Duration::from_secs(seconds))
}

pub(super) fn for_seconds(time: u64) -> Stay {
    Stay { keep_alive: Some(seconds(time)), pin: None }
}

impl Bench {
    /// Asks for a model.
    pub(super) fn wish(&mut self, model: &str, stay: Stay) -> Loading {
        let (events, loading) = mpsc::channel(8);
        self.engine.command(Command::Load(LoadWork { stay, ..LoadWork::new(spec(model), events) }));
        loading
    }

    /// Asks for a model and lets a second pass.
    pub(super) fn have(&mut self, model: &str) -> Result<(), Error> {
        let loading = self.wish(model, Stay::default());
        self.run();
        self.wait(1);
        end(loading)
    }

    pub(super) fn wait(&mut self, seconds: u64) {
        *self.clock.0.lock().unwrap() += Duration::from_secs(seconds);
        self.ticks(1);
    }

    pub(super) fn configure(&mut self, change: impl FnOnce(&mut ResidencySettings)) {
        let mut settings = self.engine.residency.clone();
        change(&mut settings);
        self.engine.command(Command::Configure(Box::new(settings)));
        self.ticks(1);
    }

    pub(super) fn resident(&self) -> Vec<&str> {
        self.engine.models.keys().map(ModelName::as_str).collect()
    }

    pub(super) fn fits(&mut self, model: &str) -> Fit {
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Fits(spec(model), reply));
        answer.try_recv().unwrap().unwrap()
    }

    pub(super) fn generate(&mut self, model: &str, keep_alive: Option<KeepAlive>) {
        let (work, events) = self.work_on(model);
        self.engine.command(Command::Generate(Box::new(GenerateWork { keep_alive, ..work })));
        self.run();
        drain(events).end.unwrap();
    }

    pub(super) fn work_on(&self, model: &str) -> (GenerateWork, Events) {
        let (events, receiver) = mpsc::channel(EVENTS);
        (self.work_with(self.lease(model), &[1, 2], 3, events), receiver)
    }
}

pub(super) fn end(mut loading: Loading) -> Result<(), Error> {
    match std::iter::from_fn(|| loading.try_recv().ok()).last() {
        Some(LoadEvent::Loaded(..)) => Ok(()),
        Some(LoadEvent::Failed(error)) => Err(error),
        other => panic!("{other:?}"),
    }
}

pub(super) fn shortage(error: Error) -> crate::error::Shortage {
    match error {
        Error::MemoryBudget(shortage) | Error::ModelTooLarge(shortage) => *shortage,
        other => panic!("{other:?}"),
    }
}

#[test]
fn of_three_models_and_room_for_two_the_right_one_goes_before_the_next_load() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.configure(|settings| {
        settings.models.insert("b".into(), ModelSettings { pin: true, ..ModelSettings::default() });
    });
    let mut seen = Vec::new();
    for model in ["a", "b", "c", "a", "c", "b", "a"] {
        bench.have(model).unwrap();
        seen.push(bench.resident().join(""));
    }
    assert_eq!(seen, ["a", "ab", "bc", "ab", "bc", "bc", "ab"], "b is pinned");
    let stats = bench.stats();
    assert_eq!((stats.counters.loads_total, stats.counters.evictions_total), (6, 4));
    assert_eq!(bench.engine.backend.models, 6);
    assert!(bench.engine.backend.weight_bytes_peak <= 2 * LARGE + 3000, "evicted before, not after");
}

#[test]
fn the_model_used_least_recently_goes() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.have("a").unwrap();
    bench.have("b").unwrap();
    bench.generate("a", None);
    assert_eq!(bench.fits("c").evictions, [("b".into(), LARGE)]);
    assert_eq!(bench.resident(), ["a", "b"], "a question evicts nothing");
    bench.have("c").unwrap();
    assert_eq!(bench.resident(), ["a", "c"]);
    bench.have("a").unwrap();
    bench.have("b").unwrap();
    assert_eq!(bench.resident(), ["a", "b"], "a load of what is there is a use of it");
}

#[test]
fn a_load_that_models_in_use_leave_no_room_for_is_refused_with_rule_and_numbers() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.have("a").unwrap();
    bench.have("b").unwrap();
    let leases = (bench.lease("a"), bench.lease("b"));
    let refused = shortage(bench.have("c").unwrap_err());
    assert_eq!(
        (refused.needed_bytes, refused.available_bytes, refused.budget_bytes),
        (LARGE, 3000, 2 * LARGE + 3000)
    );
    assert_eq!(refused.rule, MemoryRule::InUse { held_bytes: 2 * LARGE });
    assert_eq!(refused.in_the_way, ["a".into()]);
    assert_eq!(bench.fits("c").refused, Some((refused.rule, refused.in_the_way)));
    assert_eq!(bench.resident(), ["a", "b"]);
    drop(leases);
    bench.have("c").unwrap();
}

#[test]
fn what_can_never_fit_is_refused_before_loads_that_run() {
    let mut bench = empty(LARGE + 100);
    let running = bench.wish("small", Stay::default());
    bench.ticks(1);
    bench.engine.backend.weights.insert("giant".into(), LARGE + 101);
    let refused = shortage(end(bench.wish("giant", Stay::default())).unwrap_err());
    assert_eq!((refused.rule, refused.available_bytes), (MemoryRule::WholeBudget, LARGE + 100));
    let pinned = Stay { keep_alive: None, pin: Some(true) };
    let pinning = bench.wish("small", pinned);
    bench.run();
    end(running).unwrap();
    end(pinning).unwrap();
    let refused = shortage(bench.have("a").unwrap_err());
    assert_eq!(refused.rule, MemoryRule::Pinned { held_bytes: WEIGHT_BYTES });
    assert_eq!(refused.in_the_way, ["small".into()]);
}

#[test]
fn a_model_is_not_loaded_where_its_first_request_would_have_no_room() {
    let mut bench = empty(LARGE + 100);
    bench.engine.backend.kv_reserve_bytes = 101;
    let refused = shortage(bench.have("a").unwrap_err());
    assert_eq!((refused.needed_bytes, refused.rule), (LARGE + 101, MemoryRule::WholeBudget));
    bench.engine.backend.kv_reserve_bytes = 100;
    bench.have("a").unwrap();
}

#[test]
fn sixteen_who_ask_at_once_share_one_load_also_after_an_expiry() {
    let mut bench = empty(LARGE + 1000);
    for round in 1..=2 {
        let loadings: Vec<Loading> = (0..16).map(|_| bench.wish("a", for_seconds(100))).collect();
        bench.run();
        for loading in loadings {
            end(loading).unwrap();
        }
        assert_eq!(bench.engine.backend.models, round);
        bench.wait(101);
        assert!(bench.resident().is_empty());
    }
    assert_eq!(bench.stats().counters.expirations_total, 2);
}

#[test]
fn a_load_goes_on_while_one_waits_and_ends_with_the_last() {
    let mut bench = empty(LARGE + 1000);
    let (first, second) = (bench.wish("a", Stay::default()), bench.wish("a", Stay::default()));
    bench.ticks(2);
    drop(first);
    bench.ticks(1);
    assert_eq!(bench.engine.backend.held(), 1, "the second waits");
    drop(second);
    bench.ticks(1);
    assert!(bench.engine.is_idle());
    assert_eq!((bench.engine.backend.held(), bench.engine.used_bytes()), (0, 0), "nothing is left of it");
    assert_eq!(bench.engine.table().borrow().state(&"a".into()), ModelState::Available);
    bench.have("a").unwrap();
}

#[test]
fn a_load_that_waits_its_turn_ends_with_the_last_who_wanted_it() {
    let mut bench = empty(3 * LARGE);
    let (first, second) = (bench.wish("a", Stay::default()), bench.wish("b", Stay::default()));
    bench.ticks(1);
    drop(second);
    bench.run();
    end(first).unwrap();
    assert_eq!((bench.resident(), bench.engine.backend.models), (vec!["a"], 1));
}

#[test]
fn a_load_that_fails_leaves_nothing_and_tells_everybody() {
    let mut bench = empty(LARGE + 1000);
    bench.engine.backend.faults.loads_fail = true;
    let loadings: Vec<Loading> = (0..3).map(|_| bench.wish("a", Stay::default())).collect();
    bench.run();
    for loading in loadings {
        assert!(matches!(end(loading), Err(Error::Internal(_))));
    }
    assert_eq!((bench.engine.backend.held(), bench.engine.used_bytes()), (0, 0));
    bench.engine.backend.faults.loads_fail = false;
    bench.have("a").unwrap();
}

#[test]
fn who_loads_to_use_gets_a_lease_with_the_end_and_the_model_stays() {
    let mut bench = empty(LARGE + 1000);
    bench.configure(|settings| settings.keep_alive = seconds(0));
    let (events, mut loading) = mpsc::channel(8);
    let work = LoadWork { wants_lease: true, ..LoadWork::new(spec("a"), events) };
    bench.engine.command(Command::Load(work));
    bench.run();
    bench.wait(1000);
    let Some(LoadEvent::Loaded(_, _, Some(lease))) = std::iter::from_fn(|| loading.try_recv().ok()).last()
    else {
        panic!("no lease")
    };
    assert_eq!(bench.resident(), ["a"]);
    drop(lease);
    bench.wait(1);
    assert!(bench.resident().is_empty(), "used, and its time is over");
}

#[test]
fn a_model_goes_when_its_time_is_over_and_a_use_renews_it() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.configure(|settings| settings.keep_alive = seconds(100));
    bench.have("a").unwrap();
    bench.wait(90);
    bench.generate("a", None);
    bench.wait(90);
    assert_eq!(bench.resident(), ["a"]);
    let lease = bench.lease("a");
    bench.wait(1000);
    drop(lease);
    bench.wait(99);
    assert_eq!(bench.resident(), ["a"], "its time begins when the use ends");
    bench.wait(1);
    assert!(bench.resident().is_empty());
    assert_eq!(bench.engine.backend.held(), 0);
}

#[test]
fn zero_unloads_after_use_and_negative_never() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.configure(|settings| settings.keep_alive = seconds(100));
    bench.have("a").unwrap();
    bench.generate("a", Some(seconds(0)));
    bench.ticks(1);
    assert!(bench.resident().is_empty());
    bench.have("b").unwrap();
    bench.generate("b", Some(KeepAlive::Forever));
    bench.wait(1_000_000);
    bench.generate("b", None);
    bench.wait(1_000_000);
    assert_eq!(bench.resident(), ["b"], "who says nothing changes nothing");
    assert_eq!(bench.engine.next_expiry(), None);
}

#[test]
fn a_request_asks_for_no_longer_than_the_limit_and_ends_no_pin() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.configure(|settings| settings.keep_alive_max = seconds(50));
    bench.have("a").unwrap();
    bench.generate("a", Some(KeepAlive::Forever));
    bench.wait(50);
    assert!(bench.resident().is_empty());
    let pinned = Stay { keep_alive: None, pin: Some(true) };
    let loading = bench.wish("a", pinned);
    bench.run();
    end(loading).unwrap();
    bench.generate("a", Some(seconds(0)));
    bench.wait(1000);
    assert_eq!(bench.resident(), ["a"]);
    let shown = bench.stats().models[0].clone();
    assert_eq!((shown.pinned, shown.expires), (true, None));
    let unpinned = Stay { keep_alive: None, pin: Some(false) };
    end(bench.wish("a", unpinned)).unwrap();
    bench.ticks(1);
    assert!(bench.resident().is_empty());
}

#[test]
fn a_score_says_how_long_its_model_stays() {
    let mut bench = empty(2 * LARGE + 3000);
    for (model, keep_alive, stays) in
        [("a", None, true), ("b", Some(seconds(0)), false), ("c", Some(KeepAlive::Forever), true)]
    {
        bench.have(model).unwrap();
        let (reply, mut answer) = oneshot::channel();
        let (origin, model, prompt) = (bench.origin("c"), bench.lease(model), vec![1, 2].into());
        let name = model.model().to_string();
        let work = ScoreWork { origin, model, prompt, score_from: 0, top_logprobs: 0, keep_alive, reply };
        bench.engine.command(Command::Score(Box::new(work)));
        bench.run();
        answer.try_recv().unwrap().unwrap();
        bench.ticks(1);
        assert_eq!(bench.resident().contains(&name.as_str()), stays, "{name}");
    }
}

#[test]
fn questions_neither_wake_nor_extend_a_model() {
    let mut bench = empty(2 * LARGE + 3000);
    bench.configure(|settings| settings.keep_alive = seconds(100));
    bench.have("a").unwrap();
    bench.generate("a", None);
    for _ in 0..9 {
        bench.wait(10);
        let expires = bench.stats().models[0].expires;
        assert_eq!(expires, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(101)));
        assert_eq!(bench.fits("a").needed_bytes, 0);
        bench.fits("b");
        let door = bench.engine.table().borrow().door(&"a".into()).cloned();
        assert!(door.is_some_and(|door| door.assets().files.name == "a".into()));
    }
    bench.wait(10);
    assert!(bench.resident().is_empty());
    assert_eq!(bench.engine.backend.models, 1);
}

#[test]
fn a_smaller_budget_evicts_in_the_policys_order_and_waits_for_those_in_use() {
    let mut bench = empty(3 * LARGE);
    for model in ["a", "b", "c"] {
        bench.have(model).unwrap();
    }
    let lease = bench.lease("a");
    bench.configure(|settings| settings.memory_budget_bytes = Some(2 * LARGE));
    assert_eq!(bench.resident(), ["a", "c"]);
    bench.configure(|settings| settings.memory_budget_bytes = Some(LARGE / 2));
    assert_eq!(bench.resident(), ["a"]);
    drop(lease);
    bench.ticks(1);
    assert!(bench.resident().is_empty());
    assert_eq!(bench.stats().counters.evictions_total, 3);
}

#[test]
fn the_budget_of_the_device_is_read_again_at_each_load() {
    let mut bench = empty(0);
    bench.configure(|settings| settings.memory_budget_bytes = None);
    bench.engine.backend.budget_bytes = LARGE - 1;
    assert_eq!(shortage(bench.have("a").unwrap_err()).budget_bytes, LARGE - 1);
    bench.engine.backend.budget_bytes = LARGE;
    bench.have("a").unwrap();
    assert_eq!(bench.stats().budget_bytes, LARGE);
}

#[test]
fn an_eviction_takes_the_caches_and_gives_back_all_bytes() {
    let mut bench = empty(LARGE + WEIGHT_BYTES + 100_000);
    bench.have("a").unwrap();
    bench.generate("a", None);
    assert!(bench.stats().models[0].kv_idle_bytes > 0);
    bench.configure(|settings| settings.memory_budget_bytes = Some(LARGE));
    bench.have("b").unwrap();
    assert_eq!((bench.resident(), bench.engine.used_bytes()), (vec!["b"], LARGE));
    for _ in 0..100 {
        bench.have("a").unwrap();
        bench.have("b").unwrap();
    }
    assert_eq!((bench.engine.backend.held(), bench.engine.used_bytes()), (1, LARGE));
}
