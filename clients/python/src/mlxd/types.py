"""Types of requests and results. Messages of the API are protobuf classes, re-exported here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from typing_extensions import NotRequired, TypedDict

from mlxd.v1.inference_pb2 import (
    ChoiceFinished,
    CountTokensResponse,
    EffectiveSampling,
    GenerateDelta,
    GenerateFinished,
    GenerateResponse,
    GenerateStarted,
    PrefillProgress,
    ScoreResponse,
    TokenLogprobs,
    ToolCallDelta,
)
from mlxd.v1.inference_pb2 import Message as ProtoMessage
from mlxd.v1.inference_pb2 import ResponseFormat as ProtoResponseFormat
from mlxd.v1.model_pb2 import LoadProgress, LoadValidated, ModelInfo, ModelLoaded
from mlxd.v1.server_pb2 import CapabilitiesResponse, GetStatsResponse, ModelCapabilities
from mlxd.v1.session_pb2 import (
    ExtendSessionResponse,
    GetSessionResponse,
    SaveSessionResponse,
    SessionChange,
    SessionChangeKind,
    WatchReady,
)
from mlxd.v1.session_pb2 import Session as SessionInfo

__all__ = [
    "CallOptions",
    "CapabilitiesResponse",
    "Choice",
    "ChoiceFinished",
    "Completion",
    "ComputeDtype",
    "CountTokensResponse",
    "EffectiveSampling",
    "ExtendSessionResponse",
    "FinishReason",
    "GenerateDelta",
    "GenerateEvent",
    "GenerateFinished",
    "GenerateOptions",
    "GenerateResponse",
    "GenerateStarted",
    "GetSessionResponse",
    "GetStatsResponse",
    "HasSchema",
    "History",
    "HistoryOutcome",
    "KvDtype",
    "LoadEvent",
    "LoadProgress",
    "LoadValidated",
    "Message",
    "Messages",
    "ModelCapabilities",
    "ModelInfo",
    "ModelLoaded",
    "PrefillProgress",
    "Priority",
    "ProtoMessage",
    "ProtoResponseFormat",
    "Quantize",
    "ResponseFormat",
    "SaveSessionResponse",
    "ScoreResponse",
    "SessionChange",
    "SessionChangeKind",
    "SessionInfo",
    "TokenLogprobs",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolFormat",
    "WatchEvent",
    "WatchReady",
]

FinishReason: TypeAlias = Literal["stop", "stop_string", "length", "tool_calls"]
# A mapping names the tool to call: `{"name": …}`, or as OpenAI writes it.
ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Mapping[str, Any]
ToolFormat: TypeAlias = Literal["prompted"]
ComputeDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
KvDtype: TypeAlias = Literal["compute", "int8"]
Priority: TypeAlias = Literal["interactive", "normal", "background"]
History: TypeAlias = Literal["auto", "append", "rerender"]
HistoryOutcome: TypeAlias = Literal["continued", "appended", "rerendered"]
GenerateEvent: TypeAlias = (
    GenerateStarted | PrefillProgress | GenerateDelta | ChoiceFinished | GenerateFinished
)
LoadEvent: TypeAlias = LoadProgress | ModelLoaded | LoadValidated
WatchEvent: TypeAlias = SessionChange | WatchReady


class Quantize(TypedDict, total=False):
    """How a load quantizes matrices; what is left out is the daemon's default."""

    bits: int
    group_size: int
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
    recipe: Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the model calls. `arguments_json` is a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        arguments: dict[str, Any] = json.loads(self.arguments_json or "{}")
        return arguments


class Message(TypedDict):
    """A chat message. `content` is text, or a list of text parts `{"type": "text", "text": …}`.

    Of the assistant's, `reasoning` is what it reasoned before, and `tool_calls` are `ToolCall`s, or
    mappings as OpenAI writes them. A tool's result has `tool_call_id`.
    """

    role: str
    content: NotRequired[str | Sequence[str | Mapping[str, Any]] | None]
    name: NotRequired[str | None]
    tool_calls: NotRequired[Sequence[ToolCall | Mapping[str, Any]] | None]
    tool_call_id: NotRequired[str | None]
    reasoning: NotRequired[str | None]


