//! How the time of a tick is shared out.

use super::*;
use crate::sched::owner::owner;

const LIMITS: PaceLimits =
    PaceLimits { prefill_tokens_max: 512, stretch_percent: 250, step_max: Duration::from_millis(500) };

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn decodes(time: u64) -> Demand {
    rows("a", 1, [time; 3])
}

/// Rows of one client: what they take by themselves, what is in every step, and all.
fn rows(name: &str, class: u32, [alone, always, all]: [u64; 3]) -> Demand {
    let alone = BTreeMap::from([(owner(name).circle(1), ms(alone))]);
    let times = RowTimes { class, alone, always: ms(always), yielding: ms(0), all: ms(all) };
    Demand { rows: Some(times), ..Demand::default() }
}

fn prefills(class: u32, time: u64) -> Demand {
    Demand { class: Some(class), prefill: Some(ms(time)), ..Demand::default() }
}

fn share(demands: &[(&str, Demand)]) -> Allowance {
    let demands = demands.iter().map(|(name, demand)| (ModelName::from(*name), demand.clone())).collect();
    let mut allowance = Allowance::default();
    allowance.share_out(&demands, LIMITS);
    allowance
}

#[test]
fn a_prompt_of_one_model_is_bounded_by_what_another_decodes() {
    let mut tick = share(&[("a", decodes(100)), ("b", prefills(1, 9000))]);
    assert_eq!((tick.take(&"b".into()), tick.take(&"a".into())), (Some(ms(150)), None));
    let mut alone = share(&[("b", prefills(1, 9000))]);
    assert_eq!(alone.take(&"b".into()), Some(ms(500)), "nobody waits for a token");
}

#[test]
fn models_with_prompts_share_evenly_and_use_what_is_left() {
    let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 9000))]);
    assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (Some(ms(75)), Some(ms(75))));
    let mut one = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(1, 50))]);
    assert_eq!((one.take(&"b".into()), one.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
    let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 40)), ("c", prefills(1, 50))]);
    assert_eq!(short.take(&"b".into()), Some(ms(40 + 60)));
    short.give_back(ms(60));
    assert_eq!(short.take(&"c".into()), Some(ms(110)));
    short.give_back(ms(60));
    assert_eq!(short.take(&"a".into()), Some(ms(60)), "for a prompt that begins in this tick");
}

#[test]
fn a_higher_class_comes_first() {
    let mut long = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 9000))]);
    assert_eq!((long.take(&"b".into()), long.take(&"c".into())), (None, Some(ms(150))));
    let mut short = share(&[("a", decodes(100)), ("b", prefills(1, 9000)), ("c", prefills(0, 50))]);
    assert_eq!((short.take(&"b".into()), short.take(&"c".into())), (Some(ms(100)), Some(ms(50))));
}

#[test]
fn what_is_not_known_counts_as_much_and_somebody_always_prefills() {
    let unknown = Demand { class: Some(1), ..Demand::default() };
    let mut tick = share(&[("a", decodes(100)), ("b", unknown.clone()), ("c", prefills(1, 50))]);
    assert_eq!((tick.take(&"c".into()), tick.take(&"b".into())), (Some(ms(50)), Some(ms(100))));
    let mut no_time = share(&[("a", decodes(0)), ("b", unknown), ("c", prefills(2, 9000))]);
    assert_eq!((no_time.take(&"c".into()), no_time.take(&"b".into())), (None, Some(ms(0))));
    let mut idle = share(&[("a", decodes(0))]);
    assert_eq!(idle.take(&"a".into()), Some(ms(0)), "the first prompt of all begins");
}

#[test]
fn rows_and_prompts_that_do_not_both_fit_have_the_rest_in_turn() {
    let wanted = [("a", rows("a", 1, [100, 150, 400])), ("b", prefills(1, 9000))];
    let wanted = wanted.map(|(name, demand)| (ModelName::from(name), demand)).into();
    let mut tick = Allowance::default();
    for turn in [Turn::Prompts, Turn::Rows, Turn::Prompts, Turn::Rows] {
        tick.share_out(&wanted, LIMITS);
        assert_eq!(tick.turn(), turn);
        let of_prompts = if turn == Turn::Prompts { tick.take(&"b".into()) } else { None };
        let of_rows = tick.take_rows(&"a".into());
        if turn == Turn::Prompts {
            assert_eq!((of_prompts, of_rows), (Some(ms(100)), ms(0)), "100 of 250 are left");
        } else {
            assert_eq!(of_rows, ms(100));
            tick.give_back_rows(ms(30), true);
            assert_eq!(tick.take(&"b".into()), Some(ms(30)), "what they leave");
        }
    }
}

#[test]
fn rows_that_leave_prompts_half_of_the_rest_go_with_them() {
    let mut tick = share(&[("a", rows("a", 1, [100, 100, 150])), ("b", prefills(1, 9000))]);
    assert_eq!((tick.turn(), tick.take_rows(&"a".into())), (Turn::Both, ms(50)));
    assert_eq!(tick.take(&"b".into()), Some(ms(100)));
    let mut alone = share(&[("a", rows("a", 1, [100, 200, 900]))]);
    assert_eq!((alone.turn(), alone.take_rows(&"a".into())), (Turn::Both, ms(50)), "no more than the limit");
}

#[test]
fn prompts_have_a_turn_however_much_is_in_every_step() {
    let equal = Demand { rows: rows("c", 1, [100; 3]).rows, ..Demand::default() };
    let mut tick = share(&[("a", decodes(100)), ("c", equal.clone()), ("b", prefills(1, 9000))]);
    assert_eq!(tick.take(&"b".into()), Some(ms(100)), "as one more connection");
    let mut own = rows("a", 1, [100, 250, 400]);
    own.rows.iter_mut().for_each(|rows| rows.yielding = ms(150));
    let mut tick = share(&[("a", Demand { class: Some(1), ..own })]);
    assert_eq!((tick.turn(), tick.take(&"a".into())), (Turn::Prompts, Some(ms(150))), "their own rows wait");
}

#[test]
fn a_model_of_a_lower_class_has_part_of_the_rest() {
    let mut tick = share(&[("a", rows("a", 0, [100; 3])), ("b", rows("b", 1, [400; 3]))]);
    assert_eq!((tick.class(), tick.take_rows(&"b".into())), (0, ms(150)));
    assert_eq!(tick.measure().time, ms(100));
    // One client's streams on both are measured together.
    let tick = share(&[("a", rows("a", 1, [100; 3])), ("b", rows("a", 1, [400; 3]))]);
    assert_eq!((tick.measure().time, tick.measure().models), (ms(500), 2));
}

#[test]
fn rows_that_nobody_expected_are_taken_off_the_time_of_prompts() {
    let wanted = [("a", decodes(100)), ("b", prefills(1, 9000))];
    let mut tick = share(&wanted);
    tick.meet(&"b".into(), ms(60), ms(60));
    assert_eq!((tick.take(&"b".into()), tick.grants_least()), (Some(ms(90)), false));
    // They have been left out for once, and have the next turn.
    tick.share_out(&wanted.map(|(name, demand)| (ModelName::from(name), demand)).into(), LIMITS);
    tick.meet(&"b".into(), ms(120), ms(0));
    assert_eq!((tick.turn(), tick.is_crowded(), tick.grants_least()), (Turn::Prompts, true, true));
    assert_eq!(tick.take(&"b".into()), Some(ms(150)), "rows that yield are not there");
}
