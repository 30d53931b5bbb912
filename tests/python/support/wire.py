"""The daemon's API for tests: raw generated stubs, and parsed errors.

Raw on purpose: a test of bad input must be able to send what the client package refuses, and the
parity tests should not depend on that package's conversions. The generated modules are the ones
committed with clients/python; pytest.ini puts them on the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from mlxd.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

DOMAIN = "mlxd.v1"
DETAILS = "grpc-status-details-bin"
# A deadline far beyond what any call of the tests takes on a busy machine with two cores.
CALL_S = 120.0

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# A channel of its own connection: gRPC Python shares connections between equal channels.
CHANNEL = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Failure:
    """A failed call: its status and details."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    resource: str = ""
    has_retry_info: bool = False
    # RetryInfo's delay; 0 without one.
    retry_s: float = 0.0
    has_quota_failure: bool = False


def failure(error: grpc.RpcError) -> Failure:
    """Parses the status details of a failed call."""
    found = Failure(error.code(), error.details() or "")
    packed = dict(error.trailing_metadata() or ()).get(DETAILS)
    if packed is None:
        return found
    for detail in status_pb2.Status.FromString(packed).details:
        kind = detail.TypeName()
        if kind == "google.rpc.ErrorInfo":
            info = _unpack(detail, error_details_pb2.ErrorInfo)
            found.reason, found.domain = info.reason, info.domain
            found.metadata = dict(info.metadata)
        elif kind == "google.rpc.BadRequest":
            bad = _unpack(detail, error_details_pb2.BadRequest)
            found.fields = [violation.field for violation in bad.field_violations]
        elif kind == "google.rpc.ResourceInfo":
            found.resource = _unpack(detail, error_details_pb2.ResourceInfo).resource_name
        elif kind == "google.rpc.RetryInfo":
            retry = _unpack(detail, error_details_pb2.RetryInfo)
            found.has_retry_info, found.retry_s = True, retry.retry_delay.ToNanoseconds() / 1e9
        found.has_quota_failure |= kind == "google.rpc.QuotaFailure"
    return found


def _unpack(detail: Any, kind: type) -> Any:
    message = kind()
    assert detail.Unpack(message)
    return message


class Refusal:
    """Filled in when the block of `refused` has failed as it should."""

    failure: Failure


@contextmanager
def refused(code: str, reason: str, bad_field: str | None = None) -> Iterator[Refusal]:
    """Passes if the block's call fails with this code, reason and field."""
    refusal = Refusal()
    try:
        yield refusal
    except grpc.RpcError as error:
        refusal.failure = found = failure(error)
        assert (found.code.name, found.reason) == (code, reason), found
        assert found.domain == DOMAIN, found
        assert found.message, "an error says what is wrong"
        if bad_field is not None:
            assert bad_field in found.fields, found
        return
    raise AssertionError(f"the call succeeded; expected {code} / {reason}")


def token_ids(ids: Sequence[int]) -> inference_pb2.TokenIds:
    """Wraps ids into a message."""
    return inference_pb2.TokenIds(ids=ids)


def message(role: str, text: str) -> inference_pb2.Message:
    """Makes a chat message of one text part; `role` is the enum's name without its prefix."""
    return inference_pb2.Message(
        role=inference_pb2.Role.Value(f"ROLE_{role}"),
        content=[inference_pb2.ContentPart(text=text)],
    )


def chat(*texts: str) -> inference_pb2.ChatInput:
    """Makes alternating user and assistant messages, the user's first."""
    roles = ("USER", "ASSISTANT")
    return inference_pb2.ChatInput(
        messages=[message(roles[i % 2], text) for i, text in enumerate(texts)]
    )


def request(
    model: str = "",
    ids: Sequence[int] | None = None,
    *,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    ignore_eos: bool = True,
    stop_strings: Sequence[str] = (),
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> inference_pb2.GenerateRequest:
    """Makes a GenerateRequest; by default greedy, past end-of-text tokens and returning ids."""
    if ids is not None:
        fields["token_ids"] = token_ids(ids)
    return inference_pb2.GenerateRequest(
        model=model,
        sampling=inference_pb2.SamplingOptions(**{"temperature": 0.0, **(sampling or {})}),
        stopping=inference_pb2.StoppingOptions(
            max_tokens=max_tokens, ignore_eos=ignore_eos, stop_strings=stop_strings
        ),
        output=inference_pb2.OutputOptions(logprobs=logprobs, return_token_ids=True),
        **fields,
    )


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
):
    """Sends a token with each call."""

    def __init__(self, token: str) -> None:
        self.metadata = [("authorization", f"Bearer {token}")]

    def intercept_unary_unary(self, call: Any, details: Any, request: Any) -> Any:
        return call(details._replace(metadata=self.metadata), request)

    intercept_unary_stream = intercept_unary_unary
    intercept_stream_unary = intercept_unary_unary


