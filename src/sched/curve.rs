//! What a step that only decodes takes by its number of rows: points learned from steps, and straight lines
//! between them. On a GPU the line is nearly flat, on a CPU it rises with the rows once there are a few.

use super::estimate::learn;

/// Weight of a step that is slower than others of as many rows: there are many, the host comes late to some
/// because it opens a slab or parks a cache, and for a second or two another program may be busy. What a step
/// takes when it is not is the measure of what a stream may wait.
const SLOWER_WEIGHT: f64 = 0.08;

/// Steps that count in full at a point that is new, or that was not seen for [`STALE_STEPS`] steps.
pub(super) const SETTLING_STEPS: u32 = 8;
const STALE_STEPS: u32 = 256;

/// More rows take no less time, and at most this power of their ratio as much: a little more than each its
/// part, since many rows are computed by other kernels than few. What is fresh bounds what is not by that.
const POWER_MAX: f64 = 1.15;

/// Factor by which a step is faster than was expected so that it tells nothing about others.
const ODD_FACTOR: f64 = 4.0;

/// Time by rows, in seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Curve {
    /// Ascending by rows, at most one in each range of [`range`].
    points: Vec<Point>,
}

#[derive(Clone, Copy, Debug)]
struct Point {
    rows: u32,
    time: f64,
    /// Steps that it was learned from, as far as they are not too old.
    seen: u32,
    /// Steps since the last of them.
    unseen: u32,
}

impl Point {
    /// Returns the farthest from 1 that the time of this many rows may be, as a factor on this point's.
    fn ratio_max(&self, rows: u32) -> f64 {
        (f64::from(rows) / f64::from(self.rows)).powf(POWER_MAX)
    }
}

/// Returns the number of the range of rows that have a point in common: single ones up to four, then halves
/// of octaves.
fn range(rows: u32) -> u32 {
    let below = rows.saturating_sub(1);
    if below < 4 { below } else { 2 * below.ilog2() + (below >> (below.ilog2() - 1) & 1) }
}

impl Curve {
    /// Returns the time of a step of `rows` rows; None while nothing is known. Beyond what was seen the last
    /// two points tell, below it the first two: it is no less than each row's part of what more of them took,
    /// and no more than those.
    pub(super) fn time(&self, rows: u32) -> Option<f64> {
        let place = |at: usize| self.points.get(at).map(|point| (point.rows, point.time));
        let first = place(0)?;
        let at = self.points.partition_point(|point| point.rows < rows);
        if at == 0 {
            let part = first.1 * f64::from(rows) / f64::from(first.0);
            return Some(place(1).map_or(part, |second| line(first, second, rows).max(part).min(first.1)));
        }
        let (from, to) = if at < self.points.len() { (at - 1, at) } else { (at.max(2) - 2, at - 1) };
        let last = place(to)?;
        let found = if from == to { first.1 } else { line(place(from)?, last, rows) };
        // More rows take no less, though the last point may be of an odd step, which bounds no others.
        Some(if at < self.points.len() { found } else { found.max(last.1) })
    }

    /// Learns from a step that only decoded.
    pub(super) fn observe(&mut self, rows: u32, took: f64) {
        self.points.iter_mut().for_each(|point| point.unseen = point.unseen.saturating_add(1));
        let expected = self.time(rows);
        let (Ok(at) | Err(at)) = self.points.binary_search_by_key(&range(rows), |point| range(point.rows));
        let known = self.points.get(at).is_some_and(|point| range(point.rows) == range(rows));
        let (Some(expected), true) = (expected, known) else {
            let below = at.checked_sub(1).map(|below| &self.points[below]);
            let bound = below.map_or(f64::INFINITY, |below| below.time * below.ratio_max(rows));
            self.points.insert(at, Point { rows, time: took.min(bound), seen: 1, unseen: 0 });
            return self.bound_others(at);
        };
        // The point goes along to where something was seen.
        let point = &mut self.points[at];
        if point.unseen > STALE_STEPS {
            point.seen = 0;
        }
        let weight = if point.seen < SETTLING_STEPS { 1.0 } else { SLOWER_WEIGHT };
        (point.rows, point.time) = (rows, learn(Some(expected), took, weight));
        (point.seen, point.unseen) = (point.seen.saturating_add(1), 0);
        // Once alone may be a mistake of who measured it.
        if took * ODD_FACTOR >= expected {
            self.bound_others(at);
        }
    }

    /// Bounds all other points by one that is fresh.
    fn bound_others(&mut self, at: usize) {
        let fresh = self.points[at];
        for (place, point) in self.points.iter_mut().enumerate() {
            let factor = fresh.ratio_max(point.rows);
            let (least, most) = if place < at { (factor, 1.0) } else { (1.0, factor) };
            point.time = point.time.max(fresh.time * least).min(fresh.time * most);
        }
    }

