"""Conversion of the daemon's errors to AbstractLLM's exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from abstractllm import exceptions as host

import mlxd

PROVIDER = "mlxd"

_BY_REASON = {
    "MODEL_NOT_LOADED": host.ModelLoadingError,
    "MODEL_INVALID": host.ModelLoadingError,
    "MODEL_UNLOADED": host.ModelLoadingError,
    "MODEL_NOT_ALLOWED": host.ModelLoadingError,
    "DOWNLOAD_FAILED": host.ModelLoadingError,
    "HUB_DENIED": host.ModelLoadingError,
    "MODEL_UNSUPPORTED": host.UnsupportedModelError,
    "NON_FINITE_LOGITS": host.GenerationError,
    "ANSWER_TOO_LARGE": host.ResourceExceededError,
}
# Session retries by words of the text, so the text of what passes by itself has the right one.
_WORDS = {
    host.QuotaExceededError: "rate limit",
    host.RequestTimeoutError: "timed out",
    host.ProviderConnectionError: "connection",
}
# The first match wins, so a class precedes its base.
_BY_CLASS = (
    (mlxd.InvalidRequestError, host.InvalidRequestError),
    (mlxd.NotFoundError, host.InvalidRequestError),
    (mlxd.AlreadyExistsError, host.InvalidRequestError),
    (mlxd.StateError, host.InvalidRequestError),
    (mlxd.SessionMovedError, host.InvalidRequestError),
    (mlxd.SlowReaderError, host.GenerationError),
    (mlxd.CapacityError, host.QuotaExceededError),
    (mlxd.UnavailableError, host.ProviderConnectionError),
    (mlxd.DeadlineError, host.RequestTimeoutError),
    (mlxd.CancelledCallError, host.GenerationError),
    (mlxd.AuthError, host.AuthenticationError),
    (mlxd.MlxdError, host.ProviderAPIError),
)


@contextmanager
def mapped(model: str) -> Iterator[None]:
    """Converts an MlxdError that the block raises to AbstractLLM's exception."""
    try:
        yield
    except mlxd.MlxdError as error:
        raise map_error(error, model) from error


def map_error(error: mlxd.MlxdError, model: str) -> Exception:
    """Returns AbstractLLM's exception for `error`."""
    details: dict[str, Any] = {**error.metadata, "reason": error.reason, "code": error.code.name}
    if error.retry_after is not None:
        details["retry_after"] = error.retry_after
    if error.request_id:
        details["request_id"] = error.request_id
    common = {"provider": PROVIDER, "original_exception": error, "details": details}
    special = _special(error, model, common)
    if special is not None:
        return special
    kind = _BY_REASON.get(error.reason)
    if kind is None:
        kind = next(host_class for ours, host_class in _BY_CLASS if isinstance(error, ours))
    if isinstance(error, mlxd.CapacityError) and error.retry_after is None:
        kind = host.ResourceExceededError
    word = _WORDS.get(kind)
    mapped_error: Exception = kind(f"{word}: {error.message}" if word else error.message, **common)
    return mapped_error


def _special(error: mlxd.MlxdError, model: str, common: dict[str, Any]) -> Exception | None:
    """Returns an exception whose constructor takes more than a message, if one applies."""
    text = error.message
    if error.reason == "MODEL_NOT_FOUND":
        return host.ModelNotFoundError(error.resource or model, reason=text, **common)
    if error.reason == "NO_CHAT_TEMPLATE":
        return host.UnsupportedFeatureError("chat", message=text, **common)
    if isinstance(error, mlxd.UnsupportedError):
        return host.UnsupportedOperationError("request", reason=text, **common)
    if isinstance(error, mlxd.ContextOverflowError):
        window, length = error.context_length or 0, error.prompt_tokens or 0
        return host.ContextWindowExceededError(window, length, message=text, **common)
    if error.reason in ("MEMORY_BUDGET", "MODEL_TOO_LARGE", "KV_TOO_LARGE"):
        return host.MemoryExceededError(
            text,
            required_memory=error.number("needed_bytes"),
            available_memory=error.number("available_bytes"),
            **common,
        )
    if isinstance(error, mlxd.InvalidRequestError) and error.field_violations:
        field = error.field_violations[0].field
        if field.startswith(("sampling.", "stopping.")):
            parameter = field.split(".", 1)[1]
            return host.InvalidParameterError(parameter, None, message=text, **common)
    return None
