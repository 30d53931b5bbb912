//! The picture of the house: every room, top floor first, with the rooms that it may name. A room names only
//! what stands below it here. Beside it: which crate lives in which rooms.

/// A module right under a crate's root.
pub(super) struct Room {
    pub(super) name: &'static str,
    /// Rooms that it may name.
    pub(super) names: &'static [&'static str],
    /// Rooms that its tests may name besides.
    pub(super) tests: &'static [&'static str],
    /// Drawn before it is built.
    pub(super) later: bool,
}

/// A crate of `Cargo.toml`.
pub(super) struct Crate {
    /// As paths write it.
    pub(super) name: &'static str,
    /// Rooms, or modules in them; `*` is everywhere.
    pub(super) homes: &'static [&'static str],
    /// Where tests may name it besides.
    pub(super) tests: &'static [&'static str],
}

const fn room(name: &'static str, names: &'static [&'static str], tests: &'static [&'static str]) -> Room {
    Room { name, names, tests, later: false }
}

#[allow(dead_code, reason = "a room that is planned is drawn before it is built")]
const fn later(name: &'static str, names: &'static [&'static str]) -> Room {
    Room { name, names, tests: &[], later: true }
}

const fn home(name: &'static str, homes: &'static [&'static str], tests: &'static [&'static str]) -> Crate {
    Crate { name, homes, tests }
}

#[rustfmt::skip]
pub(super) const ROOMS: &[Room] = &[
    room("cli",       &["clock", "config", "daemon", "device", "hub", "quantize"], &[]),
    room("daemon",    &["clock", "config", "device", "engine", "error", "hub", "lock", "net", "rpc", "service", "store", "telemetry"], &[]),
    room("rpc",       &["clock", "count", "error", "hub", "ids", "limits", "net", "service"], &[]),
    room("net",       &["error", "ids", "limits"], &[]),
    room("service",   &["clock", "count", "engine", "error", "grammar", "hub", "ids", "limits", "output", "priority", "prompt", "quantize", "residency", "session", "store", "text"], &[]),
    room("telemetry", &["config"], &[]),
    room("config",    &["backend", "engine", "hub", "ids", "limits", "output", "store"], &[]),
    room("engine",    &["backend", "cache", "clock", "count", "error", "grammar", "ids", "output", "prompt", "quantize", "residency", "sched", "text"], &["session", "store"]),
    room("device",    &["backend", "error", "hub", "mlx", "models", "priority", "quantize"], &["ids", "store"]),
    room("models",    &["error", "hub", "mlx"], &[]),
    room("mlx",       &["backend", "error", "ids", "quantize"], &[]),
    room("residency", &["backend", "clock", "error", "hub", "ids", "quantize"], &[]),
    room("sched",     &["backend", "clock", "ids"], &[]),
    room("cache",     &["backend", "clock", "count", "ids", "prompt"], &[]),
    room("store",     &["backend", "count", "error", "ids", "lock", "priority", "session"], &["clock"]),
    room("backend",   &["error", "hub", "ids", "quantize"], &[]),
    room("hub",       &["error", "ids", "output", "quantize", "text"], &[]),
    // Between service, which compiles, and engine, which goes through: a tokenizer is all that both have.
    room("grammar",   &["text"], &[]),
    room("text",      &[], &[]),
    room("output",    &[], &[]),
    room("session",   &["clock", "count", "error", "ids"], &[]),
    room("lock",      &[], &[]),
    room("prompt",    &[], &[]),
    room("limits",    &[], &[]),
    room("priority",  &[], &[]),
    room("quantize",  &[], &[]),
    room("error",     &["ids"], &[]),
    room("clock",     &[], &[]),
    room("count",     &[], &[]),
    room("ids",       &[], &[]),
];

#[rustfmt::skip]
pub(super) const CRATES: &[Crate] = &[
    home("anyhow",             &["cli"], &[]),
    home("clap",               &["cli"], &[]),
    home("indicatif",          &["cli"], &[]),
    home("mlxd_client",        &["cli"], &[]),
    home("rustyline",          &["cli"], &[]),
    home("prost_types",        &["cli", "rpc"], &[]),
    home("rand",               &["cli", "rpc", "service"], &[]),
    home("time",               &["cli", "text"], &[]),
    home("tracing_subscriber", &["telemetry"], &[]),
    home("rustix",             &["cli", "daemon", "hub", "lock", "priority", "service", "store", "telemetry"], &[]),
    home("async_stream",       &["rpc"], &[]),
    home("bytes",              &["net", "rpc"], &[]),
    home("http",               &["net", "rpc"], &[]),
    home("http_body",          &["net", "rpc"], &[]),
    home("hyper",              &["net", "rpc"], &[]),
    home("hyper_util",         &["net"], &[]),
    home("prost",              &["rpc", "session"], &[]),
    home("tokio_stream",       &["rpc"], &[]),
    home("tonic",              &["rpc"], &[]),
    home("tonic_health",       &["rpc"], &[]),
    home("tonic_prost",        &["rpc"], &[]),
    home("tonic_reflection",   &["rpc"], &[]),
    home("tonic_types",        &["rpc"], &[]),
    home("tower",              &["net", "rpc"], &[]),
    home("tokio",              &["cli", "daemon", "engine", "hub::fetch", "net", "rpc", "service", "store"], &[]),
    home("tracing",            &["daemon", "device", "engine", "net", "rpc", "service", "store"], &[]),
    home("toml",               &["config"], &[]),
    home("minijinja",          &["text"], &[]),
    home("minijinja_contrib",  &["text"], &[]),
    home("regex",              &["text"], &[]),
    home("tokenizers",         &["text"], &["hub"]),
    home("llguidance",         &["grammar"], &[]),
    home("dashmap",            &["hub", "session"], &[]),
    home("half",               &["hub"], &[]),
    home("httpdate",           &["hub::fetch"], &[]),
    home("reqwest",            &["hub::fetch"], &[]),
    home("rustls",             &["hub::fetch"], &[]),
    home("safetensors",        &["hub"], &[]),
    home("sha1",               &["hub::fetch"], &[]),
    home("sha2",               &["hub", "net", "service", "store"], &[]),
    home("libc",               &["mlx::ffi"], &[]),
    home("mlx_sys",            &["mlx::ffi"], &[]),
    home("mlx_rs",             &["device", "mlx", "models"], &[]),
    home("serde",              &["hub", "models", "service", "text"], &[]),
    home("serde_json",         &["cli", "device", "grammar", "hub", "mlx", "models", "output", "rpc", "service", "session", "store", "text"], &["*"]),
    home("thread_priority",    &["priority"], &[]),
    home("thiserror",          &["*"], &[]),
    home("insta",              &[], &["*"]),
    home("proptest",           &[], &["*"]),
    home("tempfile",           &[], &["*"]),
];

/// Words of the language, and the folder that may use them.
pub(super) const WORDS: &[(&str, &str)] = &[("unsafe", "src/mlx/ffi/"), ("include_proto", "src/rpc/")];

/// Dependencies that only generated code names.
pub(super) const GENERATED: &[&str] = &[];
