//! The `--json` output: field names of the proto, enum values in lower case without their prefix, durations
//! in seconds, times in seconds since 1970.

use std::io;

use mlxd_client::v1::{
    EffectiveSampling, GenerateChoice, GenerateResponse, GetStatsResponse, LoadValidated, ModelInfo, Session,
    SessionChange, SessionState, ToolCall,
};
use serde_json::{Value, json};

use super::format::{seconds, tokens_per_second};
use super::out;

/// Prints one value on its own line.
pub(crate) fn print(value: &Value) -> io::Result<()> {
    out::data(&format!("{value}\n"))
}

/// Converts an enum value's name: `FINISH_REASON_STOP` becomes `stop`.
pub(crate) fn enum_name(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

pub(crate) fn generation(response: &GenerateResponse, session: Option<&str>) -> Value {
    let usage = response.usage.unwrap_or_default();
    let timings = response.timings.unwrap_or_default();
    json!({
        "text": response.text,
        "reasoning": response.reasoning,
        "tool_calls": response.tool_calls.iter().map(tool_call).collect::<Vec<_>>(),
        "finish_reason": enum_name(response.finish_reason().as_str_name(), "FINISH_REASON_"),
        "stop_string": response.stop_string,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        },
        "timings": {
            "queue_time": seconds(timings.queue_time.as_ref()),
            "time_to_first_token": seconds(timings.time_to_first_token.as_ref()),
            "decode_time": seconds(timings.decode_time.as_ref()),
            "total_time": seconds(timings.total_time.as_ref()),
            "tokens_per_second": tokens_per_second(&usage, &timings),
        },
        "session": session,
        "session_token_count": response.session_token_count,
        "sampling": response.sampling.as_ref().map(sampling),
        "choices": response.choices.iter().map(choice).collect::<Vec<_>>(),
        "model_revision": response.model_revision,
        "request_id": response.request_id,
    })
}

/// Converts a tool call; its arguments are an object.
pub(crate) fn tool_call(call: &ToolCall) -> Value {
    let arguments: Value = serde_json::from_str(&call.arguments_json).unwrap_or_else(|_| json!({}));
    json!({ "id": call.id, "name": call.name, "arguments": arguments })
}

fn choice(choice: &GenerateChoice) -> Value {
    json!({
        "choice": choice.choice,
        "text": choice.text,
        "reasoning": choice.reasoning,
        "tool_calls": choice.tool_calls.iter().map(tool_call).collect::<Vec<_>>(),
        "finish_reason": enum_name(choice.finish_reason().as_str_name(), "FINISH_REASON_"),
        "stop_string": choice.stop_string,
        "completion_tokens": choice.completion_tokens,
        "seed": choice.seed,
        "mean_logprob": choice.mean_logprob,
    })
}

fn sampling(sampling: &EffectiveSampling) -> Value {
    json!({
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "xtc_probability": sampling.xtc_probability,
        "xtc_threshold": sampling.xtc_threshold,
        "typical_p": sampling.typical_p,
        "dry_multiplier": sampling.dry_multiplier,
        "dry_base": sampling.dry_base,
        "dry_allowed_length": sampling.dry_allowed_length,
        "max_tokens": sampling.max_tokens,
    })
}

pub(crate) fn model(info: &ModelInfo) -> Value {
    json!({
        "name": info.name,
        "state": enum_name(info.state().as_str_name(), "MODEL_STATE_"),
        "revision": info.revision,
        "architecture": info.architecture,
        "context_length": info.context_length,
        "vocabulary_size": info.vocabulary_size,
        "parameter_count": info.parameter_count,
        "stored_as": info.stored_as,
        "computes_in": info.computes_in,
        "file_bytes": info.file_bytes,
        "weight_bytes": info.weight_bytes,
        "kv_slab_bytes": info.kv_slab_bytes,
        "kv_idle_bytes": info.kv_idle_bytes,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "running_sequences": info.running_sequences,
        "queued_sequences": info.queued_sequences,
        "problem": info.problem,
        "pinned": info.pinned,
        "keep_alive": info.keep_alive.as_ref().map(|stay| seconds(Some(stay))),
        "expire_time": info.expire_time.as_ref().map(unix_seconds),
        "session_count": info.session_count,
        "path": info.path,
    })
}