class Wire:
    """One connection to a daemon."""

    def __init__(self, target: str, token: str = "", options: Sequence[Any] = ()) -> None:
        self.target = target
        self.channel = grpc.insecure_channel(target, options=[*UNLIMITED, *CHANNEL, *options])
        if token:
            self.channel = grpc.intercept_channel(self.channel, _Bearer(token))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def generate(self, *args: Any, **fields: Any) -> inference_pb2.GenerateResponse:
        """Generate, with the arguments of `request`."""
        return self.inference.Generate(request(*args, **fields), timeout=CALL_S)

    def stream(self, *args: Any, **fields: Any) -> Any:
        """StreamGenerate, with the arguments of `request`."""
        return self.inference.StreamGenerate(request(*args, **fields), timeout=CALL_S)

    def score(
        self, model: str, ids: Sequence[int], top: int = 20, session: str = ""
    ) -> inference_pb2.ScoreResponse:
        """Score, for token ids."""
        return self.inference.Score(
            inference_pb2.ScoreRequest(
                model=model, token_ids=token_ids(ids), top_logprobs=top, session=session
            ),
            timeout=CALL_S,
        )

    def load(self, model: str, **fields: Any) -> list[model_pb2.LoadModelResponse]:
        """LoadModel; returns all its events."""
        request_ = model_pb2.LoadModelRequest(model=model, **fields)
        return list(self.models.LoadModel(request_, timeout=CALL_S))

    def resident(self) -> list[str]:
        """ListModels; returns the names of the models in memory."""
        request_ = model_pb2.ListModelsRequest(resident_only=True)
        return [model.name for model in self.models.ListModels(request_, timeout=CALL_S).models]

    def unload(self, model: str) -> int:
        """UnloadModel; returns the number of bytes freed."""
        request_ = model_pb2.UnloadModelRequest(model=model)
        return self.models.UnloadModel(request_, timeout=CALL_S).freed_bytes

    def create_session(self, name: str, model: str, **fields: Any) -> session_pb2.Session:
        """CreateSession."""
        request_ = session_pb2.CreateSessionRequest(name=name, model=model, **fields)
        return self.sessions.CreateSession(request_, timeout=CALL_S).session

    def get_session(self, name: str, **fields: Any) -> session_pb2.GetSessionResponse:
        """GetSession."""
        request_ = session_pb2.GetSessionRequest(name=name, **fields)
        return self.sessions.GetSession(request_, timeout=CALL_S)

    def session_ids(self, name: str) -> list[int]:
        """GetSession; returns the session's tokens."""
        return list(self.get_session(name, include_token_ids=True).token_ids)

    def session_names(self) -> list[str]:
        """ListSessions; returns the names on the first page."""
        request_ = session_pb2.ListSessionsRequest()
        listed = self.sessions.ListSessions(request_, timeout=CALL_S).sessions
        return [session.name for session in listed]

    def export_session(self, name: str) -> bytes:
        """ExportSession; returns the file."""
        request_ = session_pb2.ExportSessionRequest(name=name)
        events = list(self.sessions.ExportSession(request_, timeout=CALL_S))
        file = b"".join(event.chunk for event in events[:-1])
        assert events[-1].finished.file_bytes == len(file)
        return file

    def import_session(
        self, file: bytes | Iterable[bytes], piece: int = 1 << 16, **start: Any
    ) -> session_pb2.Session:
        """ImportSession of a file in pieces of a size, or of given ones."""

        def parts() -> Iterator[session_pb2.ImportSessionRequest]:
            yield session_pb2.ImportSessionRequest(start=session_pb2.ImportStart(**start))
            pieces = range(0, len(file), piece) if isinstance(file, bytes) else file
            for at in pieces:
                chunk = file[at : at + piece] if isinstance(file, bytes) else at
                yield session_pb2.ImportSessionRequest(chunk=chunk)

        return self.sessions.ImportSession(parts(), timeout=CALL_S).session

    def save_session(self, name: str, **fields: Any) -> session_pb2.SaveSessionResponse:
        """SaveSession."""
        request_ = session_pb2.SaveSessionRequest(name=name, **fields)
        return self.sessions.SaveSession(request_, timeout=CALL_S)

    def fork_session(self, name: str, new_name: str) -> session_pb2.Session:
        """ForkSession."""
        request_ = session_pb2.ForkSessionRequest(name=name, new_name=new_name)
        return self.sessions.ForkSession(request_, timeout=CALL_S).session

    def truncate_session(self, name: str, token_count: int) -> session_pb2.Session:
        """TruncateSession to `tokens` tokens."""
        request_ = session_pb2.TruncateSessionRequest(name=name, token_count=token_count)
        return self.sessions.TruncateSession(request_, timeout=CALL_S).session

    def delete_session(self, name: str) -> None:
        """DeleteSession."""
        self.sessions.DeleteSession(session_pb2.DeleteSessionRequest(name=name), timeout=CALL_S)

    def capabilities(self) -> server_pb2.ServerCapabilities:
        """Capabilities."""
        request_ = server_pb2.CapabilitiesRequest()
        return self.server.Capabilities(request_, timeout=CALL_S).server

    def stats(self) -> server_pb2.GetStatsResponse:
        """GetStats."""
        return self.server.GetStats(server_pb2.GetStatsRequest(), timeout=CALL_S)

    def at_rest(self) -> bool:
        """Tells whether nothing runs, waits, or is reserved."""
        stats = self.stats()
        held = stats.running_sequences + stats.queued_sequences + stats.memory.kv_reserved_bytes
        return held == 0 and all(slab.slots_in_use == 0 for slab in stats.slabs)
