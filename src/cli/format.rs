//! Human-readable quantities and tables.

use std::time::{Duration, SystemTime};

use mlxd::config::KeepAlive;
use mlxd_client::v1::{Timings, Usage};

/// Formats bytes with three digits and a binary unit.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count, 1024, &["B", "KiB", "MiB", "GiB", "TiB"], " ")
}

/// Formats a count with three digits and a suffix, like model names: 135M, 7.24B.
pub(crate) fn count(count: u64) -> String {
    scaled(count, 1000, &["", "K", "M", "B", "T"], "")
}

fn scaled(number: u64, step: u64, units: &[&str], space: &str) -> String {
    let mut divisor = 1_u64;
    let mut unit = 0;
    // Values from 999.5 would round to a fourth digit.
    while unit + 1 < units.len() && number / divisor >= step.min(1000) {
        divisor *= step;
        unit += 1;
    }
    if unit == 0 {
        return format!("{number}{space}{}", units[0]);
    }
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = number as f64 / divisor as f64;
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$}{space}{}", units[unit])
}

/// Formats a duration in its two largest units.
pub(crate) fn duration(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        86_400.. => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// Converts a stay to a protobuf duration; negative is forever.
pub(crate) fn keep_alive(keep_alive: KeepAlive) -> prost_types::Duration {
    let forever = prost_types::Duration { seconds: -1, nanos: 0 };
    match keep_alive {
        KeepAlive::For(time) => prost_types::Duration::try_from(time).unwrap_or(forever),
        KeepAlive::Forever => forever,
    }
}

/// Converts a protobuf duration to seconds; 0 if unset.
pub(crate) fn seconds(length: Option<&prost_types::Duration>) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a double holds every second of a process exactly")]
    length.map_or(0.0, |length| length.seconds as f64 + f64::from(length.nanos) * 1e-9)
}

/// Computes tokens per second after the first token; None without a second one.
pub(crate) fn tokens_per_second(usage: &Usage, timings: &Timings) -> Option<f64> {
    let decode = seconds(timings.decode_time.as_ref());
    let steps = usage.completion_tokens.saturating_sub(1);
    (steps > 0 && decode > 0.0).then(|| f64::from(steps) / decode)
}

/// Formats the speed of a generation as one line.
pub(crate) fn speed(usage: &Usage, timings: &Timings) -> String {
    let rate =
        tokens_per_second(usage, timings).map_or_else(String::new, |rate| format!(" at {rate:.1} tokens/s"));
    format!(
        "prompt {} tokens ({} cached), first token after {:.0} ms, {} tokens{rate}, {:.2} s in total",
        usage.prompt_tokens,
        usage.cached_tokens,
        seconds(timings.time_to_first_token.as_ref()) * 1e3,
        usage.completion_tokens,
        seconds(timings.total_time.as_ref()),
    )
}

/// Returns how much longer something stays if nobody uses it: `end` is when it would go, none is never.
pub(crate) fn until(
    pinned: bool,
    end: Option<prost_types::Timestamp>,
    never: &str,
    now: SystemTime,
) -> String {
    let end = end.and_then(|time| SystemTime::try_from(time).ok());
    match end {
        _ if pinned => "pinned".to_owned(),
        Some(end) => format!("in {}", duration(end.duration_since(now).unwrap_or_default())),
        None => never.to_owned(),
    }
}

/// Formats rows under a header as a table.
pub(crate) fn page(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let header = header.iter().map(|cell| (*cell).to_owned()).collect();
    table(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

/// Formats rows as a table: columns as wide as their widest cell, no trailing white space.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits() {
        let shown = [0, 999, 1000, 1024, 538_060_032, 8_589_934_592, 1_073_000_000].map(bytes);
        assert_eq!(shown, ["0 B", "999 B", "0.98 KiB", "1.00 KiB", "513 MiB", "8.00 GiB", "1.00 GiB"]);
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn counts_read_like_model_names() {
        assert_eq!([0, 999, 134_515_008, 7_241_732_096].map(count), ["0", "999", "135M", "7.24B"]);
    }

    #[test]
    fn durations_have_two_units() {
        let shown = [59, 61, 3_725, 90_000].map(|seconds| duration(Duration::from_secs(seconds)));
        assert_eq!(shown, ["59 s", "1 min 1 s", "1 h 2 min", "1 d 1 h"]);
    }

    #[test]
    fn columns_align_and_lines_do_not_trail() {
        let rows = [["A", "LONG"], ["wide", "x"]].map(|row| row.map(String::from).to_vec());
        assert_eq!(table(&rows), "A     LONG\nwide  x\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn speed_counts_the_tokens_after_the_first() {
        let duration =
            |milliseconds: i32| Some(prost_types::Duration { seconds: 0, nanos: milliseconds * 1_000_000 });
        let usage = Usage { prompt_tokens: 12, cached_tokens: 4, completion_tokens: 11, reasoning_tokens: 0 };
        let timings = Timings {
            time_to_first_token: duration(20),
            decode_time: duration(200),
            total_time: duration(220),
            ..Timings::default()
        };
        assert_eq!(
            speed(&usage, &timings),
            "prompt 12 tokens (4 cached), first token after 20 ms, 11 tokens at 50.0 tokens/s, 0.22 s in total"
        );
        assert_eq!(tokens_per_second(&Usage { completion_tokens: 1, ..usage }, &timings), None);
    }
}
