//! Calls that go well.

use mlxd_client::v1::{
    CapabilitiesRequest, CountTokensRequest, ErrorReason, Feature, FinishReason, GenerateRequest,
    GetStatsRequest, OutputOptions, ScoreRequest, StoppingOptions, TokenIds, score_request,
    stream_generate_response::Event,
};
use tonic::{Code, Request};

use crate::daemon::fake::ANSWER;
use crate::daemon::folder::{END, answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, WORDS, chat, prompt};

#[tokio::test]
async fn both_generate_calls_give_the_same_answer() {
    let daemon = Daemon::start().await;
    let whole = daemon.client.generate(chat("hi")).await.unwrap();
    assert_eq!((whole.text.as_str(), whole.finish_reason()), (ANSWER, FinishReason::Stop));
    let usage = whole.usage.unwrap();
    assert_eq!(
        (usage.prompt_tokens as usize, usage.completion_tokens),
        (daemon.engine.last_context().len(), 4)
    );
    assert_eq!(daemon.engine.last_context(), [message("user", "hi"), answer_start()].concat());

    let mut stream = daemon.client.stream_generate(chat("hi")).await.unwrap();
    let mut kinds = Vec::new();
    let mut text = String::new();
    while let Some(event) = stream.next_event().await.unwrap() {
        kinds.push(match event {
            Event::Started(started) => {
                assert_eq!(started.model_revision, whole.model_revision);
                's'
            }
            Event::Progress(progress) => {
                assert_eq!(progress.done_tokens, progress.total_tokens);
                'p'
            }
            Event::Delta(delta) => {
                assert!(delta.token_ids.is_empty() && delta.logprobs.is_empty(), "not asked for");
                text += &delta.text;
                'd'
            }
            Event::ChoiceFinished(_) => 'c',
            Event::Finished(_) => 'f',
        });
    }
    assert_eq!((text.as_str(), kinds.iter().collect::<String>().as_str()), (ANSWER, "spddddf"));
}

#[tokio::test]
async fn a_raw_prompt_and_its_answer_are_one_text() {
    let daemon = Daemon::start().await;
    daemon.add_words();
    let ask = |text: &str| GenerateRequest { model: WORDS.into(), ..prompt(text) };
    assert_eq!(daemon.client.generate(ask("The capital of France is")).await.unwrap().text, " Paris");
    let mut stream = daemon.client.stream_generate(ask("The")).await.unwrap();
    let mut text = String::new();
    while let Some(event) = stream.next_event().await.unwrap() {
        if let Event::Delta(delta) = event {
            text += &delta.text;
        }
    }
    assert_eq!(text, " Paris");
}

#[tokio::test]
async fn ids_and_logprobs_come_if_asked_for() {
    let daemon = Daemon::start().await;
    let output = Some(OutputOptions { logprobs: Some(1), return_token_ids: true });
    let stopping = Some(StoppingOptions { max_tokens: Some(2), ..Default::default() });
    let answer = daemon.client.generate(GenerateRequest { output, stopping, ..prompt("a") }).await.unwrap();
    assert_eq!((answer.token_ids, answer.logprobs.len()), (ids("ye"), 2));
    assert_eq!(answer.logprobs[1].chosen.as_ref().unwrap().token_bytes, b"e");
    assert_eq!(answer.sampling.unwrap().max_tokens, 2);
    assert_eq!(answer.finish_reason, i32::from(FinishReason::Length));
}

#[tokio::test]
async fn max_tokens_is_clamped_to_the_rest_of_the_context() {
    let daemon = Daemon::start().await;
    let stopping =
        Some(StoppingOptions { max_tokens: Some(100_000), ignore_eos: true, ..Default::default() });
    let request = GenerateRequest { stopping, ..prompt(&"x".repeat(398)) };
    let answer = daemon.client.generate(request).await.unwrap();
    assert_eq!((answer.sampling.unwrap().max_tokens, answer.text.as_str()), (2, "ye"));
}

#[tokio::test]
async fn the_callers_request_id_comes_back() {
    let daemon = Daemon::start().await;
    let mut request = Request::new(prompt("a"));
    request.metadata_mut().insert("x-request-id", "my-1".parse().unwrap());
    assert_eq!(daemon.client.generate(request).await.unwrap().request_id, "my-1");
    let mut client = daemon.raw().await;
    let mut request = Request::new(GetStatsRequest {});
    request.metadata_mut().insert("x-request-id", "my-2".parse().unwrap());
    let answer = client.get_stats(request).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "my-2");
}