/// Converts a time to seconds since 1970.
fn unix_seconds(time: &prost_types::Timestamp) -> f64 {
    seconds(Some(&prost_types::Duration { seconds: time.seconds, nanos: time.nanos }))
}

pub(crate) fn verdict(verdict: &LoadValidated) -> Value {
    json!({
        "fits": verdict.fits,
        "needed_bytes": verdict.needed_bytes,
        "available_bytes": verdict.available_bytes,
        "budget_bytes": verdict.budget_bytes,
        "rule": verdict.rule,
        "in_the_way": verdict.in_the_way,
        "evictions": verdict
            .evictions
            .iter()
            .map(|evicted| json!({ "model": evicted.model, "bytes": evicted.bytes }))
            .collect::<Vec<_>>(),
    })
}

/// Returns where a session's KV is, in a word.
pub(crate) fn session_state(session: &Session) -> String {
    match session.state() {
        SessionState::Unspecified if session.busy => "running".to_owned(),
        state => enum_name(state.as_str_name(), "SESSION_STATE_"),
    }
}

pub(crate) fn session(session: &Session) -> Value {
    json!({
        "name": session.name,
        "model": session.model,
        "token_count": session.token_count,
        "turn_count": session.turns.len(),
        "busy": session.busy,
        "state": session_state(session),
        "cached_token_count": session.cached_token_count,
        "kv_bytes": session.kv_bytes,
        "snapshot_token_count": session.snapshot_token_count,
        "snapshot_bytes": session.snapshot_bytes,
        "content_bytes": session.content_bytes,
        "ttl": session.ttl.as_ref().map(|ttl| seconds(Some(ttl))),
        "create_time": session.create_time.as_ref().map(unix_seconds),
        "last_use_time": session.last_use_time.as_ref().map(unix_seconds),
        "expire_time": session.expire_time.as_ref().map(unix_seconds),
        "pinned": session.pinned,
        "labels": session.labels,
    })
}

/// Converts what became of a session.
pub(crate) fn session_change(change: &SessionChange) -> Value {
    json!({
        "kind": enum_name(change.kind().as_str_name(), "SESSION_CHANGE_KIND_"),
        "name": change.name,
        "session": change.session.as_ref().map(session),
        "changed_fields": change.changed_fields,
        "merged_changes": change.merged_changes,
    })
}

pub(crate) fn stats(stats: &GetStatsResponse) -> Value {
    let (memory, snapshots) = (stats.memory.unwrap_or_default(), stats.snapshots.unwrap_or_default());
    json!({
        "uptime": seconds(stats.uptime.as_ref()),
        "requests_total": stats.requests_total,
        "finished_total": stats.finished_total,
        "cancelled_total": stats.cancelled_total,
        "failed_total": stats.failed_total,
        "prefill_tokens_total": stats.prefill_tokens_total,
        "cached_tokens_total": stats.cached_tokens_total,
        "decode_tokens_total": stats.decode_tokens_total,
        "steps_total": stats.steps_total,
        "loads_total": stats.loads_total,
        "evictions_total": stats.evictions_total,
        "expirations_total": stats.expirations_total,
        "running_sequences": stats.running_sequences,
        "queued_sequences": stats.queued_sequences,
        "sessions": stats.sessions,
        "snapshots": {
            "enabled": snapshots.enabled,
            "writable": snapshots.writable,
            "snapshots": snapshots.snapshots,
            "bytes": snapshots.bytes,
            "bytes_max": snapshots.bytes_max,
            "waiting_bytes": snapshots.waiting_bytes,
            "saved_total": snapshots.saved_total,
            "failed_total": snapshots.failed_total,
            "dropped_total": snapshots.dropped_total,
            "restored_total": snapshots.restored_total,
            "restored_tokens_total": snapshots.restored_tokens_total,
        },
        "memory": {
            "budget_bytes": memory.budget_bytes,
            "weight_bytes": memory.weight_bytes,
            "kv_slab_bytes": memory.kv_slab_bytes,
            "kv_idle_bytes": memory.kv_idle_bytes,
            "snapshot_bytes": memory.snapshot_bytes,
            "mlx_active_bytes": memory.mlx_active_bytes,
            "mlx_peak_bytes": memory.mlx_peak_bytes,
            "mlx_cache_bytes": memory.mlx_cache_bytes,
            "process_resident_bytes": memory.process_resident_bytes,
        },
    })
}
