"""AbstractLLM's parameters as options of a call. Those without an equivalent are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from abstractllm.exceptions import InvalidParameterError, UnsupportedFeatureError

from mlxd._convert import NO_SAMPLERS, SAMPLING
from mlxd.abstractllm.budget import Budget
from mlxd.abstractllm.errors import PROVIDER
from mlxd.types import GenerateOptions

# What AbstractLLM's own local providers use where neither the caller nor the configuration says.
DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4096}
# Parameters that are options of a generation, under the same name.
_OPTIONS = (
    *SAMPLING,
    "dry_sequence_breakers",
    "max_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "template_arguments",
    "return_token_ids",
    "priority",
    "cache",
    "cache_salt",
    "request_id",
)
# Parameters with a special meaning here.
_OWN = (
    "model",
    "base_url",
    "api_key",
    "timeout",
    "max_retries",
    "system_prompt",
    "tools",
    "tool_choice",
    "logit_bias",
    "logprobs",
    "max_input_tokens",
)
# Second names of parameters. Of both, the one named here counts.
_ALIASES = {
    "max_output_tokens": "max_tokens",
    "request_timeout": "timeout",
    "retry_count": "max_retries",
}
# Parameters without an equivalent in the daemon. False, 0 and empty values are accepted.
_REFUSED = {
    "n": "AbstractLLM's answer is one; mlxd.Client.generate(n=…) returns several",
    "best_of": "AbstractLLM's answer is one; mlxd.Client.generate(best_of=…) returns the best",
    **NO_SAMPLERS,
    "context_window": "the daemon takes the context window from the model",
    "truncation_strategy": "the daemon refuses an input that is too long and never truncates it",
    "device": "the daemon chooses the device",
    "device_map": "the daemon chooses the device",
    "load_in_8bit": "mlxd.Client.load_model(quantize=…) loads a model so, for all its users",
    "load_in_4bit": "mlxd.Client.load_model(quantize=…) loads a model so, for all its users",
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
    budget: Budget


def plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the parameters by plain name, without the unset ones, which are None."""
    given = {
        str(key.value) if isinstance(key, Enum) else str(key): value
        for key, value in config.items()
        if value is not None
    }
    for alias, name in _ALIASES.items():
        if alias in given:
            given.setdefault(name, given.pop(alias))
    return given


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
        if value and not (name in ("n", "best_of") and value == 1):
            raise UnsupportedFeatureError(
                name, message=f"{name} is not supported: {_REFUSED[name]}", provider=PROVIDER
            )
    choice = given.get("tool_choice", "auto")
    if not isinstance(choice, Mapping) and choice not in ("auto", "none", "required"):
        text = "tool_choice is auto, none, required, or the tool to call"
        raise UnsupportedFeatureError("tool_choice", message=text, provider=PROVIDER)


def merge(
    config: Mapping[Any, Any],
    call: Mapping[str, Any],
    system_prompt: str | None,
    tools: list[Any] | None,
) -> Parameters:
    """Merges the provider's configuration with a call's parameters, which win. The call begins now.

    Raises:
        UnsupportedFeatureError, InvalidParameterError: see check, or a value is refused.
    """
    given = {**plain(config), **plain(call)}
    check(given)
    model = given.get("model")
    if not model:
        raise InvalidParameterError("model", model, message="name a model", provider=PROVIDER)
    options = {name: given[name] for name in _OPTIONS if name in given}
    if "logit_bias" in given:
        options["logit_bias"] = _logit_bias(given["logit_bias"])
    # By OpenAI's convention a bool turns them on, without alternatives.
    if (logprobs := given.get("logprobs", False)) is not False:
        options["logprobs"] = 0 if logprobs is True else logprobs
    if (choice := given.get("tool_choice", "auto")) not in ("auto", "none"):
        options["tool_choice"] = choice
    offered = tools if tools is not None else given.get("tools")
    return Parameters(
        model=str(model),
        system_prompt=system_prompt if system_prompt is not None else given.get("system_prompt"),
        tools=None if given.get("tool_choice") == "none" else offered or None,
        max_input_tokens=given.get("max_input_tokens"),
        options=cast(GenerateOptions, {**DEFAULTS, **options}),
        budget=Budget.of(given),
    )


def _logit_bias(bias: Any) -> dict[int, float]:
    """Converts the token ids, which are strings in JSON and so by OpenAI's convention."""
    try:
        return {int(token): float(value) for token, value in bias.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidParameterError(
            "logit_bias", bias, message="logit_bias maps token ids to numbers", provider=PROVIDER
        ) from error
