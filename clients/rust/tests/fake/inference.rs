//! Generation: echoes the last message, word by word.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use mlxd_client::v1::{
    CountTokensRequest, CountTokensResponse, EffectiveSampling, FinishReason, GenerateChoice, GenerateDelta,
    GenerateFinished, GenerateRequest, GenerateResponse, GenerateStarted, PrefillProgress, ScoreRequest,
    ScoreResponse, StreamGenerateResponse, Timings, TokenLogprob, TokenScore, Turn, Usage,
    count_tokens_request, generate_request, score_request, stream_generate_response::Event,
};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use super::services::inference_service_server::InferenceService;
use super::{Fake, State, refusal};

type EventStream = Pin<Box<dyn Stream<Item = Result<StreamGenerateResponse, Status>> + Send>>;

/// Counts a generation that is dropped before its end.
struct Running {
    state: Arc<Mutex<State>>,
    ended: bool,
}

impl Running {
    fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.state.lock().expect("state").cancelled += 1;
        }
    }
}

fn words(text: &str) -> u32 {
    u32::try_from(text.split_whitespace().count()).expect("few words")
}

fn input_text(request: &GenerateRequest) -> String {
    match &request.input {
        Some(generate_request::Input::Prompt(text)) => text.clone(),
        Some(generate_request::Input::Chat(chat)) => {
            chat.messages.last().map(mlxd_client::v1::Message::text).unwrap_or_default()
        }
        Some(generate_request::Input::TokenIds(ids)) => format!("{} ids", ids.ids.len()),
        None => String::new(),
    }
}

impl Fake {
    /// Refuses what the daemon would refuse at once.
    fn check(&self, request: &GenerateRequest) -> Result<(), Status> {
        if !request.session.is_empty() && !self.state().sessions.contains_key(&request.session) {
            return Err(refusal(
                Code::NotFound,
                "SESSION_NOT_FOUND",
                &format!("no session named {:?}", request.session),
                &[],
            ));
        }
        if request.session.is_empty() || !request.model.is_empty() {
            self.model(&request.model)?;
        }
        match input_text(request).as_str() {
            "overflow" => Err(refusal(
                Code::InvalidArgument,
                "CONTEXT_OVERFLOW",
                "the input has 3000 tokens; the model's context of 2048 leaves no room for an answer",
                &[("prompt_tokens", "3000"), ("context_length", "2048")],
            )),
            _ => Ok(()),
        }
    }

    fn finish(&self, request: &GenerateRequest, text: &str) -> GenerateFinished {
        let prompt = words(&input_text(request));
        let usage = Usage {
            prompt_tokens: prompt,
            cached_tokens: 0,
            completion_tokens: words(text),
            ..Usage::default()
        };
        let mut state = self.state();
        let session = state.sessions.get_mut(&request.session);
        let session_token_count = session.map(|session| {
            session.token_count += prompt + words(text);
            let message_count = u32::try_from(session.turns.len()).expect("few turns") * 2 + 2;
            session.turns.push(Turn { message_count, token_count: session.token_count });
            session.token_count
        });
        let milliseconds = |count| Some(prost_types::Duration { seconds: 0, nanos: count * 1_000_000 });
        GenerateFinished {
            finish_reason: FinishReason::Stop.into(),
            usage: Some(usage),
            timings: Some(Timings {
                queue_time: milliseconds(1),
                time_to_first_token: milliseconds(20),
                decode_time: milliseconds(100),
                total_time: milliseconds(120),
            }),
            session_token_count,
            ..GenerateFinished::default()
        }
    }
}

/// The text that answers; `hang`, `cut` and `die` misbehave after the first word.
fn answer(request: &GenerateRequest) -> String {
    format!("You said: {}", input_text(request))
}

