"""Conversion of the responses of a generation to Python values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration

from mlxd.errors import ServerError
from mlxd.types import (
    Choice,
    Completion,
    FinishReason,
    HistoryOutcome,
    TokenLogprobs,
    ToolCall,
)
from mlxd.v1 import inference_pb2 as pb

_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop_string",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
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


@dataclass
class Output:
    """What one output says."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @classmethod
    def of(cls, whole: pb.GenerateResponse | pb.GenerateChoice) -> Output:
        """Returns that of a response, or of one of its choices."""
        calls = [ToolCall(call.id, call.name, call.arguments_json) for call in whole.tool_calls]
        ids, logprobs = list(whole.token_ids), list(whole.logprobs)
        return cls(whole.text, whole.reasoning, calls, ids, logprobs)


def choice(end: pb.ChoiceFinished | pb.GenerateChoice, output: Output) -> Choice:
    """Builds one of several outputs; a GenerateChoice is its own end."""
    return Choice(
        text=output.text,
        reasoning=output.reasoning,
        tool_calls=tuple(output.tool_calls),
        finish_reason=_finish_reason(end.finish_reason),
        stop_string=end.stop_string,
        completion_tokens=end.completion_tokens,
        seed=end.seed,
        mean_logprob=end.mean_logprob if end.HasField("mean_logprob") else None,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(output.logprobs),
    )


def completion(
    started: pb.GenerateStarted | pb.GenerateResponse,
    finished: pb.GenerateFinished | pb.GenerateResponse,
    output: Output,
    choices: Sequence[Choice] = (),
) -> Completion:
    """Builds the Completion of a finished generation; a GenerateResponse is both start and end."""
    counted = finished.HasField("session_token_count")
    return Completion(
        text=output.text,
        reasoning=output.reasoning,
        tool_calls=tuple(output.tool_calls),
        finish_reason=_finish_reason(finished.finish_reason),
        prompt_tokens=finished.usage.prompt_tokens,
        cached_tokens=finished.usage.cached_tokens,
        completion_tokens=finished.usage.completion_tokens,
        reasoning_tokens=finished.usage.reasoning_tokens,
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
        token_ids=tuple(output.token_ids),
        logprobs=tuple(output.logprobs),
        choices=tuple(choices),
    )


def completion_of(response: pb.GenerateResponse) -> Completion:
    """Builds the Completion of a Generate call."""
    choices = [choice(each, Output.of(each)) for each in response.choices]
    return completion(response, response, Output.of(response), choices)
