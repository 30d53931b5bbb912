//! The report of a run: a table, and JSON with the settings and definitions needed to interpret it later.

use mlxd_client::v1::{ModelInfo, ServerCapabilities};
use serde_json::{Value, json};

use super::plan::Load;
use super::row::{Row, Spread};
use crate::cli::format;

/// Formats the rows as a table, and those of long prompts, if any, as a second one.
pub(super) fn table(rows: &[Row]) -> String {
    let load = match rows.first().map(|row| row.load) {
        Some(Load::Open(_)) => "REQUESTS/S",
        Some(Load::Closed(_)) | None => "AT ONCE",
    };
    let header = [
        load,
        "REQUESTS",
        "OUT TOK/S",
        "IN TOK/S",
        "TTFT MS",
        "INTER-TOKEN MS",
        "QUEUE MS",
        "CACHED",
        "ERRORS",
    ];
    let mut text = format::table(&lines(&header, rows.iter().map(|row| Some(line(row)))));
    let header = [load, "LONG PROMPTS", "THEIR TTFT MS", "OTHERS' GAPS BESIDE MS", "OTHERWISE MS"];
    let long = lines(&header, rows.iter().map(long_line));
    if long.len() > 1 {
        text.push('\n');
        text.push_str(&format::table(&long));
    }
    text.push_str("\nThree numbers with / are p50 / p95 / p99; queue is p50.\n");
    text
}

fn lines(header: &[&str], rows: impl Iterator<Item = Option<Vec<String>>>) -> Vec<Vec<String>> {
    let header = header.iter().map(|cell| (*cell).to_owned()).collect();
    std::iter::once(header).chain(rows.flatten()).collect()
}

fn line(row: &Row) -> Vec<String> {
    let interrupted = if row.interrupted { " (interrupted)" } else { "" };
    let errors: Vec<_> = row.errors.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    vec![
        row.load.value().to_string(),
        format!("{}{interrupted}", row.requests),
        format!("{:.1}", row.output_tokens_per_s()),
        format!("{:.1}", row.input_tokens_per_s()),
        spread(row.time_to_first_token),
        spread(row.inter_token_latency),
        row.queue_time.map_or_else(|| "-".into(), |spread| milliseconds(spread.p50)),
        row.cached_tokens.to_string(),
        if errors.is_empty() { "-".into() } else { errors.join(", ") },
    ]
}

fn long_line(row: &Row) -> Option<Vec<String>> {
    let long = row.long.as_ref()?;
    Some(vec![
        row.load.value().to_string(),
        long.requests.to_string(),
        spread(long.time_to_first_token),
        spread(long.others_gaps_beside),
        spread(long.others_gaps_apart),
    ])
}

fn spread(spread: Option<Spread>) -> String {
    spread
        .map_or_else(|| "-".into(), |Spread { p50, p95, p99 }| [p50, p95, p99].map(milliseconds).join(" / "))
}

fn milliseconds(seconds: f64) -> String {
    let value = seconds * 1e3;
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$}")
}

/// Converts the rows to JSON.
pub(super) fn rows(rows: &[Row]) -> Value {
    rows.iter().map(row_json).collect()
}

fn row_json(row: &Row) -> Value {
    let Row { load, requests, errors, wall_s, input_tokens, output_tokens, cached_tokens, .. } = row;
    let (concurrency, arrival_rate) = match load {
        Load::Closed(count) => (Some(count), None),
        Load::Open(rate) => (None, Some(rate)),
    };
    json!({
        "concurrency": concurrency,
        "arrival_rate_per_s": arrival_rate,
        "requests": requests,
        "errors": errors,
        "interrupted": row.interrupted,
        "wall_s": wall_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": cached_tokens,
        "output_tokens_per_s": row.output_tokens_per_s(),
        "input_tokens_per_s": row.input_tokens_per_s(),
        "time_to_first_token_s": spread_json(row.time_to_first_token),
        "inter_token_latency_s": spread_json(row.inter_token_latency),
        "queue_time_s": spread_json(row.queue_time),
        "long": row.long.as_ref().map(|long| json!({
            "requests": long.requests,
            "time_to_first_token_s": spread_json(long.time_to_first_token),
            "others_gaps_beside_s": spread_json(long.others_gaps_beside),
            "others_gaps_apart_s": spread_json(long.others_gaps_apart),
        })),
    })
}

