"""Channels, call metadata and stubs, for both clients."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from mlxd._address import Target
from mlxd._record import StreamingCall
from mlxd.v1.inference_pb2_grpc import InferenceServiceStub
from mlxd.v1.model_pb2_grpc import ModelServiceStub
from mlxd.v1.server_pb2_grpc import ServerServiceStub
from mlxd.v1.session_pb2_grpc import SessionServiceStub

Metadata = tuple[tuple[str, str], ...]
Stream = TypeVar("Stream", bound=StreamingCall)


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


def call_metadata(
    token: str | None, client_name: str | None, metadata: Sequence[tuple[str, str]]
) -> Metadata:
    """Returns the metadata of every call.

    Raises:
        ValueError: a value has characters that a header cannot carry; it is not shown.
    """
    named = [(name, name, value) for name, value in metadata]
    if token:
        named.append(("token", "authorization", f"Bearer {token}"))
    if client_name:
        named.append(("client_name", "x-mlxd-client", client_name))
    for option, name, value in named:
        _check_header(option, name, value)
    return tuple((name, value) for _, name, value in named)


def _check_header(option: str, name: str, value: str) -> None:
    if not name.endswith("-bin") and not (value.isascii() and value.isprintable()):
        raise ValueError(f"{option}: has characters that a header cannot carry")


class Stubs:
    """The stubs of all services on one channel, and the metadata of their calls."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel, metadata: Metadata) -> None:
        self.inference: Any = InferenceServiceStub(channel)
        self.model: Any = ModelServiceStub(channel)
        self.session: Any = SessionServiceStub(channel)
        self.server: Any = ServerServiceStub(channel)
        self.closed = False
        self._metadata = metadata
        self._streams: weakref.WeakSet[StreamingCall] = weakref.WeakSet()

    def hold(self, stream: Stream) -> Stream:
        """Remembers a stream, which ends with the channel, and returns it."""
        self._streams.add(stream)
        return stream

    def end_streams(self) -> None:
        """Closes the streams, which an asyncio channel does not; from then on it is `closed`."""
        self.closed = True
        for stream in list(self._streams):
            stream.close()

    def metadata(self, request_id: str | None) -> Metadata:
        """Returns the metadata of one call.

        Raises:
            ValueError: the request id has characters that a header cannot carry.
        """
        if request_id:
            _check_header("request_id", "x-request-id", request_id)
            return (*self._metadata, ("x-request-id", request_id))
        return self._metadata


class SyncLink:
    """One channel, for all threads."""

    def __init__(self, target: Target, metadata: Metadata) -> None:
        self._channel = sync_channel(target)
        self._stubs = Stubs(self._channel, metadata)

    def stubs(self) -> Stubs:
        """Returns the stubs of the channel."""
        return self._stubs

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


class AioLink:
    """One channel for each event loop: gRPC binds a channel to the loop in which it is made."""

    def __init__(self, target: Target, metadata: Metadata) -> None:
        self._target = target
        self._metadata = metadata
        self._open: dict[asyncio.AbstractEventLoop, tuple[grpc.aio.Channel, Stubs]] = {}

    def stubs(self) -> Stubs:
        """Returns the stubs of the running loop's channel, made when it is first needed.

        Raises:
            RuntimeError: no event loop is running.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            for ended in [other for other in list(self._open) if other.is_closed()]:
                self._open.pop(ended, None)
            channel = aio_channel(self._target)
            self._open[loop] = (channel, Stubs(channel, self._metadata))
        return self._open[loop][1]

    async def close(self) -> None:
        """Closes the running loop's channel; a later call makes another."""
        opened = self._open.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            channel, stubs = opened
            stubs.end_streams()
            await channel.close()

    def drop(self) -> None:
        """Lets go of every loop's channel, in any thread, without a loop; running calls go on."""
        self._open.clear()  # gRPC closes a channel that nothing holds.
