//! Several choices of one prompt over the wire: numbers, the best of them, limits.

use mlxd_client::v1::{
    CapabilitiesRequest, ChatInput, ErrorReason, FinishReason, GenerateRequest, Message, OutputOptions,
    SamplingOptions, ScoreRequest, score_request, stream_generate_response::Event,
};

use crate::daemon::folder::{answer_start, ids, message};
use crate::daemon::harness::{Daemon, MODEL, create, prompt, turn};

fn asking(n: u32, best_of: Option<u32>) -> GenerateRequest {
    let sampling = SamplingOptions { seed: Some(7), ..SamplingOptions::default() };
    GenerateRequest { n: Some(n), best_of, sampling: Some(sampling), ..prompt("a") }
}

#[tokio::test]
async fn choices_are_numbered_and_have_seeds_of_their_own() {
    let daemon = Daemon::start().await;
    let answer = daemon.client.generate(asking(3, None)).await.unwrap();
    assert_eq!(daemon.engine.contexts().len(), 1, "they are one request of the engine");
    let numbers: Vec<(u32, u64)> = answer.choices.iter().map(|choice| (choice.choice, choice.seed)).collect();
    assert_eq!(numbers, [(0, 7), (1, 8), (2, 9)]);
    for choice in &answer.choices {
        assert_eq!((choice.text.as_str(), choice.finish_reason()), ("yes", FinishReason::Stop));
        assert_eq!((choice.completion_tokens, choice.mean_logprob), (4, None));
    }
    assert_eq!((answer.text.as_str(), answer.finish_reason()), ("yes", FinishReason::Stop));
    let usage = answer.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1, 12));
    let one = daemon.client.generate(asking(1, None)).await.unwrap();
    assert_eq!((one.text.as_str(), one.choices.len()), ("yes", 0));
}

#[tokio::test]
async fn each_choice_of_a_stream_ends_once_before_the_last_event() {
    let daemon = Daemon::start().await;
    let mut stream = daemon.client.stream_generate(asking(3, None)).await.unwrap();
    let (mut texts, mut ended, mut finished) = (vec![String::new(); 3], vec![], 0);
    while let Some(event) = stream.next_event().await.unwrap() {
        assert_eq!(finished, 0, "nothing follows the last event");
        match event {
            Event::Started(started) => assert_eq!(started.sampling.unwrap().seed, 7),
            Event::Progress(_) => {}
            Event::Delta(delta) => {
                assert!(!ended.contains(&delta.choice));
                texts[delta.choice as usize].push_str(&delta.text);
            }
            Event::ChoiceFinished(choice) => ended.push(choice.choice),
            Event::Finished(end) => {
                finished += 1;
                assert_eq!(end.usage.unwrap().completion_tokens, 12);
            }
        }
    }
    ended.sort_unstable();
    assert_eq!((texts, ended, finished), (vec!["yes".to_owned(); 3], vec![0, 1, 2], 1));
}

#[tokio::test]
async fn the_best_are_those_with_the_highest_mean_logprob() {
    let daemon = Daemon::start().await;
    let answer = daemon.client.generate(asking(2, Some(3))).await.unwrap();
    let best: Vec<(u32, u64, Option<f32>)> =
        answer.choices.iter().map(|choice| (choice.choice, choice.seed, choice.mean_logprob)).collect();
    assert_eq!(best, [(0, 9, Some(-0.5)), (1, 7, Some(-1.5))]);
    assert!(answer.logprobs.is_empty(), "they were not asked for");
    assert_eq!(answer.usage.unwrap().completion_tokens, 12, "what was drawn, not what is returned");
    let (text, _) =
        daemon.client.stream_generate(asking(1, Some(3))).await.unwrap().collect_text().await.unwrap();
    assert_eq!(text, "yes", "streamed as well, in one piece");
    let output = Some(OutputOptions { logprobs: Some(0), ..OutputOptions::default() });
    let answer = daemon.client.generate(GenerateRequest { output, ..asking(1, Some(3)) }).await.unwrap();
    assert_eq!((answer.choices.len(), answer.choices[0].logprobs.len()), (1, 4));
    assert_eq!(answer.logprobs, answer.choices[0].logprobs);
}

#[tokio::test]
async fn numbers_of_choices_are_checked_and_a_session_has_one_answer() {
    let daemon = Daemon::with(|config| config.limits.choices_max = 4).await;
    let daemon_itself = daemon.client.capabilities(CapabilitiesRequest::default()).await.unwrap().server;
    assert_eq!(daemon_itself.unwrap().limits.unwrap().choices_max, 4);
    create(&daemon.client, "s", MODEL).await;
    for (request, field) in [
        (asking(0, None), "n"),
        (asking(5, None), "n"),
        (asking(2, Some(1)), "best_of"),
        (asking(2, Some(5)), "best_of"),
        (GenerateRequest { n: Some(2), ..turn("s", "a") }, "n"),
        (GenerateRequest { best_of: Some(2), ..turn("s", "a") }, "best_of"),
    ] {
        let error = daemon.client.generate(request).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::InvalidField);
        assert_eq!(error.call().unwrap().field_violations[0].field, field, "{error}");
    }
    assert!(daemon.engine.contexts().is_empty());
    daemon.client.generate(GenerateRequest { n: Some(1), ..turn("s", "a") }).await.unwrap();
}

#[tokio::test]
async fn candidates_that_an_answer_has_no_room_for_are_refused() {
    let daemon = Daemon::with(|config| config.limits.answer_bytes_max = 1024).await;
    let flood = GenerateRequest { best_of: Some(2), ..prompt("flood") };
    let error = daemon.client.stream_generate(flood).await.unwrap().collect_text().await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::AnswerTooLarge);
}

#[tokio::test]
async fn a_conversation_is_scored_as_its_template_writes_it() {
    let daemon = Daemon::start().await;
    let messages = vec![Message::user("a"), Message::assistant("b")];
    let chat = ChatInput { messages, ..ChatInput::default() };
    let scored = |chat: ChatInput, session: &str| {
        let input = Some(score_request::Input::Chat(chat));
        let request =
            ScoreRequest { model: MODEL.into(), input, session: session.into(), ..Default::default() };
        daemon.client.score(request)
    };
    let whole = [message("user", "a"), message("assistant", "b")].concat();
    let scores = scored(chat.clone(), "").await.unwrap();
    assert_eq!(daemon.engine.last_context(), whole);
    assert_eq!(scores.tokens.len(), whole.len());
    scored(ChatInput { continue_final_message: true, ..chat.clone() }, "").await.unwrap();
    assert_eq!(daemon.engine.last_context(), [message("user", "a"), answer_start(), ids("b")].concat());
    scored(ChatInput { add_generation_prompt: Some(true), ..chat.clone() }, "").await.unwrap();
    assert_eq!(daemon.engine.last_context(), [whole, answer_start()].concat());
    create(&daemon.client, "s", MODEL).await;
    let error = scored(chat, "s").await.unwrap_err();
    assert_eq!(error.call().unwrap().field_violations[0].field, "chat");
}
