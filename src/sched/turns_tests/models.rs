//! Several models on one device.

use super::*;

#[test]
fn a_batch_of_another_model_slows_a_stream_down_as_one_of_its_own_does() {
    for (stream, batch) in [(Priority::Normal, Priority::Normal), (Priority::Interactive, Priority::Normal)] {
        let mut device = Device::with(&[("m", CPU), ("other", CPU)]);
        device.add("m", "honest", stream, (4, 0));
        device.ticks(40);
        device.add("other", "batch", batch, (16, 0));
        device.settle();
        device.ticks(500);
        assert!(device.p95("honest") <= 2.6 * 20.0, "{}", device.p95("honest"));
        assert_eq!(device.waited_max("honest"), 1);
        assert!(device.served("batch") >= 500 * 4, "{}", device.served("batch"));
        device.add("other", "batch", batch, (2, 3000));
        device.settle();
        device.ticks(500);
        assert!(device.p95("honest") <= 3.0 * 20.0, "{}", device.p95("honest"));
        assert!(device.prefilled("batch") >= 500, "{}", device.prefilled("batch"));
    }
}

#[test]
fn rows_that_cost_next_to_nothing_all_run_whatever_other_models_take() {
    let slow = Costs { base: 500.0, row: 1.0, ..GPU };
    for (first, second) in [(slow, CPU), (Costs { base: 9.0, ..GPU }, GPU), (GPU, Costs { base: 9.0, ..GPU })]
    {
        let mut device = Device::with(&[("m", first), ("other", second)]);
        device.rows("batch", 16);
        device.add("other", "single", Priority::Normal, (1, 0));
        device.settle();
        device.ticks(100);
        // A step or two of fewer rows tell that those take no less.
        let served = (device.served("batch"), device.served("single"));
        assert!(served.0 >= 16 * 97 && served.1 == 100, "{first:?} {second:?}: {served:?}");
    }
}

#[test]
fn streams_of_one_client_on_two_models_are_not_measured_by_one_of_them() {
    let mut device = Device::with(&[("m", CPU), ("other", CPU)]);
    device.rows("a", 2);
    device.add("other", "a", Priority::Normal, (12, 0));
    device.ticks(100);
    assert!(device.runs.iter().all(|run| run.served.len() == 100));
}