fn spread_json(spread: Option<Spread>) -> Value {
    spread.map_or(Value::Null, |Spread { p50, p95, p99 }| json!({ "p50": p50, "p95": p95, "p99": p99 }))
}

/// Describes the daemon and the model as JSON.
pub(super) fn machine(server: &ServerCapabilities, model: &ModelInfo) -> Value {
    json!({
        "daemon_version": server.version,
        "mlx_version": server.mlx_version,
        "device": server.device,
        "platform": server.platform,
        "running_sequences_max": server.limits.as_ref().map(|limits| limits.running_sequences_max),
        "memory_budget_bytes": server.limits.as_ref().map(|limits| limits.memory_budget_bytes),
        "model": crate::cli::json::model(model),
    })
}

/// Defines the numbers of the report.
pub(super) fn definitions() -> Value {
    json!({
        "percentiles": "nearest rank: the smallest measured value that at least p % of the values do not exceed",
        "wall_s": "from the level's first request to the end of the last answer",
        "output_tokens_per_s": "received tokens, those of failed requests included, divided by wall_s",
        "input_tokens_per_s": "prompt tokens of successful requests, cached ones included, divided by wall_s",
        "time_to_first_token_s": "at this client, from the call to the first token; long prompts excluded",
        "inter_token_latency_s": "at this client, from one piece of a stream to the next, which may hold \
                                  several tokens; long prompts excluded",
        "queue_time_s": "reported by the daemon: from a request's arrival to its admission",
        "cached_tokens": "prompt tokens that the daemon reused from a KV cache",
        "others_gaps_beside_s": "inter-token gaps of streams without long prompts that overlap the time from \
                                 a long prompt's call to its first token",
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mlxd::clock::Moment;

    use super::super::row::{Done, Piece, Sample};
    use super::*;

    fn row(load: Load, mixed: bool) -> Row {
        let at = |milliseconds| Moment::at(Duration::from_millis(milliseconds));
        let sample = |long, times: &[u64]| Sample {
            long,
            start: Moment::default(),
            pieces: times.iter().map(|time| Piece { at: at(*time), tokens: 1 }).collect(),
            outcome: Ok(Done { prompt_tokens: 64, cached_tokens: 16, queue: Duration::from_micros(1500) }),
        };
        let failed = Sample { outcome: Err("QUEUE_FULL".into()), ..sample(false, &[]) };
        let samples = [sample(false, &[100, 130, 1400]), sample(mixed, &[900, 930]), failed];
        Row::new(load, &samples, Duration::from_secs(2), mixed)
    }

    #[test]
    fn the_tables_are_what_the_snapshot_says() {
        let closed = [Load::Closed(1), Load::Closed(16)].map(|load| row(load, true));
        let mut open = row(Load::Open(0.5), false);
        open.interrupted = true;
        let empty = Row::new(Load::Open(2.0), &[], Duration::ZERO, false);
        insta::assert_snapshot!(format!("{}\n\n{}", table(&closed), table(&[open, empty])));
    }

    #[test]
    fn json_rows_say_which_load_they_had() {
        let rows = rows(&[row(Load::Closed(4), true), row(Load::Open(0.5), false)]);
        assert_eq!((&rows[0]["concurrency"], &rows[0]["arrival_rate_per_s"]), (&json!(4), &Value::Null));
        assert_eq!((&rows[1]["concurrency"], &rows[1]["arrival_rate_per_s"]), (&Value::Null, &json!(0.5)));
        assert_eq!(rows[0]["errors"], json!({ "QUEUE_FULL": 1 }));
        assert_eq!(rows[0]["long"]["time_to_first_token_s"]["p50"], json!(0.9));
        assert_eq!(rows[1]["long"], Value::Null);
    }
}
