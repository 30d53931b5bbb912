"""Exceptions of failed calls: one hierarchy, one class for each way in which a caller can react.

Every error of the daemon carries `reason`, a name of `mlxd.v1.ErrorReason` without its prefix.
Reasons are part of the API: branch on the class first, on the reason where that is too coarse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "mlxd.v1"


@dataclass(frozen=True)
class FieldViolation:
    """A refused field of the request, and the reason."""

    field: str
    description: str


class MlxdError(Exception):
    """Base class of the exceptions that failed calls raise.

    Attributes:
        message: the daemon's description of the failure.
        code: the canonical gRPC status code.
        reason: name of the daemon's reason, empty if the connection failed. A deadline that
            expired is DEADLINE, whoever noticed.
        metadata: details of the reason, such as `prompt_tokens`.
        retry_after: seconds to wait before trying again; None if the daemon names no time.
        field_violations: the fields that were refused.
        resource: name of the model or session that the call was about.
        request_id: the request's id in the daemon's log.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        field_violations: Sequence[FieldViolation] = (),
        resource: str = "",
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.field_violations = tuple(field_violations)
        self.resource = resource
        self.request_id = request_id

    def number(self, key: str) -> int | None:
        """Returns a count from `metadata`, None if it has no such key."""
        try:
            return int(self.metadata[key])
        except (KeyError, ValueError):
            return None

    def __str__(self) -> str:
        name = self.reason or self.code.name
        suffix = f" (request {self.request_id})" if self.request_id else ""
        return f"{name}: {self.message}{suffix}"


class InvalidRequestError(MlxdError, ValueError):
    """The request is wrong: change it. `field_violations` names the fields."""


class ContextOverflowError(InvalidRequestError):
    """The input leaves no room in the model's context: shorten it."""

    @property
    def prompt_tokens(self) -> int | None:
        """Length of the input, in tokens."""
        return self.number("prompt_tokens")

    @property
    def context_length(self) -> int | None:
        """Longest sequence of the model, in tokens."""
        return self.number("context_length")


class NotFoundError(MlxdError, LookupError):
    """Unknown model or session: name another one, or create it."""


class AlreadyExistsError(MlxdError):
    """A session of this name exists: open it, or choose another name."""


class StateError(MlxdError):
    """The model or session is not in a state for this call: change that first."""


class TooLargeError(StateError):
    """The request or its answer can never fit a limit of the daemon: ask for less."""

    @property
    def needed_bytes(self) -> int | None:
        """Memory needed, in bytes."""
        return self.number("needed_bytes")

    @property
    def available_bytes(self) -> int | None:
        """Memory available with nothing else resident, in bytes."""
        return self.number("available_bytes")


class SessionMovedError(MlxdError):
    """The session's token count is not the expected one: read the session, then decide."""

    @property
    def expected(self) -> int | None:
        """Token count that the caller expected."""
        return self.number("expected")

    @property
    def actual(self) -> int | None:
        """Token count of the session."""
        return self.number("actual")


class CapacityError(MlxdError):
    """A limit is reached: free something, or try again after `retry_after` seconds."""

    @property
    def needed_bytes(self) -> int | None:
        """Memory needed, in bytes."""
        return self.number("needed_bytes")

    @property
    def available_bytes(self) -> int | None:
        """Memory available, in bytes."""
        return self.number("available_bytes")


class UnavailableError(MlxdError):
    """The daemon cannot serve now: try again after `retry_after` seconds."""


class ConnectionFailedError(UnavailableError, ConnectionError):
    """No daemon answers at the address: start it, or name another address."""


class ConnectionLostError(UnavailableError, ConnectionError):
    """The connection broke during the call; the daemon may have ended.

    The daemon may have carried the call out all the same. Repeat it where that does no harm: a turn
    of a session only with `expected_token_count`.
    """


class DeadlineError(MlxdError, TimeoutError):
    """The call's deadline has expired or is too near to start, or its request came too slowly."""


class SlowReaderError(MlxdError):
    """The caller left the stream unread too long, and the daemon ended it."""


class CancelledCallError(MlxdError):
    """The call was cancelled, or its session was deleted."""


class AuthError(MlxdError):
    """The token is missing or wrong, or the daemon's owner does not allow this user or model.

    A `pin` is for the daemon's unix socket only.
    """