#[tonic::async_trait]
impl InferenceService for Fake {
    type StreamGenerateStream = EventStream;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let request = self.note("Generate", request);
        self.state().generations.push(request.clone());
        self.check(&request)?;
        let text = answer(&request);
        let GenerateFinished { finish_reason, stop_string, usage, timings, session_token_count } =
            self.finish(&request, &text);
        let request_id = "fake".into();
        let several = 0..request.n.filter(|n| *n > 1).unwrap_or(0);
        let choice =
            |choice| GenerateChoice { choice, text: format!("{text} {choice}"), ..GenerateChoice::default() };
        let choices = several.map(choice).collect();
        let (token_ids, logprobs) = (vec![], vec![]);
        Ok(Response::new(GenerateResponse {
            request_id,
            model_revision: "r1".into(),
            text,
            token_ids,
            logprobs,
            finish_reason,
            stop_string,
            usage,
            timings,
            session_token_count,
            sampling: Some(EffectiveSampling::default()),
            choices,
            ..GenerateResponse::default()
        }))
    }

    async fn stream_generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let request = self.note("StreamGenerate", request);
        self.state().generations.push(request.clone());
        self.check(&request)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let fake = self.clone();
        let mut running = Running { state: self.state.clone(), ended: false };
        tokio::spawn(async move {
            let text = answer(&request);
            let said = input_text(&request);
            let prompt_tokens = words(&said);
            let started = GenerateStarted {
                request_id: "fake".into(),
                model_revision: "r1".into(),
                prompt_tokens,
                sampling: Some(EffectiveSampling {
                    seed: 7,
                    max_tokens: 4096,
                    ..EffectiveSampling::default()
                }),
                ..GenerateStarted::default()
            };
            let progress = PrefillProgress { done_tokens: prompt_tokens, total_tokens: prompt_tokens };
            let mut events = vec![Event::Started(started), Event::Progress(progress)];
            events.extend(text.split_inclusive(' ').map(|word| {
                Event::Delta(GenerateDelta { text: word.to_owned(), ..GenerateDelta::default() })
            }));
            let misbehaves = ["hang", "cut", "die"].contains(&said.as_str());
            for event in events.into_iter().take(if misbehaves { 3 } else { usize::MAX }) {
                if sender.send(Ok(StreamGenerateResponse { event: Some(event) })).await.is_err() {
                    return;
                }
            }
            match said.as_str() {
                "hang" => return sender.closed().await,
                "cut" => {}
                "die" => {
                    let error = refusal(
                        Code::Internal,
                        "NON_FINITE_LOGITS",
                        "the model produced logits that are not finite",
                        &[],
                    );
                    _ = sender.send(Err(error)).await;
                }
                _ => {
                    let finished = Event::Finished(fake.finish(&request, &text));
                    _ = sender.send(Ok(StreamGenerateResponse { event: Some(finished) })).await;
                }
            }
            running.end();
        });
        let mut response =
            Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)) as EventStream);
        response.metadata_mut().insert("x-request-id", "fake".parse().expect("a header"));
        Ok(response)
    }

    async fn count_tokens(
        &self,
        request: Request<CountTokensRequest>,
    ) -> Result<Response<CountTokensResponse>, Status> {
        let request = self.note("CountTokens", request);
        let text = match request.input {
            Some(count_tokens_request::Input::Prompt(text)) => text,
            Some(count_tokens_request::Input::Chat(_)) | None => String::new(),
        };
        let token_count = words(&text);
        Ok(Response::new(CountTokensResponse { token_count, context_length: 2048, ..Default::default() }))
    }

    async fn score(&self, request: Request<ScoreRequest>) -> Result<Response<ScoreResponse>, Status> {
        let request = self.note("Score", request);
        let ids = match request.input {
            Some(score_request::Input::TokenIds(ids)) => ids.ids,
            // As many scores as there are bytes: a large answer to a short question.
            Some(score_request::Input::Text(text)) => vec![0; text.parse().unwrap_or(0)],
            Some(score_request::Input::Chat(chat)) => vec![0; chat.messages.len()],
            None => vec![],
        };
        let score = |token_id| TokenScore {
            token: Some(TokenLogprob { token_id, logprob: -1.0, token_bytes: vec![b'x'; 100] }),
            ..TokenScore::default()
        };
        let tokens = ids.into_iter().map(score).collect();
        Ok(Response::new(ScoreResponse { tokens, ..ScoreResponse::default() }))
    }
}
