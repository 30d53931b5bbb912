"""AbstractLLM's parameters as options of a call. Those without an equivalent are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from abstractllm.exceptions import InvalidParameterError, UnsupportedFeatureError

from mlxd._convert import SAMPLING
from mlxd.abstractllm.errors import PROVIDER
from mlxd.types import GenerateOptions

# Parameters that are options of a generation, under the same name.
_OPTIONS = (*SAMPLING, "max_tokens", "stop", "stop_token_ids", "ignore_eos", "template_arguments")
# Parameters with a special meaning here.
_OWN = (
    "model",
    "base_url",
    "api_key",
    "timeout",
    "request_timeout",
    "system_prompt",
    "tools",
    "tool_choice",
    "logit_bias",
    "max_output_tokens",
    "max_input_tokens",
    "request_id",
)
# Parameters without an equivalent in the daemon. False, 0 and empty values are accepted.
_REFUSED = {
    "context_window": "the daemon takes the context window from the model",
    "truncation_strategy": "the daemon refuses an input that is too long and never truncates it",
    "retry_count": "retryable errors carry retry_after",
    "max_retries": "retryable errors carry retry_after",
    "device": "the daemon chooses the device",
    "device_map": "the daemon chooses the device",
    "load_in_8bit": "a model is loaded as its files are quantized",
    "load_in_4bit": "a model is loaded as its files are quantized",
    "cache_dir": "the daemon's configuration names the model roots",
    "organization": "the daemon has no organizations",
    "user": "the daemon knows its caller by socket or token",
    "proxy": "the daemon is local",
    "image": "the daemon serves text models",
    "images": "the daemon serves text models",
    "image_detail": "the daemon serves text models",
    "content_filter": "the daemon does not filter",
    "moderation": "the daemon does not filter",
    "logging_enabled": "the daemon's configuration controls its log",
}


@dataclass(frozen=True)
class Parameters:
    """Parameters of a call, merged with the provider's configuration."""

    model: str
    system_prompt: str | None
    tools: list[Any] | None
    max_input_tokens: int | None
    options: GenerateOptions


def plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the parameters by plain name, without the unset ones, which are None."""
    return {
        str(key.value) if isinstance(key, Enum) else str(key): value
        for key, value in config.items()
        if value is not None
    }


def check(given: Mapping[str, Any]) -> None:
    """Refuses parameters that the daemon cannot honour.

    Raises:
        UnsupportedFeatureError: AbstractLLM knows the parameter, the daemon has no equivalent.
        InvalidParameterError: neither knows the parameter.
    """
    for name, value in given.items():
        if name in _OPTIONS or name in _OWN:
            continue
        if name not in _REFUSED:
            raise InvalidParameterError(
                name, value, message=f"unknown parameter {name!r}", provider=PROVIDER
            )
        if value:
            raise UnsupportedFeatureError(
                name, message=f"{name} is not supported: {_REFUSED[name]}", provider=PROVIDER
            )
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise UnsupportedFeatureError(
            "tool_choice", message="tool_choice is auto or none", provider=PROVIDER
        )


def merge(
    config: Mapping[Any, Any],
    call: Mapping[str, Any],
    system_prompt: str | None,
    tools: list[Any] | None,
) -> Parameters:
    """Merges the provider's configuration with a call's parameters, which win.

    Raises:
        UnsupportedFeatureError, InvalidParameterError: see check.
    """
    given = {**plain(config), **plain(call)}
    check(given)
    model = given.get("model")
    if not model:
        raise InvalidParameterError("model", model, message="name a model", provider=PROVIDER)
    options = {name: given[name] for name in (*_OPTIONS, "request_id") if name in given}
    if "max_output_tokens" in given:
        options.setdefault("max_tokens", given["max_output_tokens"])
    if "logit_bias" in given:
        options["logit_bias"] = _logit_bias(given["logit_bias"])
    timeout = given.get("timeout", given.get("request_timeout"))
    if timeout is not None:
        options["timeout"] = timeout
    offered = tools if tools is not None else given.get("tools")
    return Parameters(
        model=str(model),
        system_prompt=system_prompt if system_prompt is not None else given.get("system_prompt"),
        tools=None if given.get("tool_choice") == "none" else offered or None,
        max_input_tokens=given.get("max_input_tokens"),
        options=cast(GenerateOptions, options),
    )


def _logit_bias(bias: Any) -> dict[int, float]:
    """Converts the token ids, which are strings in JSON and so by OpenAI's convention."""
    try:
        return {int(token): float(value) for token, value in bias.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidParameterError(
            "logit_bias", bias, message="logit_bias maps token ids to numbers", provider=PROVIDER
        ) from error
