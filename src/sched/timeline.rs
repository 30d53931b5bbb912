//! How long each step took on the device, which runs the steps of all models one after another. The host sees
//! when it launches a step and when it has its results. A launch may return at once, as on GPUs, or only when
//! most of the step is done, as on a CPU, where the host then comes late for the results.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Moment;

/// Least time that the host waits for results that are not there yet.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// The steps that were launched, in their order.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// When those were launched that were not collected, the oldest first.
    launches: VecDeque<Moment>,
    /// Number of the oldest of them.
    first: u64,
    /// When the last step that was collected ended.
    ended: Moment,
}

impl Timeline {
    /// Notes that the launch of a step begins; returns the step's number.
    pub fn launch(&mut self, now: Moment) -> u64 {
        self.launches.push_back(now);
        self.first + self.launches.len() as u64 - 1
    }

    /// Returns how long a step took whose results were asked for at `asked` and are there `now`. Steps before
    /// it that were not collected never will be.
    pub fn collect(&mut self, step: u64, asked: Moment, now: Moment) -> Duration {
        let mut launched = now;
        while self.first <= step {
            launched = self.launches.pop_front().unwrap_or(now);
            self.first += 1;
        }
        // If they had been there for a while, the host was busy with the next launch.
        let next = self.launches.front().filter(|_| now - asked < WAIT_MIN);
        let end = next.map_or(now, |next| now.min(*next));
        let took = end - launched.max(self.ended);
        self.ended = end;
        took
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::at(Duration::from_millis(ms))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn steps_that_are_waited_for_take_the_time_since_the_one_before() {
        let mut timeline = Timeline::default();
        let (a, b) = (timeline.launch(at(0)), timeline.launch(at(1)));
        assert_eq!(timeline.collect(a, at(2), at(40)), ms(40));
        let next = timeline.launch(at(41));
        assert_eq!(timeline.collect(b, at(42), at(140)), ms(100), "it began when the other ended");
        assert_eq!(timeline.collect(next, at(150), at(180)), ms(40));
    }

    #[test]
    fn steps_that_ended_during_the_next_launch_took_the_time_of_their_own() {
        let mut timeline = Timeline::default();
        // Each launch returns when its step is nearly done.
        let (a, b) = (timeline.launch(at(0)), timeline.launch(at(40)));
        assert_eq!(timeline.collect(a, at(140), at(140)), ms(40));
        let next = timeline.launch(at(140));
        assert_eq!(timeline.collect(b, at(180), at(180)), ms(100));
        assert_eq!(timeline.collect(next, at(180), at(185)), ms(45));
    }

    #[test]
    fn the_results_of_a_step_alone_may_be_late() {
        let mut timeline = Timeline::default();
        let step = timeline.launch(at(10));
        assert_eq!(timeline.collect(step, at(60), at(60)), ms(50));
    }

    #[test]
    fn a_step_that_is_never_collected_leaves_the_others_their_times() {
        let mut timeline = Timeline::default();
        let (_lost, b) = (timeline.launch(at(0)), timeline.launch(at(10)));
        assert_eq!(timeline.collect(b, at(20), at(90)), ms(80));
    }
}
