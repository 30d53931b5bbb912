//! The policy by examples, and against random demands, sizes, times and states.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::quantize::{QuantMode, Quantization};

fn at(seconds: u64) -> Moment {
    Moment::at(Duration::from_secs(seconds))
}

const FORMATS: Formats = Formats { dtype: ComputeDtype::Float32, kv: KvDtype::Compute, quantize: None };

/// A model of 100 bytes that nobody uses, 10 of them an empty slab and 20 cached.
fn idle(model: &str, used: u64) -> Tenant {
    Tenant {
        model: model.into(),
        formats: FORMATS,
        computes_in: "float32".into(),
        bytes: 100,
        empty_bytes: 10,
        parked_bytes: 20,
        users: 0,
        pinned: false,
        used: at(used),
        expires: None,
    }
}

fn demand(weight_bytes: u64) -> Demand {
    Demand { model: "new".into(), formats: Formats::default(), weight_bytes, kv_bytes: 0 }
}

/// Plans a load of `needed` bytes into a full budget.
fn planned(tenants: &[Tenant], needed: u64) -> Result<Plan, Error> {
    let used_bytes = tenants.iter().map(|tenant| tenant.bytes).sum();
    let memory = Memory { budget_bytes: used_bytes, used_bytes };
    plan(&State { tenants, ..State::default() }, &demand(needed), &memory, at(100))
}

/// A load after `models` were evicted, and `cached_bytes` freed besides: empty slabs, then caches of
/// `emptied`.
fn evicting(models: &[&str], emptied: &[&str], cached_bytes: u64) -> Result<Plan, Error> {
    let [models, emptied] = [models, emptied].map(|names| names.iter().map(|&name| name.into()).collect());
    Ok(Plan::Load(Evictions { models, emptied, cached_bytes }))
}

fn refusal(plan: Result<Plan, Error>) -> Shortage {
    match plan {
        Err(Error::MemoryBudget(shortage) | Error::ModelTooLarge(shortage)) => *shortage,
        other => panic!("{other:?}"),
    }
}

#[test]
fn empty_slabs_go_first_then_caches_then_the_model_used_least_recently() {
    let two = [idle("b", 1), idle("a", 2)];
    assert_eq!(planned(&two, 20), evicting(&[], &[], 20), "two empty slabs");
    assert_eq!(planned(&two, 40), evicting(&[], &["b"], 40), "and the older cache");
    assert_eq!(planned(&two, 41), evicting(&["b"], &[], 0));
    assert_eq!(planned(&two, 110), evicting(&["b"], &[], 10));
    assert_eq!(planned(&two, 130), evicting(&["b"], &["a"], 30), "what the newer one caches");
    assert_eq!(planned(&two, 131), evicting(&["b", "a"], &[], 0));
}

#[test]
fn a_model_that_need_not_go_stays() {
    let large = Tenant { bytes: 1000, ..idle("large", 2) };
    assert_eq!(planned(&[idle("small", 1), large], 900), evicting(&["large"], &[], 0));
}

#[test]
fn a_model_whose_time_is_over_goes_before_any_other() {
    let over = Tenant { expires: Some(at(99)), ..idle("over", 50) };
    assert_eq!(planned(&[idle("older", 1), over], 60), evicting(&["over"], &[], 0));
}

#[test]
fn models_in_use_and_pinned_ones_stay_and_are_named() {
    let used = Tenant { users: 2, ..idle("used", 1) };
    let pinned = Tenant { pinned: true, ..idle("pinned", 2) };
    let all = [used, pinned, idle("free", 50)];
    assert_eq!(planned(&all, 100), evicting(&["free"], &[], 0));
    assert_eq!(planned(&all, 160), evicting(&["free"], &["used", "pinned"], 60), "their caches go last");
    let busy = refusal(planned(&all, 161));
    assert_eq!((busy.needed_bytes, busy.available_bytes, busy.budget_bytes), (161, 160, 300));
    assert_eq!(busy.rule, MemoryRule::InUse { held_bytes: 70 });
    assert_eq!(busy.in_the_way, ["used".into()]);
    let never = refusal(planned(&all, 231));
    assert_eq!(never.rule, MemoryRule::Pinned { held_bytes: 70 });
    assert_eq!(never.in_the_way, ["pinned".into()]);
    let larger = refusal(planned(&all, 301));
    assert_eq!((larger.rule, larger.available_bytes), (MemoryRule::WholeBudget, 300));
}

#[test]
fn the_kv_cache_of_a_first_request_must_fit_too() {
    let memory = Memory { budget_bytes: 100, used_bytes: 0 };
    let tight = Demand { kv_bytes: 41, ..demand(60) };
    let refused = refusal(plan(&State::default(), &tight, &memory, at(1)));
    assert_eq!((refused.needed_bytes, refused.rule), (101, MemoryRule::WholeBudget));
}

