//! Connections, classes and prompts of one model.

use super::*;

#[test]
fn a_connection_of_many_rows_slows_another_down_no_more_than_one_of_as_many_would() {
    for names in 0..2 {
        let mut device = four_streams(Priority::Normal);
        (0..28).for_each(|row| device.rows(&format!("flood/{}", row * names), 1));
        device.settle();
        device.ticks(500);
        assert!(device.p95("honest") <= 2.5 * 20.0, "{}", device.p95("honest"));
        assert_eq!(device.waited_max("honest"), 1, "all four are in every step");
        assert!(device.waited_max("flood") <= 28 / 4 + 1, "{}", device.waited_max("flood"));
        let served = [device.served("honest"), device.served("flood")];
        assert!(served[1] > served[0], "it has as much, and what is left: {served:?}");
    }
}

#[test]
fn short_answers_to_cached_prompts_are_rows_like_others() {
    for (prompt, at_once) in [(1, false), (4, false), (1, true), (4, true)] {
        let mut device = four_streams(Priority::Normal);
        let mut names = 0;
        for tick in 0..900 {
            // Each draws its first token, and one more, and goes.
            device.runs.retain(|run| run.sequence <= 4 || run.served.len() < 2);
            for run in device.runs.iter_mut().filter(|run| run.sequence > 4) {
                let drawn = run.prompt > 0 && run.prefilled >= run.prompt;
                (run.prompt, run.pending) = if drawn { (0, 1) } else { (run.prompt, run.pending) };
            }
            let places = 4 + 28 - device.runs.len();
            for _ in 0..if at_once && places < 28 { 0 } else { places } {
                names += 1;
                device.add("m", &format!("flood/{names}"), Priority::Normal, (1, prompt));
            }
            if tick == 60 {
                device.runs.iter_mut().filter(|run| run.sequence <= 4).for_each(|run| run.served.clear());
            }
            device.tick();
        }
        assert!(device.p95("honest") <= 2.65 * 20.0, "{} {prompt}", device.p95("honest"));
        assert!(names >= 600, "{names} calls");
    }
}

#[test]
fn prompts_of_a_connection_with_many_rows_run_in_the_place_of_those() {
    let mut device = four_streams(Priority::Normal);
    device.rows("flood", 24);
    device.add("m", "flood", Priority::Normal, (4, 3000));
    device.settle();
    device.ticks(500);
    assert!(device.p95("honest") <= 2.6 * 20.0, "{}", device.p95("honest"));
    assert_eq!(device.waited_max("honest"), 1);
    assert!(device.waited_max("flood") <= 40, "{}", device.waited_max("flood"));
    assert!(device.prefilled("flood") >= 500 * 2, "{}", device.prefilled("flood"));
}

#[test]
fn prompts_of_a_third_connection_move_on_beside_many_rows() {
    let mut device = four_streams(Priority::Normal);
    device.rows("flood", 28);
    device.add("m", "third", Priority::Normal, (1, 3000));
    device.settle();
    device.ticks(500);
    assert!(device.p95("honest") <= 2.9 * 20.0, "{}", device.p95("honest"));
    assert!(device.prefilled("third") >= 500 * 2, "{}", device.prefilled("third"));
}

#[test]
fn prompts_beside_one_connection_have_what_is_left_in_every_step() {
    for name in ["third", "honest"] {
        let mut device = Device::new(Costs { token: 2.0, ..CPU });
        device.rows("honest", 4);
        device.ticks(40);
        device.add("m", name, Priority::Normal, (1, 3000));
        device.settle();
        device.ticks(500);
        let gaps = device.p95("honest");
        assert!(gaps <= 2.3 * 20.0, "{gaps} beside a prompt of {name}");
        assert!(device.prefilled(name) >= 450 * 12, "{}", device.prefilled(name));
    }
}

#[test]
fn interactive_rows_are_slowed_down_little_by_any_number_of_lower_ones() {
    let mut device = four_streams(Priority::Interactive);
    (0..20).for_each(|other| device.rows(&format!("n{other}"), 1));
    device.add("m", "batch", Priority::Background, (8, 0));
    device.add("m", "other", Priority::Normal, (2, 2000));
    device.settle();
    device.ticks(1000);
    assert!(device.p95("honest") <= 2.6 * 20.0, "{}", device.p95("honest"));
    assert_eq!(device.waited_max("honest"), 1);
    assert!(device.prefilled("other") >= 1000 * 2, "{}", device.prefilled("other"));
    let others: Vec<usize> = (0..20).map(|other| device.served(&format!("n{other}"))).collect();
    assert!(others.iter().max().unwrap() - others.iter().min().unwrap() <= 1, "in rotation: {others:?}");
    let (normal, background) = (others.iter().sum::<usize>(), device.served("batch"));
    assert!((background * 19..background * 21).contains(&(normal * 10)), "{normal} to {background}");
}

