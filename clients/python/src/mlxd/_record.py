"""One streaming call, and what the events of a generation add up to; both clients build on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mlxd._outcome import Output, choice, completion
from mlxd.errors import ServerError
from mlxd.types import Completion, GenerateEvent, ToolCall, ToolCallDelta
from mlxd.v1.inference_pb2 import (
    ChoiceFinished,
    GenerateDelta,
    GenerateFinished,
    GenerateStarted,
)


def event_of(response: Any) -> Any:
    """Returns the event inside a streamed response, None for a kind unknown to this client."""
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None


class StreamingCall:
    """A call that is cancelled when it is closed or garbage-collected."""

    _call: Any = None  # For __del__, should __init__ fail.
    _closed = False  # Whether `close` cancelled the call.

    def __init__(self, call: Any, request_id: str | None, address: str) -> None:
        self._call = call
        self._request_id = request_id or ""
        self._address = address

    def _event(self, response: Any) -> Any:
        """Returns the event of a response; None is passed over."""
        return event_of(response)

    def _ended(self) -> None:
        """Checks a stream that has come to its end."""

    def close(self) -> None:
        """Cancels the call unless it has ended, without waiting for the daemon.

        Iterating after that raises CancelledCallError.
        """
        if self._call is not None and self._call.cancel():
            self._closed = True

    def __del__(self) -> None:
        try:
            self.close()
        except RuntimeError:  # The event loop is closed, and the channel with it.
            return


class ExportingCall(StreamingCall):
    """A call whose events are the bytes of a file, and at last that it is whole."""

    _is_whole = False

    def _event(self, response: Any) -> Any:
        if response.WhichOneof("event") == "finished":
            self._is_whole = True
            return None
        return event_of(response)

    def _ended(self) -> None:
        if not self._is_whole:
            raise ServerError("the export ended without `finished`")


class CallParts:
    """The parts of a tool call that came so far."""

    def __init__(self) -> None:
        self._parts: list[ToolCallDelta] = []

    def add(self, event: GenerateDelta) -> list[ToolCall]:
        """Adds an event's parts, and returns the calls that are whole with them."""
        whole = []
        for part in event.tool_calls:
            if part.name:
                # What began before and did not end is none.
                self._parts = []
            self._parts.append(part)
            if part.done:
                first, arguments = self._parts[0], "".join(p.arguments_json for p in self._parts)
                whole.append(ToolCall(first.id, first.name, arguments))
        return whole


class _Output:
    """The output of one choice so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._parts = CallParts()
        self._rest = Output()

    def add(self, delta: GenerateDelta) -> None:
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._rest.tool_calls.extend(self._parts.add(delta))
        self._rest.token_ids.extend(delta.token_ids)
        self._rest.logprobs.extend(delta.logprobs)

    def whole(self) -> Output:
        self._rest.text, self._rest.reasoning = "".join(self._text), "".join(self._reasoning)
        return self._rest


class Record:
    """The events of one generation, added up to a Completion, which `on_end` receives."""

    def __init__(self, on_end: Callable[[Completion], None] | None) -> None:
        self._on_end = on_end
        self._started: GenerateStarted | None = None
        self._finished: GenerateFinished | None = None
        self._outputs: defaultdict[int, _Output] = defaultdict(_Output)
        self._ends: dict[int, ChoiceFinished] = {}

    def add(self, event: GenerateEvent) -> None:
        """Adds the next event; the last one calls `on_end`."""
        if isinstance(event, GenerateDelta):
            self._outputs[event.choice].add(event)
        elif isinstance(event, ChoiceFinished):
            self._ends[event.choice] = event
        elif isinstance(event, GenerateStarted):
            self._started = event
        elif isinstance(event, GenerateFinished):
            self._finished = event
            if self._on_end:
                self._on_end(self.completion())

    def completion(self) -> Completion:
        """Returns the outcome.

        Raises:
            ServerError: the stream ended too early.
        """
        if self._started is None or self._finished is None:
            raise ServerError("the stream ended without `started` or `finished`")
        ends = sorted(self._ends.items())
        choices = [choice(end, self._outputs[number].whole()) for number, end in ends]
        return completion(self._started, self._finished, self._outputs[0].whole(), choices)
