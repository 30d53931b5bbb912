//! Answers and events of the use cases as proto messages.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use prost::Message as _;

use super::history::outcome;
use super::pb::{self, stream_generate_response as stream};
use crate::error::Error;
use crate::service::{
    CallPart, ChoiceFinished, EffectiveSampling, Event, Finish, Finished, OutputDelta, Scores, Started,
    TokenLogprob, TokenLogprobs, TokenScore, Usage,
};

/// Returns one message of a stream.
pub(super) fn stream_event(event: Event) -> pb::StreamGenerateResponse {
    let event = match event {
        Event::Started(started) => stream::Event::Started(self::started(started)),
        Event::Progress { done_tokens, total_tokens } => {
            stream::Event::Progress(pb::PrefillProgress { done_tokens, total_tokens })
        }
        Event::Delta(OutputDelta { choice, text, reasoning, calls, token_ids, logprobs }) => {
            let logprobs = logprobs.into_iter().map(token_logprobs).collect();
            let tool_calls = calls.into_iter().map(call_delta).collect();
            let delta = pb::GenerateDelta { text, token_ids, logprobs, reasoning, tool_calls, choice };
            stream::Event::Delta(delta)
        }
        Event::ChoiceFinished(finished) => stream::Event::ChoiceFinished(choice_finished(finished)),
        Event::Finished(finished) => stream::Event::Finished(self::finished(finished)),
    };
    pb::StreamGenerateResponse { event: Some(event) }
}

/// The answer of a call that returns everything at once, as far as it has come.
pub(super) struct Collected {
    answer: pb::GenerateResponse,
    /// Output by choice.
    choices: BTreeMap<u32, pb::GenerateChoice>,
    /// The call of each that has begun and not ended.
    begun: BTreeMap<u32, pb::ToolCall>,
    /// Whether several choices were asked for.
    has_several: bool,
    /// Bytes that all choices have at least, and those of the first alone: of several it is sent twice.
    bytes: usize,
    first_bytes: usize,
    bytes_max: usize,
}

impl Collected {
    /// Begins an answer of at most `bytes_max` bytes.
    pub(super) fn new(bytes_max: usize) -> Self {
        let (answer, choices, begun) = (pb::GenerateResponse::default(), BTreeMap::new(), BTreeMap::new());
        Self { answer, choices, begun, has_several: false, bytes: 0, first_bytes: 0, bytes_max }
    }

    /// Adds an event; fails as soon as the answer is too large, so that nothing is computed in vain.
    pub(super) fn add(&mut self, event: Event) -> Result<(), Error> {
        let answer = &mut self.answer;
        match event {
            Event::Started(started) => {
                let started = self::started(started);
                answer.request_id = started.request_id;
                answer.model_revision = started.model_revision;
                answer.sampling = started.sampling;
                answer.history = started.history;
            }
            Event::Progress { .. } => {}
            Event::Delta(OutputDelta { choice: number, text, reasoning, calls, token_ids, logprobs }) => {
                self.has_several |= number > 0;
                let mut bytes = text.len() + reasoning.len() + token_ids.len();
                let choice = self.choices.entry(number).or_default();
                choice.text.push_str(&text);
                choice.reasoning.push_str(&reasoning);
                choice.token_ids.extend(token_ids);
                for token in logprobs.into_iter().map(token_logprobs) {
                    bytes += token.encoded_len();
                    choice.logprobs.push(token);
                }
                bytes += calls.into_iter().map(|part| self.add_call(number, part)).sum::<usize>();
                self.bytes += bytes;
                self.first_bytes += if number == 0 { bytes } else { 0 };
            }
            Event::ChoiceFinished(finished) => {
                let pb::ChoiceFinished {
                    choice,
                    finish_reason,
                    stop_string,
                    completion_tokens,
                    seed,
                    mean_logprob,
                } = choice_finished(finished);
                let ended = self.choices.entry(choice).or_default();
                *ended = pb::GenerateChoice {
                    choice,
                    finish_reason,
                    stop_string,
                    completion_tokens,
                    seed,
                    mean_logprob,
                    ..std::mem::take(ended)
                };
                self.has_several = true;
            }
            Event::Finished(finished) => {
                let finished = self::finished(finished);
                answer.finish_reason = finished.finish_reason;
                answer.stop_string = finished.stop_string;
                answer.usage = finished.usage;
                answer.timings = finished.timings;
                answer.session_token_count = finished.session_token_count;
            }
        }
        let again_bytes = if self.has_several { self.first_bytes } else { 0 };
        at_most_bytes(self.bytes + again_bytes, self.bytes_max)
    }

