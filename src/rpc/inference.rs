//! `InferenceService`: requests become plain ones here, events become proto in `event`.

use std::pin::Pin;
use std::sync::Arc;

use prost::Message as _;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::event::{self, Collected};
use super::gate::open;
use super::history;
use super::message;
use super::pb::{self, inference_service_server::InferenceService};
use super::status::{answer, status};
use super::stay;
use crate::count::count;
use crate::error::Error;
use crate::service::{
    CacheOptions, CountRequest, Counted, DryOptions, Event, GenerateRequest, Generation, Input,
    OutputOptions, Priority, ResponseFormat, SamplingOptions, ScoreRequest, Service, StoppingOptions,
};

pub(super) struct Inference(pub(super) Arc<Service>);

#[tonic::async_trait]
impl InferenceService for Inference {
    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<pb::GenerateResponse>, Status> {
        let (caller, request) = open(request)?;
        let collected = async {
            // The future is large: boxed, it is only a pointer here.
            let mut generation = Box::pin(self.0.generate(&caller, generate_request(request)?)).await?;
            let mut answer = Collected::new(self.0.limits().answer_bytes_max);
            while let Some(event) = generation.next().await? {
                answer.add(event)?;
            }
            let answer = answer.whole()?;
            generation.commit().await?;
            Ok(answer)
        };
        answer(collected.await)
    }

    type StreamGenerateStream =
        Pin<Box<dyn Stream<Item = Result<pb::StreamGenerateResponse, Status>> + Send>>;

    async fn stream_generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (caller, request) = open(request)?;
        let request = generate_request(request).map_err(|error| status(&error))?;
        let generation = Box::pin(self.0.generate(&caller, request)).await.map_err(|error| status(&error))?;
        Ok(Response::new(Box::pin(events(generation, self.0.limits().answer_bytes_max))))
    }

    async fn count_tokens(
        &self,
        request: Request<pb::CountTokensRequest>,
    ) -> Result<Response<pb::CountTokensResponse>, Status> {
        let (caller, request) = open(request)?;
        let pb::CountTokensRequest { model, input, return_token_ids, reasoning } = request;
        let counted = async {
            // Each id takes a byte or more.
            let answer_tokens_max = return_token_ids.then_some(self.0.limits().answer_bytes_max);
            let mut input = count_input(input)?;
            message::reasoning(&mut input, reasoning)?;
            let request = CountRequest { model, input, answer_tokens_max };
            let Counted { tokens, context_length } = self.0.count_tokens(&caller, request).await?;
            Ok(pb::CountTokensResponse {
                token_count: count(tokens.len()),
                token_ids: if return_token_ids { tokens.to_vec() } else { Vec::new() },
                context_length,
            })
        };
        answer(counted.await)
    }

    async fn score(&self, request: Request<pb::ScoreRequest>) -> Result<Response<pb::ScoreResponse>, Status> {
        let (caller, request) = open(request)?;
        let scored = async {
            let request = score_request(request, self.0.limits().answer_bytes_max)?;
            let scores = Box::pin(self.0.score(&caller, request)).await?;
            Ok(event::scores(scores))
        };
        answer(scored.await)
    }
}

/// The stream that the caller reads; dropping it drops the generation. A session's turn is committed with the
/// event that ends it, if that can be sent.
fn events(
    mut generation: Generation,
    bytes_max: usize,
) -> impl Stream<Item = Result<pb::StreamGenerateResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match next(&mut generation, bytes_max).await {
                Ok(Some(event)) => yield Ok(event),
                Ok(None) => return,
                Err(error) => {
                    // Once the caller has read the error, its session must be usable.
                    drop(generation);
                    yield Err(status(&error));
                    return;
                }
            }
        }
    }
}

async fn next(
    generation: &mut Generation,
    bytes_max: usize,
) -> Result<Option<pb::StreamGenerateResponse>, Error> {
    let Some(event) = generation.next().await? else { return Ok(None) };
    let is_end = matches!(event, Event::Finished(_));
    let message = event::stream_event(event);
    if is_end {
        event::at_most_bytes(message.encoded_len(), bytes_max)?;
        generation.commit().await?;
    }
    Ok(Some(message))
}

fn generate_request(request: pb::GenerateRequest) -> Result<GenerateRequest, Error> {
    let pb::GenerateRequest {
        model,
        input,
        session,
        expected_token_count,
        sampling,
        stopping,
        output,
        priority: order,
        keep_alive,
        history,
        cache,
        response_format,
        reasoning,
        n,
        best_of,
    } = request;
    let mut input = generate_input(input)?;
    message::reasoning(&mut input, reasoning)?;
    let pb::OutputOptions { logprobs, return_token_ids } = output.unwrap_or_default();
    Ok(GenerateRequest {
        model,
        input,
        session,
        expected_token_count,
        sampling: sampling_options(sampling.unwrap_or_default()),
        stopping: stopping_options(stopping.unwrap_or_default()),
        output: OutputOptions { top_logprobs: logprobs, token_ids: return_token_ids },
        priority: priority(order)?,
        keep_alive: stay::from_wire(keep_alive)?,
        history: history::from_wire(history)?,
        cache: cache_options(cache),
        response_format: response_format.map(format).transpose()?,
        n,
        best_of,
    })
}

