"""How both clients reach the daemon: channel options, call metadata, and the services' stubs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from mlxd._address import Target
from mlxd.v1.inference_pb2_grpc import InferenceServiceStub
from mlxd.v1.model_pb2_grpc import ModelServiceStub
from mlxd.v1.server_pb2_grpc import ServerServiceStub
from mlxd.v1.session_pb2_grpc import SessionServiceStub

Metadata = tuple[tuple[str, str], ...]


def options(target: Target) -> list[tuple[str, Any]]:
    """Channel options of a target."""
    result: list[tuple[str, Any]] = [
        # The daemon limits what it accepts; scores and logprobs of long inputs are large.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # Nothing that this client talks to is behind the environment's http proxy.
        ("grpc.enable_http_proxy", 0),
        # A daemon that was restarted is found again within this time.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if target.unix:
        # gRPC would send the socket's path, which is no valid HTTP/2 authority.
        result.append(("grpc.default_authority", "localhost"))
    return result


def sync_channel(target: Target) -> grpc.Channel:
    """A channel; it connects at the first call."""
    if target.tls:
        credentials = grpc.ssl_channel_credentials()
        return grpc.secure_channel(target.target, credentials, options(target))
    return grpc.insecure_channel(target.target, options(target))


def aio_channel(target: Target) -> grpc.aio.Channel:
    """An asyncio channel; it connects at the first call."""
    if target.tls:
        credentials = grpc.ssl_channel_credentials()
        return grpc.aio.secure_channel(target.target, credentials, options(target))
    return grpc.aio.insecure_channel(target.target, options(target))


class Stubs:
    """The services' stubs on one channel, and the metadata that each call carries."""

    def __init__(
        self,
        channel: grpc.Channel | grpc.aio.Channel,
        token: str | None,
        client_name: str | None,
        metadata: Sequence[tuple[str, str]],
    ) -> None:
        self.inference: Any = InferenceServiceStub(channel)
        self.model: Any = ModelServiceStub(channel)
        self.session: Any = SessionServiceStub(channel)
        self.server: Any = ServerServiceStub(channel)
        base = [*metadata]
        if token:
            base.append(("authorization", f"Bearer {token}"))
        if client_name:
            base.append(("x-mlxd-client", client_name))
        self._metadata: Metadata = tuple(base)

    def metadata(self, request_id: str | None) -> Metadata:
        """The metadata of one call."""
        if request_id:
            return (*self._metadata, ("x-request-id", request_id))
        return self._metadata
