"""Conversion of Python values to requests.

A value that its field cannot hold raises InvalidRequestError, as if the daemon had refused it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mlxd._chat import chat_input
from mlxd._fields import BAD_VALUE, enum_value, extend, put, update
from mlxd._format import set_format
from mlxd.errors import invalid
from mlxd.types import CallOptions, GenerateOptions, Messages, Quantize
from mlxd.v1 import inference_pb2 as pb
from mlxd.v1 import model_pb2, session_pb2

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "xtc_probability",
    "xtc_threshold",
    "typical_p",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_context_size",
)
# Samplers of others that the daemon does not have, and why.
NO_SAMPLERS = dict.fromkeys(
    ("mirostat", "mirostat_mode", "mirostat_tau", "mirostat_eta"),
    "the daemon has no mirostat; typical_p or min_p also bound how unlikely a token may be",
)
CHAT = (
    "tools",
    "template_arguments",
    "add_generation_prompt",
    "continue_final_message",
    "allow_control_tokens",
    "tool_choice",
    "parallel_tool_calls",
    "tool_format",
)
# Options about reasoning, and their fields.
REASONING = {
    "reasoning": "enabled",
    "reasoning_budget": "budget_tokens",
    "reasoning_effort": "effort",
}
OPTIONS = frozenset(GenerateOptions.__annotations__)
CALL_OPTIONS = frozenset(CallOptions.__annotations__)


def check_names(options: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuses options that a call does not know, which would have no effect.

    Raises:
        TypeError: an unknown option.
    """
    unknown = options.keys() - known
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")


