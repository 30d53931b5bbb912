//! How long models stay, over the wire: what calls say about it, what a changed configuration does, and that
//! no question wakes a model.

use std::time::Duration;

use mlxd::config::{Config, Overrides};
use mlxd::engine::{Fit, KeepAlive, Stay};
use mlxd::error::MemoryRule;
use mlxd_client::v1::{
    CapabilitiesRequest, CountTokensRequest, CreateSessionRequest, ErrorReason, GetModelRequest,
    GetStatsRequest, LoadModelRequest, load_model_response::Event,
};

use crate::daemon::harness::{Daemon, MODEL, load, prompt};
use crate::daemon::{connections, folder};

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn calls_say_how_long_the_model_stays() {
    let daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    let mut request = prompt("a");
    request.keep_alive = seconds(-1);
    daemon.client.generate(request).await.unwrap();
    assert_eq!(daemon.engine.keep_alives(), [None, Some(KeepAlive::Forever)]);
    let asked = LoadModelRequest { keep_alive: seconds(600), pin: Some(true), ..Default::default() };
    load(&daemon.client, asked).await.unwrap();
    load(&daemon.client, LoadModelRequest::default()).await.unwrap();
    let ten_minutes = KeepAlive::For(Duration::from_secs(600));
    let stay = Stay { keep_alive: Some(ten_minutes), pin: Some(true) };
    assert_eq!(daemon.engine.stays(), [Stay::default(), stay, Stay::default()]);
    let mut request = prompt("a");
    request.keep_alive = Some(prost_types::Duration { seconds: 1, nanos: -1 });
    let refused = daemon.client.generate(request).await.unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::InvalidField);
}

#[tokio::test]
async fn a_resident_models_stay_sessions_and_folder_are_shown() {
    let daemon = Daemon::start().await;
    let create = CreateSessionRequest { name: "s".into(), model: MODEL.into(), ..Default::default() };
    daemon.client.create_session(create).await.unwrap();
    let (_, Event::Loaded(loaded)) = load(&daemon.client, LoadModelRequest::default()).await.unwrap() else {
        panic!("not loaded")
    };
    let listed = daemon.client.list_all_models(false).await.unwrap().remove(0);
    let described = daemon.client.get_model(GetModelRequest { model: MODEL.into() }).await.unwrap();
    for shown in [loaded.model.unwrap(), listed, described] {
        assert_eq!((shown.pinned, shown.keep_alive, shown.expire_time), (false, seconds(-1), None));
        assert_eq!(shown.session_count, 1);
        assert!(shown.path.ends_with(MODEL), "{}", shown.path);
    }
}

#[tokio::test]
async fn a_validation_says_what_would_go_or_which_rule_forbids_it() {
    let daemon = Daemon::start().await;
    let validate = async || {
        let request = LoadModelRequest { validate_only: true, ..Default::default() };
        match load(&daemon.client, request).await.unwrap().1 {
            Event::Validated(validated) => validated,
            other => panic!("{other:?}"),
        }
    };
    let fit = Fit { needed_bytes: 8, available_bytes: 9, budget_bytes: 10, ..Fit::default() };
    daemon.engine.set_fit(Fit { evictions: vec![("old".into(), 7)], ..fit.clone() });
    let fits = validate().await;
    assert_eq!((fits.fits, fits.budget_bytes, fits.rule.as_str()), (true, 10, ""));
    assert_eq!((fits.evictions[0].model.as_str(), fits.evictions[0].bytes), ("old", 7));
    let pinned = MemoryRule::Pinned { held_bytes: 5 };
    daemon.engine.set_fit(Fit { refused: Some((pinned, vec!["old".into()])), ..fit });
    let refused = validate().await;
    assert_eq!((refused.fits, refused.rule.as_str()), (false, "pinned models hold 5 bytes"));
    assert_eq!(daemon.engine.loads(), 0);
}

#[tokio::test]
async fn only_the_owner_pins() {
    let (daemon, _folder) = connections::on_tcp(|_| {}).await;
    let remote = connections::client(&daemon, "secret").await;
    for pin in [true, false] {
        let request = LoadModelRequest { pin: Some(pin), ..Default::default() };
        let refused = load(&remote, request.clone()).await.unwrap_err();
        assert_eq!(refused.reason(), ErrorReason::PermissionDenied);
        load(&daemon.client, request).await.unwrap();
    }
    load(&remote, LoadModelRequest { keep_alive: seconds(5), ..Default::default() }).await.unwrap();
}

#[tokio::test]
async fn questions_neither_load_nor_hold_a_model() {
    let daemon = Daemon::start().await;
    let client = &daemon.client;
    let ask = async || {
        client.get_stats(GetStatsRequest {}).await.unwrap();
        client.list_all_models(false).await.unwrap();
        client.get_model(GetModelRequest { model: MODEL.into() }).await.unwrap();
        client.capabilities(CapabilitiesRequest { models: vec![MODEL.into()] }).await.unwrap();
        client.capabilities(CapabilitiesRequest::default()).await.unwrap();
        let count = CountTokensRequest { model: MODEL.into(), ..CountTokensRequest::prompt("abc") };
        client.count_tokens(count).await.unwrap();
    };
    ask().await;
    assert_eq!(daemon.engine.loads(), 0);
    load(client, LoadModelRequest::default()).await.unwrap();
    ask().await;
    assert_eq!((daemon.engine.loads(), daemon.engine.leases(MODEL)), (1, 0));
}

#[tokio::test]
async fn a_changed_configuration_is_taken_over_without_a_restart() {
    let daemon = Daemon::start().await;
    let moved = daemon.folder.path().join("moved");
    folder::write(&moved.join("elsewhere"));
    let file = daemon.folder.path().join("changed.toml");
    let text = format!(
        "socket = \"/other\"\nmodel_roots = [\"{0}\"]\nhf_cache = \"{0}/hf\"\nauto_load = false\n\
         memory_budget_bytes = 77\n[model.tiny]\npin = true\n",
        moved.display()
    );
    std::fs::write(&file, text).unwrap();
    let changed = Config::load(&Overrides { config_file: Some(file), ..Overrides::default() }).unwrap();
    daemon.reloads.send(changed).await.unwrap();
    // The service hears of it first, the engine last.
    let deadline = Duration::from_secs(10);
    let configured = async {
        while daemon.engine.configured().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(deadline, configured).await.expect("it is taken over");
    let settings = daemon.engine.configured().remove(0);
    assert_eq!(settings.memory_budget_bytes, Some(77));
    assert!(settings.models[&"tiny".into()].pin);
    let names: Vec<String> =
        daemon.client.list_all_models(false).await.unwrap().into_iter().map(|model| model.name).collect();
    assert_eq!(names, ["elsewhere"]);
    let mut request = prompt("a");
    request.model = "elsewhere".into();
    let refused = daemon.client.generate(request).await.unwrap_err();
    assert_eq!(refused.reason(), ErrorReason::ModelNotLoaded);
}