    /// Adds a part of a call; returns the bytes of its arguments.
    fn add_call(&mut self, choice: u32, part: CallPart) -> usize {
        match part {
            CallPart::Begin { index: _, id, name } => {
                self.begun.insert(choice, pb::ToolCall { id, name, arguments_json: String::new() });
                0
            }
            CallPart::Arguments { index: _, fragment } => {
                if let Some(call) = self.begun.get_mut(&choice) {
                    call.arguments_json.push_str(&fragment);
                }
                fragment.len()
            }
            CallPart::End { index: _ } => {
                self.choices.entry(choice).or_default().tool_calls.extend(self.begun.remove(&choice));
                0
            }
        }
    }

    /// Returns the answer if it can be sent.
    pub(super) fn whole(mut self) -> Result<pb::GenerateResponse, Error> {
        let first = self.choices.remove(&0).unwrap_or_default();
        let choices = if self.has_several {
            std::iter::once(first.clone()).chain(self.choices.into_values()).collect()
        } else {
            Vec::new()
        };
        let pb::GenerateChoice { text, reasoning, tool_calls, token_ids, logprobs, .. } = first;
        let answer =
            pb::GenerateResponse { text, reasoning, tool_calls, token_ids, logprobs, choices, ..self.answer };
        at_most_bytes(answer.encoded_len(), self.bytes_max).map(|()| answer)
    }
}

/// Refuses an answer that cannot be sent.
pub(super) fn at_most_bytes(bytes: usize, bytes_max: usize) -> Result<(), Error> {
    if bytes <= bytes_max { Ok(()) } else { Err(Error::AnswerTooLarge { limit_bytes: bytes_max as u64 }) }
}

/// Returns the least bytes that a token's score takes in an answer. Its token and each alternative have a
/// frame of 2, and an alternative a log-probability of 5 and an id of 2; but one may be certain, and one has
/// the id 0, and protobuf writes no zeros.
pub(super) fn score_bytes_min(top_logprobs: u32) -> usize {
    let (frame, logprob, id) = (2, 5, 2);
    let alternatives = (top_logprobs as usize).saturating_mul(frame + logprob + id);
    (2 * frame).saturating_add(alternatives.saturating_sub(logprob + id))
}

pub(super) fn scores(scores: Scores) -> pb::ScoreResponse {
    let Scores { tokens, usage } = scores;
    let token = |TokenScore { token, has_logprob, top }| pb::TokenScore {
        token: Some(token_logprob(token)),
        has_logprob,
        top: top.into_iter().map(token_logprob).collect(),
    };
    pb::ScoreResponse { tokens: tokens.into_iter().map(token).collect(), usage: Some(self::usage(usage)) }
}

pub(super) fn effective_sampling(sampling: EffectiveSampling) -> pb::EffectiveSampling {
    let EffectiveSampling {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        xtc_probability,
        xtc_threshold,
        typical_p,
        dry_multiplier,
        dry_base,
        dry_allowed_length,
        max_tokens,
    } = sampling;
    pb::EffectiveSampling {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        max_tokens,
        xtc_probability,
        xtc_threshold,
        typical_p,
        dry_multiplier,
        dry_base,
        dry_allowed_length,
    }
}

pub(super) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

pub(super) fn timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    Some(time.into())
}

fn started(started: Started) -> pb::GenerateStarted {
    let Started { request, model_revision, prompt_tokens, cached_tokens, queue_time, sampling, history } =
        started;
    pb::GenerateStarted {
        request_id: request.to_string(),
        model_revision,
        prompt_tokens,
        cached_tokens,
        queue_time: duration(queue_time),
        sampling: Some(effective_sampling(sampling)),
        history: outcome(history),
    }
}