Messages: TypeAlias = str | Sequence[Message | Mapping[str, Any] | ProtoMessage]
"""A conversation; a plain string is one user message."""


@runtime_checkable
class HasSchema(Protocol):
    """A class that has a JSON schema, such as pydantic's models."""

    def model_json_schema(self) -> dict[str, Any]:
        """Returns the schema."""


ResponseFormat: TypeAlias = (
    Literal["json_object"] | Mapping[str, Any] | HasSchema | type[Any] | ProtoResponseFormat
)
"""The form of an answer."""


class CallOptions(TypedDict, total=False):
    """Options of every call.

    `timeout` is in seconds and becomes the call's gRPC deadline; `request_id` identifies the
    request in the daemon's log.
    """

    timeout: float | None
    request_id: str | None


class GenerateOptions(CallOptions, total=False):
    """Options of a generation, as mlxd/v1/inference.proto documents them. None is unset.

    `keep_alive` is in seconds; negative is forever. `cache=False` reuses no cached KV and leaves
    none; only requests with the same `cache_salt` reuse each other's.
    `tool_format="prompted"` describes tools in a text of the daemon's, for models that know none.
    `reasoning` turns reasoning on or off, and `reasoning_effort` says how much, for models whose
    chat template lets one; `reasoning_budget` is the most tokens of it. `response_format` is a JSON
    schema, a class with `model_json_schema()` such as pydantic's, "json_object", or a dict
    `{"type": kind, kind: value}` of the kinds "json_schema", "regex", "grammar" and "choice".
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    repetition_context_size: int | None
    presence_penalty: float | None
    presence_context_size: int | None
    frequency_penalty: float | None
    frequency_context_size: int | None
    xtc_probability: float | None
    xtc_threshold: float | None
    typical_p: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_context_size: int | None
    dry_sequence_breakers: Sequence[str] | None
    logit_bias: Mapping[int, float] | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    return_token_ids: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    template_arguments: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    allow_control_tokens: bool | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None
    tool_format: ToolFormat | None
    reasoning: bool | None
    reasoning_budget: int | None
    reasoning_effort: str | None
    expected_token_count: int | None
    priority: Priority | None
    keep_alive: float | None
    history: History | None
    cache: bool | None
    cache_salt: str | None
    response_format: ResponseFormat | None
    n: int | None
    best_of: int | None


@dataclass(frozen=True)
class Choice:
    """One of several outputs of a generation.

    `seed` is the one with which it comes alone; `mean_logprob` is known with `logprobs` or
    `best_of`.
    """

    text: str
    finish_reason: FinishReason
    stop_string: str
    completion_tokens: int
    seed: int
    mean_logprob: float | None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The outcome of a generation, streamed or not.

    With `n` or `best_of`, `choices` are all outputs; the other fields are those of the first one.

    Times are in seconds: `queue_time`, `time_to_first_token` and `total_time` since the request's
    arrival at the daemon, `decode_time` from the first generated token to the last. `token_ids` and
    `logprobs` are empty unless they were asked for. `history` is what a turn did with the tokens of
    its session; None if there were none. `text` is without `reasoning` and `tool_calls`.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    stop_string: str
    session_token_count: int | None
    queue_time: float
    time_to_first_token: float
    decode_time: float
    total_time: float
    request_id: str
    model_revision: str
    sampling: EffectiveSampling
    history: HistoryOutcome | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    choices: tuple[Choice, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = 0

    @property
    def message(self) -> Message:
        """The answer as a message, for the next request of a conversation without a session."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed in tokens per second, None for fewer than two tokens."""
        if self.completion_tokens < 2 or self.decode_time <= 0:
            return None
        return (self.completion_tokens - 1) / self.decode_time
