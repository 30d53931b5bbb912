"""Tool calls and reasoning: what requests carry, and what deltas add up to."""

from __future__ import annotations

import pytest

import mlxd
from mlxd._convert import generate_request
from mlxd._record import CallParts, Record
from mlxd.types import Completion, GenerateEvent, ToolCall
from mlxd.v1 import inference_pb2 as pb

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def request(**options: object) -> pb.GenerateRequest:
    """Builds a chat request."""
    return generate_request(
        model="m", session="", prompt=None, messages="a", token_ids=None, options=options
    )


def call(index: int, name: str, arguments: str, done: bool) -> pb.GenerateDelta:
    """Makes a delta with a part of a call."""
    part = pb.ToolCallDelta(index=index, name=name, arguments_json=arguments, done=done)
    part.id = name and f"id-{name}"
    return pb.GenerateDelta(tool_calls=[part])


def test_a_request_says_what_may_be_called_and_how_to_reason() -> None:
    sent = request(
        tools=[TOOL],
        tool_choice="none",
        parallel_tool_calls=False,
        tool_format="prompted",
        reasoning=False,
        reasoning_budget=7,
        reasoning_effort="low",
    )
    assert sent.chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE
    assert sent.chat.HasField("parallel_tool_calls")
    assert not sent.chat.parallel_tool_calls
    assert sent.chat.tool_format == pb.TOOL_FORMAT_PROMPTED
    assert sent.reasoning.HasField("enabled")
    assert not sent.reasoning.enabled
    assert (sent.reasoning.budget_tokens, sent.reasoning.effort) == (7, "low")
    assert not request().HasField("reasoning")
    required = request(tools=[TOOL], tool_choice="required").chat.tool_choice
    assert required.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    for named in ({"name": "f"}, {"type": "function", "function": {"name": "f"}}):
        assert request(tools=[TOOL], tool_choice=named).chat.tool_choice.function == "f"
    for wrong in (
        {"tool_choice": "some"},
        {"tool_choice": {}},
        {"tool_format": "x"},
        {"reasoning_budget": -1},
    ):
        with pytest.raises(mlxd.InvalidRequestError):
            request(**wrong)


def test_deltas_add_up_to_the_answer_that_the_next_request_takes() -> None:
    ends: list[Completion] = []
    record = Record(ends.append)
    events: list[GenerateEvent] = [
        pb.GenerateStarted(request_id="r"),
        pb.GenerateDelta(reasoning="I "),
        pb.GenerateDelta(reasoning="ask.", text="Let "),
        pb.GenerateDelta(text="me."),
        call(0, "f", '{"a"', False),
        # It was none: another takes its number.
        call(0, "g", '{"b": ', False),
        call(0, "", "1}", True),
        # This one is cut off.
        call(1, "h", "{", False),
        pb.GenerateFinished(
            finish_reason=pb.FINISH_REASON_TOOL_CALLS, usage=pb.Usage(reasoning_tokens=3)
        ),
    ]
    for event in events:
        record.add(event)
    [done] = ends
    assert (done.reasoning, done.text, done.reasoning_tokens) == ("I ask.", "Let me.", 3)
    assert done.tool_calls == (ToolCall("id-g", "g", '{"b": 1}'),)
    assert (done.tool_calls[0].arguments, done.finish_reason) == ({"b": 1}, "tool_calls")

    messages = [{"role": "user", "content": "a"}, done.message]
    sent = generate_request(
        model="m", session="", prompt=None, messages=messages, token_ids=None, options={}
    ).chat.messages[1]
    assert (sent.reasoning, sent.content[0].text) == ("I ask.", "Let me.")
    assert sent.tool_calls[0] == pb.ToolCall(id="id-g", name="g", arguments_json='{"b": 1}')


def test_calls_come_whole() -> None:
    parts = CallParts()
    assert parts.add(call(0, "f", "{", False)) == []
    assert parts.add(call(0, "", "}", True)) == [ToolCall("id-f", "f", "{}")]
    assert parts.add(call(1, "g", "{}", True)) == [ToolCall("id-g", "g", "{}")]
