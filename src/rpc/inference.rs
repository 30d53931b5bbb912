//! `InferenceService`.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::caller::{Caller, open};
use super::convert::{self, Input};
use super::edge::{Edge, blocking};
use super::generate::Generation;
use super::pb::{self, inference_service_server::InferenceService, stream_generate_response::Event};
use super::prepare::{Ask, context};
use super::score;
use super::status::status;
use crate::error::Error;

pub(super) struct Inference(pub(super) Arc<Edge>);

#[tonic::async_trait]
impl InferenceService for Inference {
    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<pb::GenerateResponse>, Status> {
        let (caller, request) = open(request)?;
        let answer = generate(&self.0, &caller, request).await;
        answer.map(Response::new).map_err(|error| status(&error))
    }

    type StreamGenerateStream =
        Pin<Box<dyn Stream<Item = Result<pb::StreamGenerateResponse, Status>> + Send>>;

    async fn stream_generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (caller, request) = open(request)?;
        let generation = start(&self.0, &caller, request).await.map_err(|error| status(&error))?;
        Ok(Response::new(Box::pin(events(generation))))
    }

    async fn count_tokens(
        &self,
        request: Request<pb::CountTokensRequest>,
    ) -> Result<Response<pb::CountTokensResponse>, Status> {
        let (_, request) = open(request)?;
        let answer = count_tokens(&self.0, request).await;
        answer.map(Response::new).map_err(|error| status(&error))
    }

    async fn score(&self, request: Request<pb::ScoreRequest>) -> Result<Response<pb::ScoreResponse>, Status> {
        let (caller, request) = open(request)?;
        let answer = score::score(&self.0, &caller, request).await;
        answer.map(Response::new).map_err(|error| status(&error))
    }
}

async fn start(edge: &Arc<Edge>, caller: &Caller, request: pb::GenerateRequest) -> Result<Generation, Error> {
    let ask = Ask::new(request, &edge.limits)?;
    // Large, and only a pointer here.
    Box::pin(Generation::start(edge, caller, ask)).await
}

/// The stream that the caller reads; dropping it drops the generation.
fn events(
    mut generation: Generation,
) -> impl Stream<Item = Result<pb::StreamGenerateResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match generation.next().await {
                Ok(Some(event)) => yield Ok(pb::StreamGenerateResponse { event: Some(event) }),
                Ok(None) => return,
                Err(error) => {
                    // What the caller reads last must find the session usable.
                    drop(generation);
                    yield Err(status(&error));
                    return;
                }
            }
        }
    }
}

/// The same events, collected.
async fn generate(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: pb::GenerateRequest,
) -> Result<pb::GenerateResponse, Error> {
    let mut generation = start(edge, caller, request).await?;
    let mut answer = pb::GenerateResponse::default();
    while let Some(event) = generation.next().await? {
        match event {
            Event::Started(started) => {
                answer.request_id = started.request_id;
                answer.model_revision = started.model_revision;
                answer.sampling = started.sampling;
            }
            Event::Progress(_) => {}
            Event::Delta(delta) => {
                answer.text.push_str(&delta.text);
                answer.token_ids.extend(delta.token_ids);
                answer.logprobs.extend(delta.logprobs);
            }
            Event::Finished(finished) => {
                answer.finish_reason = finished.finish_reason;
                answer.stop_string = finished.stop_string;
                answer.usage = finished.usage;
                answer.timings = finished.timings;
                answer.session_token_count = finished.session_token_count;
            }
        }
    }
    Ok(answer)
}

async fn count_tokens(
    edge: &Arc<Edge>,
    request: pb::CountTokensRequest,
) -> Result<pb::CountTokensResponse, Error> {
    let pb::CountTokensRequest { model, input, return_token_ids } = request;
    let model = convert::model_name("model", &model)?;
    let input = convert::count_input(input)?;
    let assets = edge.assets(&model).await?;
    let context_length = assets.facts.context_length;
    if matches!(&input, Input::Text(_, text) if text.is_empty()) {
        return Ok(pb::CountTokensResponse { context_length, ..Default::default() });
    }
    let (now, text_bytes_max) = (edge.clock.wall(), edge.limits.text_bytes_max);
    let tokens = blocking(move || context(&assets, input, None, now, text_bytes_max)).await?.tokens;
    Ok(pb::CountTokensResponse {
        token_count: convert::count(tokens.len()),
        token_ids: if return_token_ids { tokens } else { Vec::new() },
        context_length,
    })
}