fn finished(finished: Finished) -> pb::GenerateFinished {
    let Finished {
        finish,
        stop_string,
        usage,
        queue_time,
        time_to_first_token,
        decode_time,
        total_time,
        session_token_count,
    } = finished;
    pb::GenerateFinished {
        finish_reason: finish_reason(finish).into(),
        stop_string,
        usage: Some(self::usage(usage)),
        timings: Some(pb::Timings {
            queue_time: duration(queue_time),
            time_to_first_token: duration(time_to_first_token),
            decode_time: duration(decode_time),
            total_time: duration(total_time),
        }),
        session_token_count,
    }
}

fn choice_finished(finished: ChoiceFinished) -> pb::ChoiceFinished {
    let ChoiceFinished { choice, finish, stop_string, completion_tokens, seed, mean_logprob } = finished;
    pb::ChoiceFinished {
        choice,
        finish_reason: finish_reason(finish).into(),
        stop_string,
        completion_tokens,
        seed,
        mean_logprob,
    }
}

fn finish_reason(finish: Finish) -> pb::FinishReason {
    match finish {
        Finish::StopToken | Finish::Complete => pb::FinishReason::Stop,
        Finish::StopString(_) => pb::FinishReason::StopString,
        Finish::Length => pb::FinishReason::Length,
        Finish::ToolCalls => pb::FinishReason::ToolCalls,
    }
}

pub(super) fn usage(usage: Usage) -> pb::Usage {
    let Usage { prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens } = usage;
    pb::Usage { prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens }
}

fn call_delta(part: CallPart) -> pb::ToolCallDelta {
    match part {
        CallPart::Begin { index, id, name } => pb::ToolCallDelta { index, id, name, ..Default::default() },
        CallPart::Arguments { index, fragment } => {
            pb::ToolCallDelta { index, arguments_json: fragment, ..Default::default() }
        }
        CallPart::End { index } => pb::ToolCallDelta { index, done: true, ..Default::default() },
    }
}

fn token_logprob(token: TokenLogprob) -> pb::TokenLogprob {
    let TokenLogprob { id, logprob, bytes } = token;
    pb::TokenLogprob { token_id: id, logprob, token_bytes: bytes }
}

fn token_logprobs(token: TokenLogprobs) -> pb::TokenLogprobs {
    let TokenLogprobs { chosen, top } = token;
    pb::TokenLogprobs {
        chosen: Some(token_logprob(chosen)),
        top: top.into_iter().map(token_logprob).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_score_takes_less_than_the_least_bytes() {
        // The first of the most likely tokens is certain and has the id 0; none has bytes.
        let alternative = |id| {
            let logprob = if id == 0 { 0.0 } else { -1.0 };
            TokenLogprob { id, logprob, bytes: Vec::new() }
        };
        for top_logprobs in 0..20 {
            let token = TokenScore {
                token: alternative(0),
                has_logprob: false,
                top: (0..top_logprobs).map(alternative).collect(),
            };
            let bytes = |tokens| scores(Scores { tokens, usage: Usage::default() }).encoded_len();
            let own = bytes(vec![token]) - bytes(Vec::new());
            assert!(own >= score_bytes_min(top_logprobs), "{top_logprobs}: {own}");
        }
    }

    #[test]
    fn the_first_of_several_choices_counts_twice_as_it_is_sent() {
        let delta = |choice, bytes| {
            Event::Delta(OutputDelta {
                choice,
                text: "x".repeat(bytes),
                reasoning: String::new(),
                calls: Vec::new(),
                token_ids: Vec::new(),
                logprobs: Vec::new(),
            })
        };
        let mut alone = Collected::new(1000);
        assert!(alone.add(delta(0, 600)).is_ok() && alone.whole().is_ok());
        let mut first = Collected::new(1000);
        assert!(first.add(delta(0, 600)).is_ok() && first.add(delta(1, 1)).is_err());
        let mut other = Collected::new(1000);
        assert!(other.add(delta(1, 600)).is_ok() && other.add(delta(0, 1)).is_ok());
    }
}