#[test]
fn a_model_is_loaded_once() {
    let memory = Memory { budget_bytes: 100, used_bytes: 0 };
    let planned = |state: State<'_>| plan(&state, &demand(60), &memory, at(1));
    assert_eq!(planned(State::default()), evicting(&[], &[], 0));
    let loading = State { loading: Some(FORMATS), others_first: true, ..State::default() };
    assert_eq!(planned(loading), Ok(Plan::Join));
    assert_eq!(planned(State { others_first: true, ..State::default() }), Ok(Plan::Wait));
    let there = [idle("new", 1)];
    assert_eq!(planned(State { tenants: &there, ..State::default() }), Ok(Plan::Ready));
    let draining = State { tenants: &there, draining: true, ..State::default() };
    assert_eq!(planned(draining), Err(Error::Draining));
}

#[test]
fn what_never_fits_is_refused_before_its_turn() {
    let memory = Memory { budget_bytes: 50, used_bytes: 0 };
    let waiting = State { others_first: true, ..State::default() };
    assert_eq!(refusal(plan(&waiting, &demand(60), &memory, at(1))).rule, MemoryRule::WholeBudget);
}

#[test]
fn a_model_that_is_there_or_being_loaded_in_another_format_is_refused() {
    let there = [idle("new", 1)];
    let resident = State { tenants: &there, ..State::default() };
    let loading = State { loading: Some(FORMATS), ..State::default() };
    let planned = |state, formats| plan(state, &Demand { formats, ..demand(1) }, &Memory::default(), at(1));
    let four_bits = Quantization::new(QuantMode::Affine, Some(4), None, None).unwrap();
    let any = Formats::default();
    let others = [
        ("compute_dtype", Formats { dtype: ComputeDtype::Float16, ..any }),
        ("kv_dtype", Formats { kv: KvDtype::Int8, ..any }),
        ("quantize", Formats { quantize: Some(four_bits), ..any }),
    ];
    for (field, other) in others {
        let error = planned(&resident, other).unwrap_err().to_string();
        assert_eq!(error, format!("{field}: the model is resident in float32; unload it first"));
        let error = planned(&loading, other).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{field}: the model is being loaded otherwise; unload it once it is loaded")
        );
    }
    for same in [any, FORMATS] {
        assert_eq!(planned(&resident, same), Ok(Plan::Ready));
        assert_eq!(planned(&loading, same), Ok(Plan::Join));
    }
}

fn tenant(number: usize) -> impl Strategy<Value = Tenant> {
    let bytes = (0..400_u64, 0..60_u64, 0..100_u64);
    let states = (prop_oneof![3 => Just(0), 1 => 1..4_u32], prop::bool::weighted(0.2));
    (bytes, states, 0..50_u64, prop::option::of(0..80_u64)).prop_map(
        move |((weights, empty_bytes, parked_bytes), (users, pinned), used, expires)| Tenant {
            bytes: weights + empty_bytes + parked_bytes,
            empty_bytes,
            parked_bytes,
            users,
            pinned,
            expires: expires.map(at),
            ..idle(&format!("m{number}"), used)
        },
    )
}

/// Models, a budget that may be below what they use, bytes that loads have reserved, a demand, and the time.
fn world() -> impl Strategy<Value = (Vec<Tenant>, Memory, Demand, Moment)> {
    let tenants = (0..7_usize).prop_flat_map(|count| (0..count).map(tenant).collect::<Vec<_>>());
    (tenants, 0..3000_u64, 0..200_u64, (0..1500_u64, 0..100_u64), 0..100_u64).prop_map(
        |(tenants, budget_bytes, reserved, (weight_bytes, kv_bytes), now)| {
            let used_bytes = tenants.iter().map(|tenant| tenant.bytes).sum::<u64>() + reserved;
            let demand = Demand { kv_bytes, ..demand(weight_bytes) };
            (tenants, Memory { budget_bytes, used_bytes }, demand, at(now))
        },
    )
}

