# Generated from aio/_stream.py by scripts/generate_sync.py; do not edit.
"""Streams of events.

Leaving one early, by `close()`, `with` or garbage collection, cancels its call, and the daemon
stops its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc
from typing_extensions import Self

from mlxd._record import ExportingCall, Record, StreamingCall
from mlxd.errors import from_call
from mlxd.types import Completion, GenerateDelta, GenerateEvent

Event = TypeVar("Event")


class Stream(StreamingCall, Generic[Event]):
    """An iterator over the events of one call."""

    def __init__(self, call: Any, request_id: str | None, address: str) -> None:
        super().__init__(call, request_id, address)
        self._events = iter(call)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while True:
            try:
                event = self._event(next(self._events))
            except StopIteration:
                self._ended()
                raise
            except grpc.RpcError as error:
                raise from_call(error, self._request_id, self._address) from error
            if event is not None:
                return self._seen(event)

    def _seen(self, event: Event) -> Event:
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ExportStream(ExportingCall, Stream[bytes]):
    """The bytes of a session's file, in chunks; all of them, or an error."""

    def read(self) -> bytes:
        """Reads the rest of the file."""
        file = bytearray()
        for chunk in self:
            file += chunk
        return bytes(file)


class GenerateStream(Stream[GenerateEvent]):
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

    def text(self) -> Iterator[str]:
        """Yields the output as it appears; the pieces concatenate to the whole.

        Of several choices it is the first one's; `result` has them all.
        """
        for event in self:
            if isinstance(event, GenerateDelta) and event.text and event.choice == 0:
                yield event.text

    def result(self) -> Completion:
        """Reads the rest of the stream and returns the outcome."""
        for _ in self:
            pass
        return self._record.completion()