/// Returns the form of an answer.
fn format(sent: pb::ResponseFormat) -> Result<ResponseFormat, Error> {
    use pb::response_format::Format;
    let sent = sent.format.ok_or_else(|| Error::field("response_format", "must have a format"))?;
    Ok(match sent {
        Format::JsonObject(pb::JsonObjectFormat {}) => ResponseFormat::JsonObject,
        Format::JsonSchema(pb::JsonSchemaFormat { schema }) => ResponseFormat::JsonSchema(schema),
        Format::Regex(regex) => ResponseFormat::Regex(regex),
        Format::Grammar(grammar) => ResponseFormat::Grammar(grammar),
        Format::Choice(pb::ChoiceFormat { texts }) => ResponseFormat::Choice(texts),
    })
}

fn score_request(request: pb::ScoreRequest, bytes_max: usize) -> Result<ScoreRequest, Error> {
    let pb::ScoreRequest { model, input, top_logprobs, session, priority: order, cache, keep_alive } =
        request;
    Ok(ScoreRequest {
        model,
        input: score_input(input)?,
        top_logprobs,
        session,
        priority: priority(order)?,
        cache: cache_options(cache),
        answer_tokens_max: bytes_max / event::score_bytes_min(top_logprobs),
        keep_alive: stay::from_wire(keep_alive)?,
    })
}

fn generate_input(input: Option<pb::generate_request::Input>) -> Result<Input, Error> {
    use pb::generate_request::Input as Wire;
    match input.ok_or_else(missing_input)? {
        Wire::Prompt(text) => Ok(Input::Text(text)),
        Wire::TokenIds(list) => Ok(Input::Ids(list.ids)),
        Wire::Chat(chat) => message::chat(chat).map(Input::Chat),
    }
}

fn count_input(input: Option<pb::count_tokens_request::Input>) -> Result<Input, Error> {
    use pb::count_tokens_request::Input as Wire;
    match input.ok_or_else(missing_input)? {
        Wire::Prompt(text) => Ok(Input::Text(text)),
        Wire::Chat(chat) => message::chat(chat).map(Input::Chat),
    }
}

fn score_input(input: Option<pb::score_request::Input>) -> Result<Input, Error> {
    use pb::score_request::Input as Wire;
    match input.ok_or_else(missing_input)? {
        Wire::Text(text) => Ok(Input::Text(text)),
        Wire::TokenIds(list) => Ok(Input::Ids(list.ids)),
        Wire::Chat(chat) => message::chat(chat).map(Input::Chat),
    }
}

pub(super) fn missing_input() -> Error {
    Error::field("input", "must be given")
}

fn sampling_options(sent: pb::SamplingOptions) -> SamplingOptions {
    let pb::SamplingOptions {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        repetition_penalty,
        repetition_context_size,
        presence_penalty,
        presence_context_size,
        frequency_penalty,
        frequency_context_size,
        xtc_probability,
        xtc_threshold,
        logit_bias,
        typical_p,
        dry_multiplier,
        dry_base,
        dry_allowed_length,
        dry_context_size,
        dry_sequence_breakers,
    } = sent;
    let dry = DryOptions {
        multiplier: dry_multiplier,
        base: dry_base,
        allowed_length: dry_allowed_length,
        context_size: dry_context_size,
        sequence_breakers: dry_sequence_breakers.map(|list| list.texts),
    };
    SamplingOptions {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        repetition_penalty,
        repetition_context_size,
        presence_penalty,
        presence_context_size,
        frequency_penalty,
        frequency_context_size,
        xtc_probability,
        xtc_threshold,
        logit_bias: logit_bias.into_iter().collect(),
        typical_p,
        dry,
    }
}

fn stopping_options(sent: pb::StoppingOptions) -> StoppingOptions {
    let pb::StoppingOptions { max_tokens, stop_strings, stop_token_ids, ignore_eos } = sent;
    StoppingOptions { max_tokens, stop_strings: stop_strings.into(), stop_token_ids, ignore_eos }
}

fn cache_options(sent: Option<pb::CacheOptions>) -> CacheOptions {
    let pb::CacheOptions { off, salt } = sent.unwrap_or_default();
    CacheOptions { off, salt }
}

pub(super) fn priority(sent: i32) -> Result<Priority, Error> {
    match pb::Priority::try_from(sent) {
        Ok(pb::Priority::Unspecified | pb::Priority::Normal) => Ok(Priority::Normal),
        Ok(pb::Priority::Interactive) => Ok(Priority::Interactive),
        Ok(pb::Priority::Background) => Ok(Priority::Background),
        Err(_) => Err(Error::field("priority", "unknown priority")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_without_input_and_unknown_values_are_refused() {
        let field_of = |outcome: Result<GenerateRequest, Error>| match outcome {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field_of(generate_request(pb::GenerateRequest::default())), "input");
        let input = Some(pb::generate_request::Input::Prompt("a".into()));
        let request = pb::GenerateRequest { input: input.clone(), priority: 99, ..Default::default() };
        assert_eq!(field_of(generate_request(request)), "priority");
        let request = pb::GenerateRequest { input, history: 99, ..Default::default() };
        assert_eq!(field_of(generate_request(request)), "history");
    }
}
