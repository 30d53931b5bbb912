//! A day of traffic from one seed: the production engine, scheduler, ledger, loads and session book, on a
//! backend whose tokens tell what was in a slot, and on a clock that the seed moves. After every tick the
//! invariants of `invariants` hold; at the end everything that began has ended and nothing is held.
//!
//! A failing seed names itself: `MLXD_SIM_SEED=<seed> cargo test --release --lib sim` runs it alone.

mod invariants;
mod random;
mod request;
mod sessions;
mod stays;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use self::world::World;
use crate::backend::fake::Faults;

/// Seeds of a test run, and ticks of each day.
const SEEDS: u64 = 200;
const TICKS: u32 = 400;

fn live(seed: u64, defect: Faults) -> World {
    let mut world = World::new(seed, defect);
    for _ in 0..TICKS {
        world.tick();
    }
    world.wind_down();
    world
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
}

#[test]
fn invariants_hold_whatever_happens() {
    let one = std::env::var("MLXD_SIM_SEED").ok().map(|seed| seed.parse().unwrap());
    let seeds = one.map_or(0..SEEDS, |seed: u64| seed..seed + 1);
    let mut ended = std::collections::BTreeMap::<String, u32>::new();
    let (mut expirations, mut evictions) = (0, 0);
    for seed in seeds {
        match catch_unwind(|| live(seed, Faults::default())) {
            Ok(world) => {
                expirations += world.engine.counters.expirations_total;
                evictions += world.engine.counters.evictions_total;
                for (how, count) in world.ended {
                    *ended.entry(how).or_default() += count;
                }
            }
            Err(panic) => panic!(
                "seed {seed}: {}\nreplay: MLXD_SIM_SEED={seed} cargo test --release --lib sim",
                message(&*panic)
            ),
        }
    }
    if one.is_none() {
        // Everything that can happen to a request did.
        for how in ["ok", "Cancelled", "Deadline", "DeadlineUnmeetable", "QueueFull", "SlowReader"] {
            assert!(ended.contains_key(how), "no request ended with {how}: {ended:?}");
        }
        for how in ["Internal", "NonFiniteLogits", "ModelUnloaded", "KvTooLarge", "Draining"] {
            assert!(ended.contains_key(how), "no request ended with {how}: {ended:?}");
        }
        assert!(expirations > 0 && evictions > 0, "{expirations} models expired, {evictions} were evicted");
    }
}

#[test]
fn a_defect_is_found() {
    let defect = Faults { restores_wrongly: true, ..Faults::default() };
    let found = (0..20).any(|seed| catch_unwind(AssertUnwindSafe(|| live(seed, defect))).is_err());
    assert!(found, "a wrong token in a restored cache goes unnoticed");
}
