//! Plots a sweep: tokens per second and time to first token over the load, in two panels of one SVG. Uses no
//! fonts or scripts; its colours follow the reader's light or dark scheme.

use std::fmt::Write as _;

use super::plan::Load;
use super::row::Row;

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 380.0;
/// Left edges of the two plots, in pixels; their top edge and size follow.
const LEFTS: [f64; 2] = [64.0, 524.0];
const TOP: f64 = 84.0;
const PLOT_WIDTH: f64 = 340.0;
const PLOT_HEIGHT: f64 = 220.0;
/// Maximum number of labels on an axis; more would overlap.
const LABELS_MAX: usize = 12;

const STYLE: &str = "\
:root { color-scheme: light dark }
svg { font: 12px system-ui, sans-serif }
.paper { fill: #ffffff } text { fill: #1f2328 } .quiet { fill: #59636e } .grid { stroke: #d1d9e0 }
.a { stroke: #0969da; fill: #0969da } .b { stroke: #bc4c00; fill: #bc4c00 } .c { stroke: #8250df; fill: #8250df }
path.line { fill: none; stroke-width: 2; stroke-linejoin: round } text.a, text.b, text.c { stroke: none }
.title { font-size: 15px; font-weight: 600 } .end { text-anchor: end } .middle { text-anchor: middle }
@media (prefers-color-scheme: dark) {
.paper { fill: #0d1117 } text { fill: #f0f6fc } .quiet { fill: #9198a1 } .grid { stroke: #3d444d }
.a { stroke: #4493f8; fill: #4493f8 } .b { stroke: #f0883e; fill: #f0883e } .c { stroke: #ab7df8; fill: #ab7df8 }
}
";

struct Series {
    name: &'static str,
    class: char,
    /// One value per row; None if not measured.
    values: Vec<Option<f64>>,
}

/// Plots the rows; `title` and `subtitle` are shown unchanged.
pub(super) fn plot(title: &str, subtitle: &str, rows: &[Row]) -> String {
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by(|a, b| a.load.value().total_cmp(&b.load.value()));
    let loads: Vec<f64> = rows.iter().map(|row| row.load.value()).collect();
    let axis = match rows.first().map(|row| row.load) {
        Some(Load::Open(_)) => "requests arriving per second",
        Some(Load::Closed(_)) | None => "requests at once",
    };
    let latency = |pick: fn(&super::row::Spread) -> f64| {
        rows.iter().map(|row| row.time_to_first_token.as_ref().map(pick)).collect()
    };
    let throughput = rows.iter().map(|row| Some(row.output_tokens_per_s())).collect();
    let panels = [
        ("Tokens generated per second", vec![Series { name: "", class: 'a', values: throughput }]),
        (
            "Time to first token, seconds",
            vec![
                Series { name: "p50", class: 'a', values: latency(|spread| spread.p50) },
                Series { name: "p95", class: 'b', values: latency(|spread| spread.p95) },
                Series { name: "p99", class: 'c', values: latency(|spread| spread.p99) },
            ],
        ),
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"title\" x=\"20\" y=\"28\">{title}</text>\n\
         <text class=\"quiet\" x=\"20\" y=\"47\">{subtitle}</text>\n",
        title = escape(title),
        subtitle = escape(subtitle),
    );
    for ((name, series), left) in panels.into_iter().zip(LEFTS) {
        panel(&mut svg, left, name, &series, (&loads, axis));
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, left: f64, name: &str, series: &[Series], (loads, axis): (&[f64], &str)) {
    let largest = series.iter().flat_map(|series| &series.values).flatten().fold(0.0_f64, |a, b| a.max(*b));
    let ticks = ticks(largest);
    let top = ticks.last().copied().unwrap_or(1.0);
    let y = |value: f64| TOP + PLOT_HEIGHT * (1.0 - value / top);
    // Equal distances: sweeps double, and a linear scale would crowd the small levels.
    let step = PLOT_WIDTH / loads.len().max(1) as f64;
    let x = |index: usize| left + step * (index as f64 + 0.5);

    put(svg, format_args!("<text x=\"{left}\" y=\"{}\">{name}</text>", TOP - 14.0));
    for tick in &ticks {
        let (right, at) = (left + PLOT_WIDTH, y(*tick));
        put(svg, format_args!("<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/>"));
        let (at, label) = (at + 4.0, number(*tick));
        put(svg, format_args!("<text class=\"quiet end\" x=\"{}\" y=\"{at:.1}\">{label}</text>", left - 8.0));
    }
    let bottom = TOP + PLOT_HEIGHT;
    for (index, load) in loads.iter().enumerate().step_by(loads.len().div_ceil(LABELS_MAX).max(1)) {
        let (x, y, label) = (x(index), bottom + 18.0, number(*load));
        put(svg, format_args!("<text class=\"quiet middle\" x=\"{x:.1}\" y=\"{y}\">{label}</text>"));
    }
    let (middle, under) = (left + PLOT_WIDTH / 2.0, bottom + 40.0);
    put(svg, format_args!("<text class=\"quiet middle\" x=\"{middle}\" y=\"{under}\">{axis}</text>"));
    // From the top down, so that labels of lines that meet move downwards.
    let mut lowest_label = f64::NEG_INFINITY;
    for Series { name, class, values } in series.iter().rev() {
        let points: Vec<_> =
            values.iter().enumerate().filter_map(|(i, value)| value.map(|value| (i, value))).collect();
        let path: Vec<_> = points.iter().map(|(i, value)| format!("{:.1} {:.1}", x(*i), y(*value))).collect();
        put(svg, format_args!("<path class=\"line {class}\" d=\"M{}\"/>", path.join("L")));
        for (i, value) in &points {
            let (x, y, load, value) = (x(*i), y(*value), number(loads[*i]), number(*value));
            let dot =
                format_args!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\">").to_string();
            put(svg, format_args!("{dot}<title>{name} {value} at {load}</title></circle>"));
        }
        if let Some((i, value)) = points.last().filter(|_| !name.is_empty()) {
            lowest_label = (y(*value) + 4.0).max(lowest_label + 14.0);
            let x = x(*i) + 9.0;
            put(
                svg,
                format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{lowest_label:.1}\">{name}</text>"),
            );
        }
    }
}

fn put(svg: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing into a string cannot fail.
    _ = writeln!(svg, "{line}");
}

/// Returns four to six round numbers, from 0 to the first one that is not below `largest`.
fn ticks(largest: f64) -> Vec<f64> {
    let largest = if largest > 0.0 { largest } else { 1.0 };
    let power = 10_f64.powf((largest / 5.0).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power).into_iter();
    let step = step.clone().find(|step| largest <= step * 5.0).unwrap_or(power * 10.0);
    let mut ticks = vec![0.0];
    while ticks[ticks.len() - 1] < largest {
        ticks.push(ticks.len() as f64 * step);
    }
    ticks
}

/// Formats a number with at most three significant digits.
fn number(value: f64) -> String {
    let digits = match value {
        _ if value >= 99.95 => 0,
        _ if value >= 9.995 => 1,
        _ if value >= 0.9995 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mlxd::clock::Moment;

    use super::super::row::{Done, Piece, Sample};
    use super::*;

    fn rows() -> Vec<Row> {
        [4_u32, 1, 2].map(Load::Closed).map(|load| row(load, load.value())).to_vec()
    }

    fn row(load: Load, seconds: f64) -> Row {
        let at = Moment::at(Duration::from_secs_f64(seconds));
        let pieces = vec![Piece { at, tokens: 10 }];
        let sample = Sample { long: false, start: Moment::default(), pieces, outcome: Ok(Done::default()) };
        Row::new(load, &[sample], Duration::from_secs(2), false)
    }

    #[test]
    fn the_picture_is_what_the_snapshot_says() {
        insta::assert_snapshot!(plot("mlxd: a <model>", "64 in & 64 out", &rows()));
    }

    #[test]
    fn one_level_none_and_failed_ones_are_drawn_too() {
        for rows in [&[][..], &rows()[..1], &[Row::new(Load::Open(0.5), &[], Duration::ZERO, false)]] {
            let svg = plot("t", "s", rows);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn ticks_are_round_and_reach_the_largest() {
        assert_eq!(ticks(128.1), [0.0, 50.0, 100.0, 150.0]);
        assert_eq!(ticks(9.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        for largest in [0.0013, 0.31, 0.99, 1.0, 2.6, 47.0, 51.0, 9_999.0, 12_345.0] {
            let ticks = ticks(largest);
            assert!(
                (4..=6).contains(&ticks.len()) && *ticks.last().unwrap() >= largest,
                "{largest}: {ticks:?}"
            );
        }
    }

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        let shown = [0.0, 0.25, 1.0, 2.5, 16.0, 128.1, 2_500.0, 0.0013].map(number);
        assert_eq!(shown, ["0", "0.25", "1", "2.5", "16", "128", "2500", "0.0013"]);
    }
}
