//! Models over the wire.

use std::sync::Arc;

use mlxd_client::v1::{
    ErrorReason, GenerateRequest, GetModelRequest, ListModelsRequest, LoadModelRequest, LoadPhase,
    LoadProgress, ModelState, ScoreRequest, TokenIds, UnloadModelRequest, generate_request::Input,
    load_model_response::Event, score_request,
};

use crate::daemon::folder;
use crate::daemon::harness::{Daemon, MODEL, chat, load, prompt};

#[tokio::test]
async fn a_load_shows_its_phases_and_ends_loaded() {
    let daemon = Daemon::start().await;
    let (progress, end) = load(&daemon.client, LoadModelRequest::default()).await.unwrap();
    let Event::Loaded(loaded) = end else { panic!("{end:?}") };
    let model = loaded.model.unwrap();
    assert_eq!(
        (model.state(), model.stored_as.as_str(), model.weight_bytes),
        (ModelState::Resident, "float32", 8)
    );
    let phases: Vec<_> = progress.iter().map(LoadProgress::phase).collect();
    assert_eq!(phases, [LoadPhase::Resolving, LoadPhase::Loading, LoadPhase::Warming]);
    assert_eq!(daemon.engine.loads(), 1);
    daemon.client.generate(prompt("a")).await.unwrap();
    assert_eq!(daemon.engine.loads(), 1);
}

#[tokio::test]
async fn a_validation_loads_nothing() {
    let daemon = Daemon::start().await;
    let request = LoadModelRequest { validate_only: true, ..Default::default() };
    let (progress, end) = load(&daemon.client, request).await.unwrap();
    let Event::Validated(validated) = end else { panic!("{end:?}") };
    assert!(progress.is_empty() && validated.fits && validated.needed_bytes == 8);
    assert_eq!(daemon.engine.loads(), 0);
}

#[tokio::test]
async fn models_on_disk_and_in_memory_are_listed_once() {
    let daemon = Daemon::start().await;
    folder::write(&daemon.folder.path().join("models/other"));
    daemon.client.generate(prompt("a")).await.unwrap();
    let models = daemon.client.list_all_models(false).await.unwrap();
    let shown: Vec<_> = models.iter().map(|model| (model.name.as_str(), model.state())).collect();
    assert_eq!(shown, [("other", ModelState::Available), (MODEL, ModelState::Resident)]);
    assert!(models.iter().all(|model| model.context_length == 400 && model.vocabulary_size == 258));
    assert_eq!(models.iter().map(|model| model.kv_idle_bytes).collect::<Vec<_>>(), [0, 7]);
    assert_eq!(daemon.client.list_all_models(true).await.unwrap().len(), 1);
    let page = ListModelsRequest { page_size: 1, ..Default::default() };
    let first = daemon.client.list_models(page.clone()).await.unwrap();
    assert_eq!(first.next_page_token, "other");
    let rest = ListModelsRequest { page_token: first.next_page_token, ..page };
    assert_eq!(daemon.client.list_models(rest).await.unwrap().models[0].name, MODEL);
}

#[tokio::test]
async fn an_unloaded_model_is_loaded_again_when_it_is_needed() {
    let daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    let unload = UnloadModelRequest { model: MODEL.into() };
    assert_eq!(daemon.client.unload_model(unload.clone()).await.unwrap().freed_bytes, 8);
    let error = daemon.client.unload_model(unload).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::ModelNotLoaded);
    daemon.client.generate(prompt("a")).await.unwrap();
    assert_eq!(daemon.engine.loads(), 2);
}

#[tokio::test]
async fn a_model_that_the_engine_lost_is_loaded_once_more() {
    let daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    daemon.engine.lose_models();
    daemon.client.generate(prompt("a")).await.unwrap();
    assert_eq!((daemon.engine.loads(), daemon.engine.contexts().len()), (2, 2));
}

#[tokio::test]
async fn many_first_calls_of_a_model_read_its_tokenizer_once() {
    let daemon = Daemon::start().await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let client = daemon.client.clone();
        let request = LoadModelRequest { model: MODEL.into(), validate_only: true, ..Default::default() };
        calls.spawn(async move { client.load_model(request).await.unwrap().next_event().await.unwrap() });
    }
    assert!(calls.join_all().await.iter().all(Option::is_some));
    let assets = daemon.engine.validated();
    assert_eq!(assets.len(), 64);
    assert!(assets.iter().all(|each| Arc::ptr_eq(each, &assets[0])));
}

#[tokio::test]
async fn what_is_refused_loads_no_model() {
    let daemon = Daemon::start().await;
    let ids = |count| Some(Input::TokenIds(TokenIds { ids: vec![5; count] }));
    let text = Some(score_request::Input::Text("x".repeat(1 << 20)));
    let score = ScoreRequest { model: MODEL.into(), input: text, ..Default::default() };
    let long_score = daemon.client.score(score).await.unwrap_err();
    let requests = [
        prompt(&"x".repeat(1 << 20)),
        prompt(&"x".repeat(20_000)),
        chat(&"word ".repeat(20_000)),
        GenerateRequest { model: MODEL.into(), input: ids(100_000), ..Default::default() },
    ];
    let mut refusals = vec![long_score.reason()];
    for request in requests {
        refusals.push(daemon.client.generate(request).await.unwrap_err().reason());
    }
    assert_eq!(refusals, [ErrorReason::ContextOverflow; 5]);
    assert_eq!(daemon.engine.loads(), 0);
    daemon.client.generate(prompt("a")).await.unwrap();
    assert_eq!(daemon.engine.loads(), 1);
}

#[tokio::test]
async fn without_automatic_loading_a_model_is_loaded_only_on_request() {
    let daemon = Daemon::with(|config| config.access.auto_load = false).await;
    let error = daemon.client.generate(prompt("a")).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::ModelNotLoaded);
    load(&daemon.client, LoadModelRequest::default()).await.unwrap();
    daemon.client.generate(prompt("a")).await.unwrap();
}

#[tokio::test]
async fn damaged_files_are_named_without_their_folder() {
    let daemon = Daemon::start().await;
    let folder = daemon.folder.path().join("models").join(MODEL);
    std::fs::write(folder.join("model.safetensors"), [255; 20]).unwrap();
    let error = daemon.client.generate(prompt("a")).await.unwrap_err();
    let call = error.call().unwrap();
    assert_eq!(call.reason, ErrorReason::ModelInvalid);
    assert!(call.message.contains("model.safetensors") && !call.message.contains("/models/"), "{call:?}");
    // It is listed all the same, without facts.
    assert_eq!(daemon.client.list_all_models(false).await.unwrap().len(), 1);
    let error = daemon.client.get_model(GetModelRequest { model: MODEL.into() }).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::ModelInvalid);
}

#[tokio::test]
async fn models_come_in_pages_that_fit_an_answer() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 65_536).await;
    let mut names: Vec<String> = (0..150).map(|at| format!("{at:03}{}", "x".repeat(240))).collect();
    for name in &names {
        folder::write(&daemon.folder.path().join("models").join(name));
    }
    names.push(MODEL.into());
    let request = ListModelsRequest { page_size: 1000, ..Default::default() };
    let first = daemon.client.list_models(request).await.unwrap();
    assert!((75..150).contains(&first.models.len()), "{}", first.models.len());
    assert_eq!(first.next_page_token, names[first.models.len() - 1]);
    let all = daemon.client.list_all_models(false).await.unwrap();
    assert!(all.iter().map(|model| &model.name).eq(&names));
}
