//! A day of traffic from one seed: the production engine, scheduler, ledger, loads, session book and store,
//! on a backend whose tokens tell what was in a slot, on a disk that fails, and on a clock that the seed
//! moves. The daemon ends in every way and starts again. After every tick the invariants of `invariants`
//! hold, after every start those of `saved`; at the end everything that began has ended and nothing is held.
//!
//! A failing seed names itself: `MLXD_SIM_SEED=<seed> cargo test --release --lib sim` runs it alone.

mod invariants;
mod random;
mod request;
mod restarts;
mod saved;
mod seen;
mod sessions;
mod snapshots;
mod stays;
mod traffic;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use self::saved::End;
use self::world::World;
use crate::backend::fake::Faults;

/// Seeds of a test run, and ticks of each day.
const SEEDS: u64 = 200;
const TICKS: u32 = 400;

/// Seeds of the days that end at every write, and their ticks.
const SHORT_SEEDS: u64 = 4;
const SHORT_TICKS: u32 = 60;

fn live(seed: u64, defect: Faults) -> World {
    let mut world = World::new(seed, defect);
    for _ in 0..TICKS {
        world.tick();
    }
    world.wind_down();
    world
}

/// Lives a short day, whose daemon ends after a number of writes to the disk, and the next one soon after.
fn live_until(seed: u64, end: Option<(usize, [End; 2])>) -> World {
    let mut world = World::new(seed, Faults::default());
    world.calm = true;
    if let Some((writes, _)) = end {
        world.store.disk.end_after(writes);
    }
    for _ in 0..SHORT_TICKS {
        world.tick();
        if let Some((_, [first, second])) = end.filter(|_| world.store.disk.has_ended()) {
            world.restart(first);
            world.live_on();
            world.restart(second);
        }
    }
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
    let mut restarts = std::collections::BTreeSet::new();
    let mut snapshots = snapshots::Counts::default();
    for seed in seeds {
        match catch_unwind(|| live(seed, Faults::default())) {
            Ok(world) => {
                let departed = world.departed();
                expirations += departed.0;
                evictions += departed.1;
                snapshots.add(world.snapshots.counts);
                restarts.extend(world.restarts.into_keys());
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
        assert_eq!(restarts.len(), 3, "{restarts:?}");
        assert!(expirations > 0 && evictions > 0, "{expirations} models expired, {evictions} were evicted");
        snapshots.assert_all();
    }
}

#[test]
fn a_daemon_that_ends_at_any_write_leaves_what_it_acknowledged_and_the_next_one_goes_on() {
    for seed in 0..SHORT_SEEDS {
        let writes = live_until(seed, None).store.disk.writes();
        let ends = [[End::Kill, End::PowerFailure], [End::PowerFailure, End::Kill]];
        for (write, ends) in (0..writes).flat_map(|write| ends.map(|ends| (write, ends))) {
            let lived = catch_unwind(|| live_until(seed, Some((write, ends))).wind_down());
            if let Err(panic) = lived {
                panic!("seed {seed}, {ends:?} at write {write}: {}", message(&*panic));
            }
        }
    }
}

#[test]
fn a_defect_is_found() {
    let defect = Faults { restores_wrongly: true, ..Faults::default() };
    let found = (0..20).any(|seed| catch_unwind(AssertUnwindSafe(|| live(seed, defect))).is_err());
    assert!(found, "a wrong token in a restored cache goes unnoticed");
}

#[test]
fn a_disk_that_only_says_that_it_syncs_is_found() {
    let lied = |seed| {
        let mut world = World::new(seed, Faults::default());
        world.store.disk.lie();
        (0..TICKS).for_each(|_| world.tick());
    };
    let found = (0..20).any(|seed| catch_unwind(|| lied(seed)).is_err());
    assert!(found, "an acknowledged turn is lost, and that goes unnoticed");
}