#[test]
fn a_connection_of_one_row_does_not_squeeze_one_of_four() {
    let mut device = four_streams(Priority::Normal);
    device.rows("single", 1);
    device.settle();
    device.ticks(500);
    assert!(device.p95("honest") <= 2.05 * 20.0, "{}", device.p95("honest"));
    device.add("m", "single", Priority::Normal, (1, 2000));
    device.settle();
    device.ticks(500);
    assert!(device.p95("honest") <= 3.5 * 20.0, "{}", device.p95("honest"));
}

#[test]
fn who_has_few_rows_for_a_moment_makes_nobody_wait() {
    let mut device = four_streams(Priority::Normal);
    for tick in 0..400 {
        // One row or two, for three of ten ticks.
        if tick % 10 == 0 {
            device.rows("short", 1 + tick % 20 / 10);
        } else if tick % 10 == 3 {
            device.runs.truncate(4);
        }
        device.tick();
    }
    assert_eq!(device.waited_max("honest"), 1);
    assert!(device.p95("honest") <= 1.4 * 20.0, "{}", device.p95("honest"));
}

#[test]
fn the_rows_of_one_client_and_class_all_decode_in_every_step() {
    for (costs, clients) in [(CPU, 1), (CPU, 2), (GPU, 1), (GPU, 16)] {
        let mut device = Device::new(costs);
        for row in 0..16 {
            let client = row % clients;
            // On a GPU also those of sixteen connections.
            device.rows(&if clients == 16 { format!("c{client}") } else { format!("c/{client}") }, 1);
        }
        device.ticks(100);
        assert!(device.runs.iter().all(|run| run.served.len() == 100), "{costs:?} {clients}");
    }
}

#[test]
fn on_a_gpu_prompts_do_not_make_rows_of_lower_classes_wait() {
    let mut device = Device::new(GPU);
    device.add("m", "a", Priority::Interactive, (1, 0));
    device.add("m", "b", Priority::Background, (8, 0));
    device.add("m", "c", Priority::Normal, (2, 3000));
    device.settle();
    device.ticks(100);
    assert_eq!((device.waited_max("a"), device.waited_max("b")), (1, 1));
    assert!(device.prefilled("c") >= 50 * 90, "{}", device.prefilled("c"));
}

#[test]
fn principals_share_before_their_connections_do() {
    let mut device = Device::new(CPU);
    device.rows("one", 4);
    (0..7).for_each(|number| device.rows(&format!("c{number}"), 4));
    // All but the first are of another user.
    device.runs.append(&mut device.newcomers);
    device.runs[4..].iter_mut().for_each(|run| run.owner.principal = "q".into());
    let owners: Vec<Owner> = device.runs.iter().map(|run| run.owner.clone()).collect();
    let shares = &mut device.models.get_mut(&"m".into()).unwrap().0;
    *shares = Shares::default();
    owners.iter().for_each(|owner| shares.arrive(owner));
    device.settle();
    device.ticks(500);
    assert_eq!(device.waited_max("one"), 1);
    assert!(device.p95("one") <= 2.5 * 20.0, "{}", device.p95("one"));
    let served: Vec<usize> = (0..7).map(|number| device.served(&format!("c{number}"))).collect();
    assert!(served.iter().max().unwrap() - served.iter().min().unwrap() <= 2, "{served:?}");
}

#[test]
fn who_comes_and_goes_beside_many_rows_has_its_gaps_at_once() {
    let mut device = Device::new(CPU);
    device.rows("single", 1);
    device.ticks(40);
    device.runs.clear();
    device.rows("flood", 28);
    device.settle();
    let mut gaps = vec![];
    for _ in 0..10 {
        // An answer of 60 tokens for each of four streams, and a pause.
        device.rows("honest", 4);
        device.ticks(60);
        for run in device.of("honest") {
            gaps.extend(run.served.windows(2).map(|pair| pair[1] - pair[0]));
        }
        let owner = owner("honest");
        device.runs.retain(|run| run.owner != owner);
        device.ticks(10);
    }
    gaps.sort_by(f64::total_cmp);
    assert!(gaps[gaps.len() * 95 / 100] <= 2.7 * 20.0, "{:?}", &gaps[gaps.len() * 9 / 10..]);
}

#[test]
fn newcomers_do_not_keep_a_row_from_its_turn() {
    let mut device = four_streams(Priority::Normal);
    device.rows("flood", 10);
    device.settle();
    for number in 0..400 {
        // In the place of the last five, under new names.
        device.runs.truncate(4 + 5);
        (0..5).for_each(|more| device.rows(&format!("flood/{}", number * 5 + more), 1));
        device.tick();
    }
    let waited = device.runs[4..9].iter().map(|run| run.waited_max).max().unwrap();
    assert!(waited <= 20, "{waited} steps");
}
