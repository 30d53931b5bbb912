//! Any rows and prompts, whatever steps take.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whoever's a row is, whatever steps take, it decodes within a bounded number of steps, and each prompt
    /// moves on; without prompts, who has no more rows than any other of the highest class decodes in every
    /// step.
    #[test]
    fn every_row_decodes_within_a_bounded_number_of_steps(
        rows in prop::collection::vec((0..3_u32, 0..3_u32, 0..3_u32), 1..9),
        prompts in prop::collection::vec((0..4_u32, 0..3_u32), 0..3),
        (base, row, token, noise) in (0.1..9.0_f64, 0.0..9.0_f64, 0.01..9.0_f64, 1.0..1.5_f64),
    ) {
        let mut device = Device::new(Costs { base, row, token, noise });
        let priority = |class| match class {
            0 => Priority::Interactive,
            1 => Priority::Normal,
            _ => Priority::Background,
        };
        for (connection, client, class) in &rows {
            device.add("m", &format!("{connection}/{client}"), priority(*class), (1, 0));
        }
        for (connection, class) in &prompts {
            device.add("m", &format!("{connection}/p"), priority(*class), (1, 700));
        }
        device.settle();
        device.ticks(600);
        // At most every second step has a row more, of every seventh of those of its class, and around a row
        // there are three circles of which each has its turn.
        let bound = 2 * 7 * 3 * u32::try_from(rows.len()).unwrap();
        for run in device.runs.iter().filter(|run| run.prompt == 0) {
            let waited = run.waited_max.max(device.ticks - run.last);
            prop_assert!(waited <= bound, "{:?} {:?} waited {waited} steps", run.owner, run.priority);
        }
        for run in device.runs.iter().filter(|run| run.prompt > 0) {
            // Lower classes wait for higher ones, which have another prompt as soon as one is done.
            let first = prompts.iter().all(|(_, class)| *class >= run.priority.own_class());
            let of_owner = device.runs.iter().filter(|other| other.owner == run.owner);
            let prefilled: u32 = of_owner.map(|run| run.prefilled).sum();
            prop_assert!(!first || prefilled >= 100, "{:?} {prefilled} tokens", run.owner);
        }
        let highest = rows.iter().map(|(_, _, class)| *class).min().unwrap();
        let count = |connection| {
            rows.iter().filter(|(other, _, class)| (*other, *class) == (connection, highest)).count()
        };
        let fewest = (0..3).map(count).filter(|count| *count > 0).min();
        for connection in (0..3).filter(|connection| Some(count(*connection)) == fewest) {
            let name = owner(&connection.to_string()).connection;
            let of_highest = |run: &&Run| {
                run.owner.connection == name && run.prompt == 0 && run.priority.own_class() == highest
            };
            let waited = device.runs.iter().filter(of_highest).map(|run| run.waited_max).max();
            prop_assert!(!prompts.is_empty() || waited == Some(1), "{connection}: {waited:?}");
        }
    }
}
