//! Sources, their order, and what is refused.

use std::collections::BTreeMap;

use super::keys::{Key, Kind, keys};
use super::*;
use crate::hub::FormChoice;
use crate::output::Format;

fn load(file: &str, env: &[(&str, &str)], overrides: &Overrides) -> Result<Config, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mlxd.toml");
    std::fs::write(&path, file).unwrap();
    let mut env: BTreeMap<_, _> = env.iter().map(|(name, text)| (*name, (*text).to_owned())).collect();
    env.entry("HOME").or_insert("/home/me".into());
    let overrides = Overrides { config_file: Some(path.clone()), ..overrides.clone() };
    let loaded = Config::from_sources(&overrides, &|name| env.get(name).cloned());
    loaded.map_err(|error| error.to_string().replace(path.to_str().unwrap(), "FILE"))
}

fn refused(file: &str, env: &[(&str, &str)]) -> String {
    load(file, env, &Overrides::default()).unwrap_err()
}

#[test]
fn the_example_file_names_every_key_with_its_default() {
    let text = include_str!("../../deploy/mlxd.example.toml");
    let table: toml::Table = text.parse().unwrap();
    let defaults: toml::Table = keys().into_iter().map(|key| (key.name.to_owned(), key.default)).collect();
    assert_eq!(table, defaults);
    let none = Overrides::default();
    assert_eq!(load(text, &[], &none), load("", &[], &none));
}

#[test]
fn the_default_socket_is_where_the_clients_look() {
    let table = include_str!("../../tests/default_socket.json");
    let rows: Vec<serde_json::Value> = serde_json::from_str(table).unwrap();
    for row in rows {
        let env =
            |name: &str| row["environment"][name].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let found = default_socket(&env);
        assert_eq!(found.as_deref().and_then(Path::to_str), row["socket"].as_str(), "{row}");
    }
}

#[test]
fn the_configuration_document_lists_every_key_with_its_default_and_range() {
    let text = include_str!("../../docs/configuration.md");
    let table = text.split("Variables that are not keys").next().unwrap();
    let listed: Vec<String> = table.lines().filter(|line| line.starts_with("| `")).map(first_cells).collect();
    let expected: Vec<String> = keys().iter().map(row).collect();
    assert_eq!(listed, expected);
}

/// All cells of a row but the last, which is prose.
fn first_cells(row: &str) -> String {
    row.split(" | ").take(4).collect::<Vec<_>>().join(" | ")
}

fn row(key: &Key) -> String {
    let values = match &key.kind {
        Kind::Text(_) => "text".into(),
        Kind::Stay => "text or a number".into(),
        Kind::Flag(_) => "true, false".into(),
        Kind::List(..) => "list".into(),
        Kind::Word(words, _) => words.join(", "),
        Kind::Number(range, _) if *range.end() == i64::MAX => format!("{} or more", range.start()),
        Kind::Number(range, _) => format!("{} to {}", range.start(), range.end()),
    };
    let variable = key.name.to_uppercase();
    format!("| `{}` | `MLXD_{variable}` | `{}` | {values}", key.name, key.default)
}

#[test]
fn every_limit_has_a_key() {
    let config = load("", &[], &Overrides::default()).unwrap();
    let fields = format!("{:?} {:?}", config.limits, config.engine);
    assert!(!fields.contains(": 0,") && !fields.contains(": 0ns") && !fields.contains(": 0 "), "{fields}");
}

#[test]
fn flags_go_before_the_environment_before_the_file_before_defaults() {
    let file = "sessions_max = 7\nlog_format = \"json\"\nsocket = \"/file\"\nqueue_length_max = 3";
    let env = [("MLXD_SOCKET", "/env"), ("MLXD_QUEUE_LENGTH_MAX", "4"), ("MLXD_AUTO_LOAD", "false")];
    let flags = Overrides { socket: Some("/flag".into()), ..Overrides::default() };
    let config = load(file, &env, &flags).unwrap();
    assert_eq!(config.socket, Path::new("/flag"));
    assert_eq!((config.engine.queue_length_max, config.limits.sessions_max), (4, 7));
    assert_eq!((config.log_format, config.access.auto_load), (LogFormat::Json, false));
    assert_eq!(config.engine.prefill_chunk_tokens, 512);
}