    /// Learns that a step is possible in this time: with few rows one takes no longer.
    pub(super) fn bound(&mut self, took: f64) {
        match self.points.first_mut().filter(|first| first.rows == 1) {
            Some(first) => first.time = first.time.min(took),
            None => self.points.insert(0, Point { rows: 1, time: took, seen: 0, unseen: 0 }),
        }
    }
}

/// Returns the time at `rows` on the line through two points.
fn line(a: (u32, f64), b: (u32, f64), rows: u32) -> f64 {
    let [from, to, at] = [a.0, b.0, rows].map(f64::from);
    a.1 + (b.1 - a.1) * (at - from) / (to - from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Learns from `steps` steps of each of these sizes.
    fn learned(sizes: &[(u32, f64)], steps: u32) -> Curve {
        let mut curve = Curve::default();
        for _ in 0..steps {
            sizes.iter().for_each(|&(rows, took)| curve.observe(rows, took));
        }
        curve
    }

    fn near(curve: &Curve, rows: u32, time: f64) -> bool {
        curve.time(rows).is_some_and(|found| (found / time - 1.0).abs() < 0.05)
    }

    #[test]
    fn ranges_follow_one_another() {
        let ranges: Vec<u32> = (1..=1024).map(range).collect();
        assert!(ranges.windows(2).all(|pair| (0..=1).contains(&(pair[1] - pair[0]))), "{ranges:?}");
        assert_eq!(
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17].map(range),
            [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
        );
    }

    #[test]
    fn what_was_seen_tells_what_lies_between_and_beyond() {
        let curve = learned(&[(4, 20.0), (32, 160.0)], 1);
        assert!(near(&curve, 4, 20.0) && near(&curve, 18, 90.0) && near(&curve, 46, 230.0), "{curve:?}");
        assert!(near(&curve, 2, 10.0), "{curve:?}");
        assert!(near(&learned(&[(8, 20.0), (32, 22.0)], 9), 1, 19.4), "fewer take nearly as long");
        assert!(
            near(&learned(&[(32, 160.0)], 9), 4, 20.0),
            "nothing says that fewer take longer than their part"
        );
        assert!(near(&learned(&[(4, 20.0)], 9), 32, 20.0), "nothing says that more take longer");
        assert_eq!(Curve::default().time(1), None);
    }

    #[test]
    fn an_odd_step_of_many_rows_makes_no_time_of_more_of_them_less() {
        let sizes = [1, 4, 8, 12, 16, 24, 25].map(|rows| (rows, 15.0 + 5.0 * f64::from(rows)));
        let mut curve = learned(&sizes, 30);
        curve.observe(25, 5.0);
        assert!(curve.time(32) >= curve.time(25), "{curve:?}");
        curve.observe(32, 175.0);
        assert!((1..=40).all(|rows| curve.time(rows) > Some(7.0)), "{curve:?}");
    }

    #[test]
    fn one_slow_step_of_many_rows_does_not_keep_them_from_being_tried_again() {
        let mut curve = learned(&[(4, 5.0)], 20);
        curve.observe(32, 900.0);
        assert!(curve.time(32) <= Some(5.0 * 11.0), "little more than each of the four's part");
        // As many rows as seem to fit in 2.3 times what four take; they take no longer.
        let steps = (0..40).find(|_| {
            let fit = (4..=32).rev().find(|&rows| curve.time(rows) <= Some(11.5)).unwrap();
            curve.observe(fit, 5.0);
            fit == 32
        });
        assert!(steps.is_some(), "{curve:?}");
    }

    #[test]
    fn what_is_seen_bounds_what_is_outdated() {
        let mut curve = learned(&[(12, 30.0), (32, 300.0)], 20);
        (0..20).for_each(|_| curve.observe(13, 56.0));
        assert!(curve.time(12) >= Some(48.0) && curve.time(32) <= Some(160.0), "{curve:?}");
    }

    #[test]
    fn another_program_for_a_second_changes_little_and_other_sizes_nothing() {
        let mut curve = learned(&[(1, 30.0), (8, 60.0)], 30);
        (0..20).for_each(|_| curve.observe(1, 45.0));
        assert!(curve.time(1) <= Some(36.0) && near(&curve, 8, 60.0), "{curve:?}");
        (0..20).for_each(|_| curve.observe(1, 20.0));
        assert!(near(&curve, 1, 20.0) && near(&curve, 8, 60.0), "{curve:?}");
    }

    #[test]
    fn more_rows_that_took_less_show_that_fewer_do_too() {
        let mut curve = learned(&[(4, 40.0)], 20);
        (0..20).for_each(|_| curve.observe(9, 25.0));
        assert!(near(&curve, 4, 25.0), "it was learned while another program was busy: {curve:?}");
        curve.bound(10.0);
        assert!(near(&curve, 1, 10.0) && near(&curve, 9, 25.0), "{curve:?}");
    }
}