#[tokio::test]
async fn connections_are_clients_unless_they_name_themselves() {
    let daemon = Daemon::start().await;
    let address = daemon.client.address().to_string();
    for _ in 0..2 {
        let client = mlxd_client::Client::connect(&address).await.unwrap();
        client.generate(prompt("a")).await.unwrap();
    }
    let options = mlxd_client::ConnectOptions {
        address: Some(address.parse().unwrap()),
        client_name: Some("editor".into()),
        ..Default::default()
    };
    let client = mlxd_client::Client::connect_with(options).await.unwrap();
    client.generate(prompt("a")).await.unwrap();
    let clients = daemon.engine.clients();
    assert_ne!(clients[0], clients[1]);
    assert!(clients[2].ends_with("/editor"), "{clients:?}");
}

#[tokio::test]
async fn tokens_are_counted_without_a_load() {
    let daemon = Daemon::start().await;
    let request = |text: &str| CountTokensRequest {
        model: MODEL.into(),
        return_token_ids: true,
        ..CountTokensRequest::prompt(text)
    };
    let count = daemon.client.count_tokens(request("abc")).await.unwrap();
    assert_eq!((count.token_count, count.token_ids, count.context_length), (3, ids("abc"), 400));
    assert_eq!(daemon.client.count_tokens(request("")).await.unwrap().token_count, 0);
    assert_eq!(daemon.engine.loads(), 0);
}

#[tokio::test]
async fn every_token_but_the_first_has_a_score() {
    let daemon = Daemon::start().await;
    let input = Some(score_request::Input::TokenIds(TokenIds { ids: vec![5, END] }));
    let request = ScoreRequest { model: MODEL.into(), input, top_logprobs: 1, ..Default::default() };
    let score = daemon.client.score(request).await.unwrap();
    assert_eq!(score.tokens.iter().map(|token| token.has_logprob).collect::<Vec<_>>(), [false, true]);
    let second = score.tokens[1].token.as_ref().unwrap();
    assert_eq!(
        (second.token_id, second.logprob, second.token_bytes.as_slice()),
        (END, -0.25, &b"<|end|>"[..])
    );
    assert_eq!(score.usage.unwrap().prompt_tokens, 2);
}

#[tokio::test]
async fn an_answer_that_could_not_be_sent_is_refused_before_the_work() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 65_536).await;
    let score = |tokens, top_logprobs| {
        let input = Some(score_request::Input::TokenIds(TokenIds { ids: vec![5; tokens] }));
        ScoreRequest { model: MODEL.into(), input, top_logprobs, ..Default::default() }
    };
    let count = |bytes, return_token_ids| CountTokensRequest {
        model: MODEL.into(),
        return_token_ids,
        ..CountTokensRequest::prompt("x".repeat(bytes))
    };
    let refused = [
        daemon.client.score(score(400, 20)).await.unwrap_err(),
        daemon.client.count_tokens(count(65_537, true)).await.unwrap_err(),
        daemon.client.count_tokens(count(10_000_000, true)).await.unwrap_err(),
    ];
    for error in refused {
        let call = error.call().unwrap();
        assert_eq!((call.code, call.reason), (Code::ResourceExhausted, ErrorReason::AnswerTooLarge));
        assert_eq!(call.metadata["limit_bytes"], "65536");
    }
    assert!(daemon.engine.contexts().is_empty() && daemon.engine.loads() == 0);
    assert_eq!(daemon.client.score(score(300, 20)).await.unwrap().tokens.len(), 300);
    assert_eq!(daemon.client.count_tokens(count(65_000, true)).await.unwrap().token_ids.len(), 65_000);
    assert_eq!(daemon.client.count_tokens(count(65_537, false)).await.unwrap().token_count, 65_537);
}

#[tokio::test]
async fn capabilities_describe_the_daemon_and_the_models() {
    let daemon = Daemon::start().await;
    let none = daemon.client.capabilities(CapabilitiesRequest::default()).await.unwrap();
    assert!(none.models.is_empty());
    let server = none.server.unwrap();
    assert_eq!((server.device.as_str(), server.limits.unwrap().memory_budget_bytes), ("fake", 1000));
    let request = CapabilitiesRequest { models: vec![MODEL.into()] };
    let model = daemon.client.capabilities(request).await.unwrap().models.remove(0);
    assert!(model.has_chat_template && model.features.contains(&Feature::Chat.into()));
    assert!(!model.features.contains(&Feature::Tools.into()));
    assert!(model.features.contains(&Feature::SystemPrompt.into()));
    assert_eq!(model.eos_token_ids, [END]);
    assert_eq!(model.default_sampling.unwrap().max_tokens, 399);
}

#[tokio::test]
async fn stats_count_what_the_engine_does() {
    let daemon = Daemon::start().await;
    daemon.client.generate(prompt("a")).await.unwrap();
    let stats = daemon.client.get_stats(GetStatsRequest {}).await.unwrap();
    let memory = stats.memory.unwrap();
    assert_eq!((stats.requests_total, memory.weight_bytes, memory.kv_idle_bytes), (1, 8, 7));
    assert!(memory.process_resident_bytes > 0 || !cfg!(target_os = "linux"));
}
