"""Streams of events.

Leaving one early, by close, `with` or garbage collection, cancels its call, and the daemon stops
its work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc
from typing_extensions import Self

from mlxd._convert import completion
from mlxd.errors import ServerError, from_call
from mlxd.types import Completion, GenerateEvent, TokenLogprobs
from mlxd.v1.inference_pb2 import GenerateDelta, GenerateFinished, GenerateStarted

Event = TypeVar("Event")


def event_of(response: Any) -> Any:
    """The event inside a streamed response, None for a kind that this client does not know."""
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None


class _Record:
    """What a generation's events add up to."""

    def __init__(self) -> None:
        self.started: GenerateStarted | None = None
        self.finished: GenerateFinished | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, event: GenerateEvent) -> None:
        if isinstance(event, GenerateDelta):
            self._text.append(event.text)
            self._token_ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
        elif isinstance(event, GenerateStarted):
            self.started = event
        elif isinstance(event, GenerateFinished):
            self.finished = event

    def completion(self) -> Completion:
        if self.started is None or self.finished is None:
            raise ServerError("the stream ended without `started` or `finished`")
        text = "".join(self._text)
        return completion(self.started, self.finished, text, self._token_ids, self._logprobs)


class Stream(Generic[Event]):
    """An iterator over the events of one call."""

    _call: Any = None  # For __del__, should __init__ fail.

    def __init__(self, call: Any, request_id: str | None) -> None:
        self._call = call
        self._request_id = request_id or ""

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while True:
            try:
                event = event_of(next(self._call))
            except grpc.RpcError as error:
                raise from_call(error, self._request_id) from error
            if event is not None:
                return self._seen(event)

    def _seen(self, event: Event) -> Event:
        return event

    def close(self) -> None:
        """Cancels the call unless it has ended. Iterating on raises CancelledCallError."""
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class GenerateStream(Stream[GenerateEvent]):
    """The events of one generation, and what they add up to."""

    def __init__(
        self, call: Any, request_id: str | None, on_end: Callable[[Completion], None] | None = None
    ) -> None:
        super().__init__(call, request_id)
        self._record = _Record()
        self._on_end = on_end

    def _seen(self, event: GenerateEvent) -> GenerateEvent:
        self._record.add(event)
        if isinstance(event, GenerateFinished) and self._on_end:
            self._on_end(self._record.completion())
        return event

    def text(self) -> Iterator[str]:
        """The output as it appears; the pieces concatenate to the whole."""
        for event in self:
            if isinstance(event, GenerateDelta) and event.text:
                yield event.text

    def result(self) -> Completion:
        """Reads what is left of the stream and returns the outcome."""
        for _ in self:
            pass
        return self._record.completion()


class AsyncStream(Generic[Event]):
    """An asynchronous iterator over the events of one call."""

    _call: Any = None

    def __init__(self, call: Any, request_id: str | None) -> None:
        self._call = call
        self._request_id = request_id or ""
        self._events = aiter(call)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            try:
                event = event_of(await anext(self._events))
            except grpc.RpcError as error:
                raise from_call(error, self._request_id) from error
            if event is not None:
                return self._seen(event)

    def _seen(self, event: Event) -> Event:
        return event

    def close(self) -> None:
        """Cancels the call unless it has ended. Needs no await: nothing is waited for."""
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
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

    def __del__(self) -> None:
        try:
            self.close()
        except RuntimeError:  # The event loop is closed, and the channel with it.
            return


class AsyncGenerateStream(AsyncStream[GenerateEvent]):
    """The events of one generation, and what they add up to."""

    def __init__(
        self, call: Any, request_id: str | None, on_end: Callable[[Completion], None] | None = None
    ) -> None:
        super().__init__(call, request_id)
        self._record = _Record()
        self._on_end = on_end

    def _seen(self, event: GenerateEvent) -> GenerateEvent:
        self._record.add(event)
        if isinstance(event, GenerateFinished) and self._on_end:
            self._on_end(self._record.completion())
        return event

    async def text(self) -> AsyncIterator[str]:
        """The output as it appears; the pieces concatenate to the whole."""
        async for event in self:
            if isinstance(event, GenerateDelta) and event.text:
                yield event.text

    async def result(self) -> Completion:
        """Reads what is left of the stream and returns the outcome."""
        async for _ in self:
            pass
        return self._record.completion()
