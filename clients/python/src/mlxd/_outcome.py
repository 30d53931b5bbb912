"""Conversion of the responses of a generation to Python values."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from mlxd.errors import ServerError
from mlxd.types import Choice, Completion, FinishReason, HistoryOutcome, TokenLogprobs
from mlxd.v1 import inference_pb2 as pb

_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop_string",
    pb.FINISH_REASON_LENGTH: "length",
}
_HISTORY_OUTCOMES: dict[int, HistoryOutcome] = {
    pb.HISTORY_OUTCOME_CONTINUED: "continued",
    pb.HISTORY_OUTCOME_APPENDED: "appended",
    pb.HISTORY_OUTCOME_RERENDERED: "rerendered",
}


def _seconds(value: Duration) -> float:
    return value.ToTimedelta().total_seconds()


def _finish_reason(value: int) -> FinishReason:
    reason = _FINISH_REASONS.get(value)
    if reason is None:
        raise ServerError(f"the daemon gave finish_reason {value}")
    return reason


def choice(
    end: pb.ChoiceFinished | pb.GenerateChoice,
    text: str,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
) -> Choice:
    """Builds one of several outputs; a GenerateChoice is its own end."""
    return Choice(
        text=text,
        finish_reason=_finish_reason(end.finish_reason),
        stop_string=end.stop_string,
        completion_tokens=end.completion_tokens,
        seed=end.seed,
        mean_logprob=end.mean_logprob if end.HasField("mean_logprob") else None,
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
    )


def completion(
    started: pb.GenerateStarted | pb.GenerateResponse,
    finished: pb.GenerateFinished | pb.GenerateResponse,
    text: str,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    choices: Sequence[Choice] = (),
) -> Completion:
    """Builds the Completion of a finished generation; a GenerateResponse is both start and end."""
    counted = finished.HasField("session_token_count")
    return Completion(
        text=text,
        finish_reason=_finish_reason(finished.finish_reason),
        prompt_tokens=finished.usage.prompt_tokens,
        cached_tokens=finished.usage.cached_tokens,
        completion_tokens=finished.usage.completion_tokens,
        stop_string=finished.stop_string,
        session_token_count=finished.session_token_count if counted else None,
        queue_time=_seconds(finished.timings.queue_time),
        time_to_first_token=_seconds(finished.timings.time_to_first_token),
        decode_time=_seconds(finished.timings.decode_time),
        total_time=_seconds(finished.timings.total_time),
        request_id=started.request_id,
        model_revision=started.model_revision,
        sampling=started.sampling,
        history=_HISTORY_OUTCOMES.get(started.history),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        choices=tuple(choices),
    )


def completion_of(response: pb.GenerateResponse) -> Completion:
    """Builds the Completion of a Generate call."""
    choices = [choice(each, each.text, each.token_ids, each.logprobs) for each in response.choices]
    return completion(
        response, response, response.text, response.token_ids, response.logprobs, choices
    )