class UnsupportedError(MlxdError):
    """The daemon does not have this method: it is older than this client."""


class ServerError(MlxdError):
    """A defect of the daemon: report it with `request_id`."""


_BY_CODE: dict[grpc.StatusCode, type[MlxdError]] = {
    grpc.StatusCode.CANCELLED: CancelledCallError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: AuthError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    grpc.StatusCode.FAILED_PRECONDITION: StateError,
    grpc.StatusCode.ABORTED: SessionMovedError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNAUTHENTICATED: AuthError,
}

# How gRPC begins what it says of a call for which it found no connection.
_UNREACHED = ("failed to connect to all addresses", "DNS resolution failed", "empty address list")

# Reasons that are more specific than their status code.
_BY_REASON: dict[str, type[MlxdError]] = {
    "CONTEXT_OVERFLOW": ContextOverflowError,
    "MODEL_TOO_LARGE": TooLargeError,
    "KV_TOO_LARGE": TooLargeError,
    "ANSWER_TOO_LARGE": TooLargeError,
    "GRAMMAR_TOO_COMPLEX": TooLargeError,
    "SLOW_READER": SlowReaderError,
    "SESSION_DAMAGED": StateError,
}


def error_class(code: grpc.StatusCode, reason: str) -> type[MlxdError]:
    """Returns the class for an error of this code and reason."""
    return _BY_REASON.get(reason) or _BY_CODE.get(code, ServerError)


def _disconnected(details: str, address: str) -> tuple[type[MlxdError], str]:
    """Returns class and message for a call that gRPC ended: it had no connection, or lost it."""
    if details.startswith(_UNREACHED):
        hint = "start one with `mlxd serve`, or name another address"
        return ConnectionFailedError, f"no daemon answers at {address}: {details}; {hint}"
    hint = "if the daemon has ended, `mlxd serve` starts another with the sessions that it kept"
    lost = f"the connection to the daemon at {address} is lost"
    return ConnectionLostError, f"{lost}: {details}; {hint}"


def invalid(field: str, description: str) -> InvalidRequestError:
    """Makes the error for a value that its request field cannot hold; nothing was sent."""
    return InvalidRequestError(
        f"{field}: {description}",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_FIELD",
        field_violations=[FieldViolation(field, description)],
    )


def wrong_model(session: str, bound: str, asked: str) -> StateError:
    """Makes the error for a session that is bound to another model than the caller names."""
    return StateError(
        f"the session {session!r} is bound to the model {bound!r}, not to {asked!r}",
        code=grpc.StatusCode.FAILED_PRECONDITION,
        reason="SESSION_WRONG_MODEL",
        metadata={"session": session, "model": bound},
        resource=session,
    )


def _status_details(trailing: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status:
    status = status_pb2.Status()
    for key, value in trailing:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:  # A proxy damaged it; code and text remain.
                status.Clear()
    return status


def _request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    return next((str(value) for key, value in metadata if key == "x-request-id"), "")


def from_call(error: grpc.RpcError, request_id: str = "", address: str = "") -> MlxdError:
    """Converts the error of a failed call, sync or asyncio.

    `request_id` is the one sent, `address` the daemon's.
    """
    call: Any = error  # Both clients' errors are calls too: code, details, trailing metadata.
    code = call.code() or grpc.StatusCode.UNKNOWN
    trailing = tuple(call.trailing_metadata() or ())
    status = _status_details(trailing)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    resource = error_details_pb2.ResourceInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
            continue
        for message in (info, bad, resource):
            detail.Unpack(message)
    reason = info.reason if info.domain == DOMAIN else ""
    kind = error_class(code, reason)
    message = status.message or call.details() or "no details"
    # The daemon never answers without details: gRPC itself ended these calls.
    if code is grpc.StatusCode.UNAVAILABLE and not status.details:
        kind, message = _disconnected(message, address)
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not status.details:
        reason, message = "DEADLINE", "the call's deadline expired"
    return kind(
        message,
        code=code,
        reason=reason,
        metadata=info.metadata,
        retry_after=retry_after,
        field_violations=[FieldViolation(v.field, v.description) for v in bad.field_violations],
        resource=resource.resource_name,
        request_id=_request_id(trailing) or info.metadata.get("request_id", "") or request_id,
    )
