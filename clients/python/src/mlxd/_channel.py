"""Channels, call metadata and stubs, for both clients."""

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


def options() -> list[tuple[str, Any]]:
    """Returns the channel options."""
    return [
        # The daemon limits what it accepts; scores and logprobs of long inputs are large.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # A daemon is never behind the environment's HTTP proxy.
        ("grpc.enable_http_proxy", 0),
        # A restarted daemon is found again within this time.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def sync_channel(target: Target) -> grpc.Channel:
    """Makes a channel; it connects at the first call."""
    if target.tls:
        credentials = grpc.ssl_channel_credentials()
        return grpc.secure_channel(target.target, credentials, options())
    return grpc.insecure_channel(target.target, options())


def aio_channel(target: Target) -> grpc.aio.Channel:
    """Makes an asyncio channel; it connects at the first call."""
    if target.tls:
        credentials = grpc.ssl_channel_credentials()
        return grpc.aio.secure_channel(target.target, credentials, options())
    return grpc.aio.insecure_channel(target.target, options())


class Stubs:
    """The stubs of all services on one channel, and the metadata of their calls."""

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
        """Returns the metadata of one call."""
        if request_id:
            return (*self._metadata, ("x-request-id", request_id))
        return self._metadata