def call_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those options of a generation that every call has; the others are in its request."""
    return {name: value for name, value in options.items() if name in CALL_OPTIONS}


def generate_request(
    *,
    model: str,
    session: str,
    prompt: str | None,
    messages: Messages | None,
    token_ids: Sequence[int] | None,
    options: Mapping[str, Any],
) -> pb.GenerateRequest:
    """Builds the request of both Generate RPCs.

    Raises:
        TypeError: an unknown option, or not exactly one input.
        InvalidRequestError: a value that its field cannot hold.
    """
    for name in NO_SAMPLERS.keys() & options.keys():
        if options[name] is not None:
            raise invalid(f"sampling.{name}", NO_SAMPLERS[name])
    check_names(options, OPTIONS.union(NO_SAMPLERS))
    _exactly_one(prompt=prompt, messages=messages, token_ids=token_ids)
    given = {k: v for k, v in options.items() if v is not None and k not in CALL_OPTIONS}
    request = pb.GenerateRequest()
    put(request, "model", model)
    put(request, "session", session)
    if prompt is not None:
        put(request, "prompt", prompt)
    _set_token_ids(request, token_ids)
    if messages is not None:
        request.chat.CopyFrom(chat_input(messages, **{k: given.get(k) for k in CHAT}))
    elif any(name in given for name in CHAT):
        raise TypeError(f"{', '.join(CHAT)} belong to messages")
    for name in SAMPLING:
        if name in given:
            put(request.sampling, name, given[name], f"sampling.{name}")
    _set_reasoning(request, given)
    _fill_rest(request, given)
    return request


def _set_reasoning(
    request: pb.GenerateRequest | pb.CountTokensRequest, given: Mapping[str, Any]
) -> None:
    for name, field in REASONING.items():
        if given.get(name) is not None:
            put(request.reasoning, field, given[name], f"reasoning.{field}")


def _fill_rest(request: pb.GenerateRequest, given: Mapping[str, Any]) -> None:
    for token, bias in given.get("logit_bias", {}).items():
        try:
            request.sampling.logit_bias[token] = bias
        except BAD_VALUE as error:
            raise invalid("sampling.logit_bias", str(error)) from error
    if "dry_sequence_breakers" in given:
        request.sampling.dry_sequence_breakers.SetInParent()
        path = "sampling.dry_sequence_breakers"
        extend(request.sampling.dry_sequence_breakers.texts, given["dry_sequence_breakers"], path)
    if "max_tokens" in given:
        put(request.stopping, "max_tokens", given["max_tokens"], "stopping.max_tokens")
    stop = given.get("stop", ())
    stops = [stop] if isinstance(stop, str) else stop
    extend(request.stopping.stop_strings, stops, "stopping.stop_strings")
    stop_ids = given.get("stop_token_ids", ())
    extend(request.stopping.stop_token_ids, stop_ids, "stopping.stop_token_ids")
    if given.get("ignore_eos"):
        request.stopping.ignore_eos = True
    if "logprobs" in given:
        put(request.output, "logprobs", given["logprobs"], "output.logprobs")
    if given.get("return_token_ids"):
        request.output.return_token_ids = True
    if "priority" in given:
        request.priority = enum_value(pb.Priority, "priority", given["priority"])
    _set_keep_alive(request, given.get("keep_alive"))
    _set_cache(request, given.get("cache"), given.get("cache_salt"))
    set_format(request, given.get("response_format"))
    if "history" in given:
        request.history = history(given["history"])
    for name in ("n", "best_of", "expected_token_count"):
        if name in given:
            put(request, name, given[name])


def _set_cache(
    request: pb.GenerateRequest | pb.ScoreRequest, cache: bool | None, salt: str | None
) -> None:
    if cache is not None:
        put(request.cache, "off", not cache, "cache")
    if salt is not None:
        put(request.cache, "salt", salt, "cache.salt")


def _set_token_ids(request: Any, token_ids: Sequence[int] | None) -> None:
    if token_ids is not None:
        request.token_ids.SetInParent()
        extend(request.token_ids.ids, token_ids, "token_ids")


def _set_keep_alive(request: Any, seconds: float | None) -> None:
    keep_alive = duration(seconds, "keep_alive")
    if keep_alive is not None:
        request.keep_alive.CopyFrom(keep_alive)


Request = TypeVar("Request")


def request(kind: type[Request], **fields: Any) -> Request:
    """Builds a plain request; None leaves a field unset."""
    result = kind()
    for field, value in fields.items():
        if isinstance(value, (Duration, Timestamp, model_pb2.QuantizeOptions)):
            getattr(result, field).CopyFrom(value)
        elif isinstance(value, Mapping):
            update(getattr(result, field), value, field)
        elif isinstance(value, (list, tuple)):
            extend(getattr(result, field), value, field)
        elif value is not None:
            put(result, field, value)
    return result


def count_request(
    *,
    model: str,
    prompt: str | None,
    messages: Messages | None,
    chat: Mapping[str, Any],
    reasoning: bool | None,
    reasoning_effort: str | None,
    return_token_ids: bool,
) -> pb.CountTokensRequest:
    """Builds a CountTokensRequest; `chat` is what comes with messages."""
    _exactly_one(prompt=prompt, messages=messages)
    request = pb.CountTokensRequest(return_token_ids=return_token_ids)
    put(request, "model", model)
    if prompt is not None:
        put(request, "prompt", prompt)
    if messages is not None:
        request.chat.CopyFrom(chat_input(messages, **chat))
    _set_reasoning(request, {"reasoning": reasoning, "reasoning_effort": reasoning_effort})
    return request


def extend_request(
    *,
    name: str,
    prompt: str | None,
    messages: Messages | None,
    token_ids: Sequence[int] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    template_arguments: Mapping[str, Any] | None,
    tool_format: str | None,
    expected_token_count: int | None,
    priority: str | None,
    keep_alive: float | None,
) -> session_pb2.ExtendSessionRequest:
    """Builds an ExtendSessionRequest."""
    _exactly_one(prompt=prompt, messages=messages, token_ids=token_ids)
    result = request(
        session_pb2.ExtendSessionRequest,
        name=name,
        prompt=prompt,
        expected_token_count=expected_token_count,
        priority=enum_value(pb.Priority, "priority", priority),
    )
    _set_keep_alive(result, keep_alive)
    _set_token_ids(result, token_ids)
    if messages is not None:
        chat = chat_input(messages, tools, template_arguments, tool_format=tool_format)
        result.chat.CopyFrom(chat)
    elif any(value is not None for value in (tools, template_arguments, tool_format)):
        raise TypeError("tools, template_arguments and tool_format belong to messages")
    return result


def score_request(
    *,
    model: str,
    text: str | None,
    token_ids: Sequence[int] | None,
    messages: Messages | None,
    chat: Mapping[str, Any],
    top_logprobs: int,
    session: str,
    priority: str | None,
    cache: bool | None,
    cache_salt: str | None,
    keep_alive: float | None,
) -> pb.ScoreRequest:
    """Builds a ScoreRequest; `chat` is what comes with messages."""
    _exactly_one(text=text, token_ids=token_ids, messages=messages)
    request = pb.ScoreRequest()
    put(request, "model", model)
    put(request, "session", session)
    put(request, "top_logprobs", top_logprobs)
    request.priority = enum_value(pb.Priority, "priority", priority)
    _set_cache(request, cache, cache_salt)
    if text is not None:
        put(request, "text", text)
    _set_token_ids(request, token_ids)
    if messages is not None:
        request.chat.CopyFrom(chat_input(messages, **chat))
    elif any(value is not None for value in chat.values()):
        raise TypeError(f"{', '.join(CHAT)} belong to messages")
    _set_keep_alive(request, keep_alive)
    return request


def _exactly_one(**inputs: object) -> None:
    if sum(value is not None for value in inputs.values()) != 1:
        raise TypeError(f"give exactly one of {', '.join(inputs)}")


def timestamp(time: datetime | None, field: str) -> Timestamp | None:
    """Converts a time to a Timestamp, None to None.

    Raises:
        InvalidRequestError: it has no time zone, which would be guessed.
    """
    if time is None:
        return None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise invalid(field, "expected a datetime with a time zone")
    result = Timestamp()
    result.FromDatetime(time)
    return result


def duration(seconds: float | None, field: str) -> Duration | None:
    """Converts seconds to a Duration, None to None."""
    if seconds is None:
        return None
    result = Duration()
    try:
        result.FromNanoseconds(round(seconds * 1e9))
    except BAD_VALUE as error:
        raise invalid(field, str(error)) from error
    return result


def compute_dtype(name: str | None) -> model_pb2.ComputeDtype:
    """Returns the enum value of a dtype's name; None is the daemon's policy."""
    return cast(model_pb2.ComputeDtype, enum_value(model_pb2.ComputeDtype, "compute_dtype", name))


def kv_dtype(name: str | None) -> model_pb2.KvDtype:
    """Returns the enum value of a KV cache's dtype; None is the daemon's setting."""
    return cast(model_pb2.KvDtype, enum_value(model_pb2.KvDtype, "kv_dtype", name))


def quantize(options: Quantize | None) -> model_pb2.QuantizeOptions | None:
    """Builds the options of a quantization; None is none."""
    if options is None:
        return None
    known = {"bits", "group_size", "mode", "recipe"}
    if unknown := set(options) - known:
        raise invalid("quantize", f"unknown keys {sorted(unknown)}")
    return request(
        model_pb2.QuantizeOptions,
        bits=options.get("bits"),
        group_size=options.get("group_size"),
        mode=enum_value(model_pb2.QuantMode, "quant_mode", options.get("mode")),
        recipe=enum_value(model_pb2.QuantRecipe, "quant_recipe", options.get("recipe")),
    )


def history(name: str | None) -> pb.History:
    """Returns the enum value of a history's name; None is unspecified."""
    return cast(pb.History, enum_value(pb.History, "history", name))