#[test]
fn lists_come_from_the_environment_with_separators() {
    let env = [("MLXD_MODEL_ROOTS", "/a:~/b"), ("MLXD_MODELS", "x/y,z")];
    let config = load("", &env, &Overrides::default()).unwrap();
    assert_eq!(config.model_roots, [Path::new("/a"), Path::new("/home/me/b")]);
    assert_eq!(config.models, ["x/y", "z"]);
}

#[test]
fn errors_name_the_source_and_the_key() {
    assert_eq!(refused("sokcet = \"/a\"", &[]), "FILE: unknown key `sokcet`");
    assert_eq!(refused("auto_load = 1", &[]), "FILE: `auto_load` must be true or false");
    assert_eq!(
        refused("", &[("MLXD_DRAIN_S", "soon")]),
        "MLXD_DRAIN_S: `drain_s` must be a whole number from 0 to 86400"
    );
    assert_eq!(
        refused("top_logprobs_max = 21", &[]),
        "FILE: `top_logprobs_max` must be a whole number from 0 to 20"
    );
    assert!(refused("session_ttl_s = 9999999", &[]).starts_with("FILE: `session_ttl_s` may not be above"));
    assert!(refused("= 1", &[]).starts_with("FILE: TOML parse error"));
}

#[test]
fn tcp_needs_a_token_and_a_loopback_address() {
    assert!(refused("listen = \"127.0.0.1:1\"", &[]).contains("needs `token_file`"));
    assert!(
        refused("listen = \"0.0.0.0:1\"\ntoken_file = \"/t\"", &[]).contains("must be a loopback address")
    );
    assert!(refused("listen = \"localhost\"\ntoken_file = \"/t\"", &[]).contains("an address and a port"));
    let both = load("listen = \"[::1]:7411\"\ntoken_file = \"~/t\"", &[], &Overrides::default()).unwrap();
    assert_eq!(both.token_file.as_deref(), Some(Path::new("/home/me/t")));
}

#[test]
fn the_default_socket_is_private_to_the_user() {
    let none = Overrides::default();
    assert_eq!(load("", &[], &none).unwrap().socket, Path::new("/home/me/.mlxd/mlxd.sock"));
    let runtime = [("XDG_RUNTIME_DIR", "/run/user/1")];
    assert_eq!(load("", &runtime, &none).unwrap().socket, Path::new("/run/user/1/mlxd/mlxd.sock"));
    let long = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
    assert!(refused("", &[("MLXD_SOCKET", &long)]).contains("is a path of 104 bytes"));
}

#[test]
fn the_hugging_face_cache_is_where_its_tools_keep_it() {
    let cache = |env: &[(&str, &str)]| load("", env, &Overrides::default()).unwrap().hf_cache.unwrap();
    assert_eq!(cache(&[]), Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(cache(&[("HF_HOME", "/hf")]), Path::new("/hf/hub"));
    assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "~/c"), ("HOME", "/home/ada")]), Path::new("/home/ada/c"));
    assert_eq!(cache(&[("MLXD_HF_CACHE", "/m")]), Path::new("/m"));
}

#[test]
fn a_file_that_is_asked_for_must_be_there() {
    let overrides = Overrides { config_file: Some("/nonexistent/x.toml".into()), ..Overrides::default() };
    let refused = Config::from_sources(&overrides, &|_| None);
    assert!(matches!(refused, Err(ConfigError::File { .. })));
}

