"""Streams of events.

Leaving one early, by `close()`, `with` or garbage collection, cancels its call, and the daemon
stops its work.
"""

from __future__ import annotations

import asyncio  # async only
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc
from typing_extensions import Self

from mlxd._cancel import closed, task_is_cancelled  # async only
from mlxd._record import ExportingCall, Record, StreamingCall
from mlxd.errors import from_call
from mlxd.types import Completion, GenerateDelta, GenerateEvent

Event = TypeVar("Event")


class AsyncStream(StreamingCall, Generic[Event]):
    """An asynchronous iterator over the events of one call."""

    def __init__(self, call: Any, request_id: str | None, address: str) -> None:
        super().__init__(call, request_id, address)
        self._events = aiter(call)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._closed:  # async only
            raise closed("stream", self._request_id)
        while True:
            try:
                event = self._event(await anext(self._events))
            except StopAsyncIteration:
                self._ended()
                raise
            except grpc.RpcError as error:
                raise from_call(error, self._request_id, self._address) from error
            except asyncio.CancelledError:  # async only
                if self._closed and not task_is_cancelled():
                    raise closed("stream", self._request_id) from None
                raise
            if event is not None:
                return self._seen(event)

    def _seen(self, event: Event) -> Event:
        return event

    async def aclose(self) -> None:  # async only
        """As close, for `contextlib.aclosing`."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncExportStream(ExportingCall, AsyncStream[bytes]):
    """The bytes of a session's file, in chunks; all of them, or an error."""

    async def read(self) -> bytes:
        """Reads the rest of the file."""
        file = bytearray()
        async for chunk in self:
            file += chunk
        return bytes(file)


class AsyncGenerateStream(AsyncStream[GenerateEvent]):
    """The events of one generation, and what they add up to."""

    def __init__(
        self,
        call: Any,
        request_id: str | None,
        address: str,
        on_end: Callable[[Completion], None] | None,
    ) -> None:
        super().__init__(call, request_id, address)
        self._record = Record(on_end)

    def _seen(self, event: GenerateEvent) -> GenerateEvent:
        self._record.add(event)
        return event

    async def text(self) -> AsyncIterator[str]:
        """Yields the output as it appears; the pieces concatenate to the whole.

        Of several choices it is the first one's; `result` has them all.
        """
        async for event in self:
            if isinstance(event, GenerateDelta) and event.text and event.choice == 0:
                yield event.text

    async def result(self) -> Completion:
        """Reads the rest of the stream and returns the outcome."""
        async for _ in self:
            pass
        return self._record.completion()