/// Carries a plan out: returns what is left of the models, and the bytes in use.
fn carried_out(tenants: &[Tenant], memory: &Memory, evictions: &Evictions) -> (Vec<Tenant>, u64) {
    let is_evicted = |tenant: &&Tenant| evictions.models.contains(&tenant.model);
    let evicted: u64 = tenants.iter().filter(is_evicted).map(|tenant| tenant.bytes).sum();
    let mut left: Vec<Tenant> = tenants.iter().filter(|tenant| !is_evicted(tenant)).cloned().collect();
    let mut to_free = evictions.cached_bytes;
    let mut free = |cached: &mut u64, bytes: &mut u64| {
        let freed = to_free.min(*cached);
        (*cached, *bytes) = (*cached - freed, *bytes - freed);
        to_free -= freed;
    };
    left.iter_mut().for_each(|tenant| free(&mut tenant.empty_bytes, &mut tenant.bytes));
    for model in &evictions.emptied {
        let tenant = left.iter_mut().find(|tenant| tenant.model == *model).expect("it stays");
        free(&mut tenant.parked_bytes, &mut tenant.bytes);
    }
    assert_eq!(to_free, 0, "only what is cached, and of those that are named");
    (left, memory.used_bytes - evicted - evictions.cached_bytes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_load_stays_within_the_budget_and_evicts_only_whom_it_may(
        (tenants, memory, demand, now) in world(),
    ) {
        let state = State { tenants: &tenants, ..State::default() };
        if let Ok(Plan::Load(evictions)) = plan(&state, &demand, &memory, now) {
            for model in &evictions.models {
                let evicted = tenants.iter().find(|tenant| tenant.model == *model).unwrap();
                prop_assert!(!evicted.pinned && evicted.users == 0);
            }
            let (_, used) = carried_out(&tenants, &memory, &evictions);
            prop_assert!(used + demand.needed_bytes() <= memory.budget_bytes);
        }
    }

    #[test]
    fn no_model_and_no_cache_goes_that_need_not((tenants, memory, demand, now) in world()) {
        let state = State { tenants: &tenants, ..State::default() };
        if let Ok(Plan::Load(evictions)) = plan(&state, &demand, &memory, now) {
            let missing = memory.missing_bytes(demand.needed_bytes());
            let bytes = |model: &ModelName| tenants.iter().find(|t| t.model == *model).unwrap().bytes;
            let evicted: u64 = evictions.models.iter().map(bytes).sum();
            prop_assert_eq!(evictions.cached_bytes, missing.saturating_sub(evicted));
            for spared in &evictions.models {
                prop_assert!(evicted - bytes(spared) < missing, "{spared} need not go");
            }
            // Nobody goes for another who was used more recently, unless the other would not do.
            let is_evicted = |tenant: &&Tenant| evictions.models.contains(&tenant.model);
            for tenant in tenants.iter().filter(is_evicted) {
                let older = tenants.iter().filter(|other| {
                    other.is_evictable() && !is_evicted(other) && other.used < tenant.used
                        && other.has_expired(now) >= tenant.has_expired(now)
                });
                for older in older {
                    let instead = evicted - tenant.bytes + older.bytes;
                    prop_assert!(instead < missing || older.bytes <= tenant.bytes, "{} goes, {} stays", tenant.model, older.model);
                }
            }
        }
    }

    #[test]
    fn a_demand_that_could_be_met_is_met((tenants, memory, demand, now) in world()) {
        let state = State { tenants: &tenants, ..State::default() };
        let stays: u64 = tenants.iter().map(Tenant::stay_bytes).sum();
        let models: u64 = tenants.iter().map(|tenant| tenant.bytes).sum();
        let least = memory.used_bytes - models + stays + demand.needed_bytes();
        match plan(&state, &demand, &memory, now) {
            Ok(Plan::Load(_)) => prop_assert!(least <= memory.budget_bytes),
            Err(Error::ModelTooLarge(shortage) | Error::MemoryBudget(shortage)) => {
                prop_assert!(least > memory.budget_bytes, "{shortage:?}");
                prop_assert!(shortage.needed_bytes > shortage.available_bytes);
                prop_assert_eq!(shortage.needed_bytes, demand.needed_bytes());
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn a_plan_that_was_carried_out_has_nothing_left_to_evict((tenants, memory, demand, now) in world()) {
        let state = State { tenants: &tenants, ..State::default() };
        let first = plan(&state, &demand, &memory, now);
        prop_assert_eq!(&first, &plan(&state, &demand, &memory, now), "the same state, the same plan");
        if let Ok(Plan::Load(evictions)) = first {
            let (left, used_bytes) = carried_out(&tenants, &memory, &evictions);
            let (state, memory) = (State { tenants: &left, ..State::default() }, Memory { used_bytes, ..memory });
            prop_assert_eq!(plan(&state, &demand, &memory, now), Ok(Plan::Load(Evictions::default())));
        }
    }

    #[test]
    fn a_smaller_budget_takes_as_much_as_it_may((tenants, memory, _, now) in world()) {
        let missing = memory.missing_bytes(0);
        let evictions = evictions_towards(&tenants, missing, now);
        let (left, used) = carried_out(&tenants, &memory, &evictions);
        if used > memory.budget_bytes {
            prop_assert!(left.iter().all(|tenant| tenant.stay_bytes() == tenant.bytes), "{left:?}");
        }
    }
}