#[test]
fn how_long_models_stay_is_written_as_for_ollama() {
    let minutes = |minutes: u64| KeepAlive::For(Duration::from_secs(60 * minutes));
    let stays = |file: &str| {
        let residency = load(file, &[], &Overrides::default()).unwrap().residency;
        (residency.keep_alive, residency.keep_alive_max)
    };
    assert_eq!(stays(""), (minutes(60), KeepAlive::Forever));
    assert_eq!(stays("auto_load = false"), (KeepAlive::Forever, KeepAlive::Forever));
    assert_eq!(stays("model_keep_alive_max = \"30m\""), (minutes(30), minutes(30)));
    assert_eq!(stays("model_keep_alive = \"300\""), (minutes(5), KeepAlive::Forever));
    assert_eq!(stays("model_keep_alive = \"-1\""), (KeepAlive::Forever, KeepAlive::Forever));
    assert_eq!(stays("model_keep_alive = 300\nmodel_keep_alive_max = 600"), (minutes(5), minutes(10)));
    assert_eq!(stays("model_keep_alive = -1"), (KeepAlive::Forever, KeepAlive::Forever));
    let listed = refused("model_keep_alive = [1]", &[]);
    assert_eq!(listed, "FILE: `model_keep_alive` must be text or a number of seconds");
    let above = "model_keep_alive = \"2h\"\nmodel_keep_alive_max = \"1h\"";
    assert_eq!(refused(above, &[]), "FILE: `model_keep_alive` may not be above `model_keep_alive_max`");
    let soon = refused("", &[("MLXD_MODEL_KEEP_ALIVE", "soon")]);
    assert!(
        soon.starts_with("MLXD_MODEL_KEEP_ALIVE: `model_keep_alive` must be a duration such as"),
        "{soon}"
    );
}

#[test]
fn single_models_have_sections() {
    let file = "models = [\"start\", \"a/b\"]\n[model.\"a/b\"]\nkeep_alive = \"24h\"\npin = true\n[model.c]\nkeep_alive = 0";
    let models = load(file, &[], &Overrides::default()).unwrap().residency.models;
    let of = |name: &str| models[&name.into()];
    let day = KeepAlive::For(Duration::from_secs(24 * 60 * 60));
    assert_eq!((of("a/b").keep_alive, of("a/b").pin), (Some(day), true));
    assert_eq!((of("c").keep_alive, of("c").pin), (Some(KeepAlive::For(Duration::ZERO)), false));
    assert_eq!(of("start").keep_alive, Some(KeepAlive::Forever), "wanted from the start");
    assert_eq!(refused("[model.a]\npni = true", &[]), "FILE: unknown key `model.\"a\".pni`");
    assert_eq!(refused("[model.a]\npin = 1", &[]), "FILE: `model` \"a\": pin must be true or false");
    assert!(
        refused("[model.a]\nkeep_alive = \"x\"", &[]).starts_with("FILE: `model` \"a\": keep_alive must be")
    );
    assert!(
        refused("[model.a]\ntool_format = \"x\"", &[])
            .starts_with("FILE: `model` \"a\": tool_format must be none, or one of deepseek_v3, ")
    );
    let forms =
        load("[model.a]\ntool_format = \"hermes\"\nreasoning_format = \"none\"", &[], &Overrides::default());
    let forms = forms.unwrap().forms[&"a".into()];
    assert_eq!(forms.tools, Some(FormChoice::Is(Format::Hermes)));
    assert_eq!(forms.reasoning, Some(FormChoice::Off));
    assert!(refused("model = 1", &[]).starts_with("FILE: `model` must be sections"));
}

#[test]
fn a_running_daemon_takes_over_what_can_change() {
    let config = |file: &str| load(file, &[], &Overrides::default()).unwrap();
    let mut running = config("sessions_max = 7");
    let new = config("auto_load = false\nsessions_max = 8\nmemory_budget_bytes = 5\n[model.a]\npin = true");
    let changed = (vec!["auto_load", "memory_budget_bytes", "model"], vec!["sessions_max"]);
    assert_eq!(running.renew(new.clone()), changed);
    assert_eq!((&running.residency, running.access.auto_load), (&new.residency, false));
    assert_eq!(running.limits.sessions_max, 7);
    assert_eq!(running.renew(new), (vec![], vec!["sessions_max"]), "told again, as it still takes a restart");
}

#[test]
fn models_of_the_start_stay_forever_until_a_restart_whatever_the_new_file_names() {
    let config = |file: &str| load(file, &[], &Overrides::default()).unwrap();
    let mut running = config("models = [\"a\", \"b\"]");
    let new = config("models = [\"c\"]\n[model.b]\nkeep_alive = 60");
    assert_eq!(running.renew(new), (vec!["model"], vec!["models"]));
    let stay = |name: &str| running.residency.models.get(&name.into()).and_then(|own| own.keep_alive);
    assert_eq!(stay("a"), Some(KeepAlive::Forever), "it takes a restart");
    assert_eq!(stay("b"), Some(KeepAlive::For(Duration::from_secs(60))), "its section takes none");
    assert_eq!(stay("c"), None, "it takes a restart");
}
