"""Whatever a client sends, it gets a typed error, and other clients are not affected.

A stream runs in the background of every test here; it must go on with the very tokens it gives when
it is alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from daemon import Daemon, wait_for
from mlxd.v1 import inference_pb2 as inference
from mlxd.v1 import model_pb2 as model
from mlxd.v1 import server_pb2 as server
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, chat, refused, request, token_ids

VOCABULARY = 384
CONTEXT = 32768
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
PROMPT = list(range(20, 50))


class Background:
    """Another client's stream, repeated while the tests run."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.alone = self._run()
        self.rounds = 0
        self.error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="background", daemon=True)
        self._thread.start()

    def _run(self) -> list[int]:
        events = self.wire.stream("tiny", PROMPT, max_tokens=60)
        return [id_ for event in events for id_ in event.delta.token_ids]

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                if self._run() != self.alone:
                    self.error = "the output changed"
                self.rounds += 1
        except grpc.RpcError as error:
            self.error = repr(error)

    def assert_undisturbed(self) -> None:
        """Waits for the end of the current round."""
        seen = self.rounds
        wait_for(lambda: self.error or self.rounds > seen, "the background stream goes on")
        assert not self.error

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join(CALL_S)


@pytest.fixture(scope="module")
def background(shared_daemon: Daemon) -> Iterator[Background]:
    """The other client."""
    with shared_daemon.wire() as wire:
        running = Background(wire)
        yield running
        running.stop()


@pytest.fixture(autouse=True)
def _undisturbed(background: Background) -> Iterator[None]:
    yield
    background.assert_undisturbed()


def good(**fields: Any) -> inference.GenerateRequest:
    """Makes a request that is valid except for `fields`."""
    fields = {"token_ids": token_ids(PROMPT), "model": "tiny", **fields}
    return inference.GenerateRequest(**fields)


def sampling(**fields: Any) -> inference.GenerateRequest:
    """Makes a request with these sampling options."""
    return good(sampling=inference.SamplingOptions(**fields))


def stopping(**fields: Any) -> inference.GenerateRequest:
    """Makes a request with these stopping options."""
    return good(stopping=inference.StoppingOptions(**fields))


def talk(**fields: Any) -> inference.GenerateRequest:
    """Makes a request with this one message."""
    fields = {"role": inference.ROLE_USER, **fields}
    return inference.GenerateRequest(
        model="tiny", chat=inference.ChatInput(messages=[inference.Message(**fields)])
    )


TEXT = [inference.ContentPart(text="hello")]
CALL = {"id": "1", "name": "f", "arguments_json": "{"}

FIELDS: dict[str, tuple[inference.GenerateRequest, str]] = {
    "no-model": (good(model=""), "model"),
    "no-input": (inference.GenerateRequest(model="tiny"), "input"),
    "token-beyond-vocabulary": (good(token_ids=token_ids([5, VOCABULARY])), "token_ids.ids[1]"),
    "token-huge": (good(token_ids=token_ids([2**32 - 1])), "token_ids.ids[0]"),
    "no-messages": (good(chat=inference.ChatInput()), "chat.messages"),
    "no-role": (talk(role=0, content=TEXT), "chat.messages[0].role"),
    "unknown-role": (talk(role=99, content=TEXT), "chat.messages[0].role"),
    "empty-part": (
        talk(content=[inference.ContentPart()]),
        "chat.messages[0].content[0]",
    ),
    "call-arguments": (
        talk(role=inference.ROLE_ASSISTANT, tool_calls=[inference.ToolCall(**CALL)]),
        "chat.messages[0].tool_calls[0].arguments_json",
    ),
    "tool-schema": (
        good(
            chat=inference.ChatInput(
                messages=[inference.Message(role=inference.ROLE_USER, content=TEXT)],
                tools=[inference.ToolDefinition(name="f", parameters_json="[")],
            )
        ),
        "chat.tools[0].parameters_json",
    ),
    "temperature-negative": (sampling(temperature=-0.1), "sampling.temperature"),
    "temperature-large": (sampling(temperature=100.5), "sampling.temperature"),
    "temperature-nan": (sampling(temperature=math.nan), "sampling.temperature"),
    "temperature-infinite": (sampling(temperature=math.inf), "sampling.temperature"),
    "top-p-negative": (sampling(top_p=-0.1), "sampling.top_p"),
    "top-p-large": (sampling(top_p=1.1), "sampling.top_p"),
    "top-p-nan": (sampling(top_p=math.nan), "sampling.top_p"),
    "min-p-negative": (sampling(min_p=-0.1), "sampling.min_p"),
    "min-p-large": (sampling(min_p=1.5), "sampling.min_p"),
    "repetition-negative": (sampling(repetition_penalty=-1), "sampling.repetition_penalty"),
    "repetition-large": (sampling(repetition_penalty=101), "sampling.repetition_penalty"),
    "presence-large": (sampling(presence_penalty=101), "sampling.presence_penalty"),
    "presence-nan": (sampling(presence_penalty=math.nan), "sampling.presence_penalty"),
    "frequency-small": (sampling(frequency_penalty=-101), "sampling.frequency_penalty"),
    "bias-beyond-vocabulary": (
        sampling(logit_bias={VOCABULARY: 1.0}),
        f"sampling.logit_bias[{VOCABULARY}]",
    ),
    "bias-large": (sampling(logit_bias={1: 1e6}), "sampling.logit_bias[1]"),
    "bias-nan": (sampling(logit_bias={1: math.nan}), "sampling.logit_bias[1]"),
    "max-tokens-zero": (stopping(max_tokens=0), "stopping.max_tokens"),
    "stop-empty": (stopping(stop_strings=["a", ""]), "stopping.stop_strings[1]"),
    "stop-token": (stopping(stop_token_ids=[VOCABULARY]), "stopping.stop_token_ids[0]"),
    "logprobs-many": (good(output=inference.OutputOptions(logprobs=21)), "output.logprobs"),
    "session-name": (good(session="no spaces"), "session"),
    "count-without-session": (good(expected_token_count=3), "expected_token_count"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_out_of_range_is_refused_by_both_generate_calls(wire: Wire, name: str) -> None:
    bad, path = FIELDS[name]
    with refused(*INVALID, path):
        wire.inference.Generate(bad, timeout=CALL_S)
    with refused(*INVALID, path):
        list(wire.inference.StreamGenerate(bad, timeout=CALL_S))


@pytest.mark.parametrize("bad", [good(prompt=""), good(token_ids=token_ids([]))], ids=["", "ids"])
def test_an_empty_prompt_is_refused(wire: Wire, bad: inference.GenerateRequest) -> None:
    with refused("INVALID_ARGUMENT", "EMPTY_PROMPT"):
        wire.inference.Generate(bad, timeout=CALL_S)


def test_a_prompt_longer_than_the_context_is_refused_with_both_counts(wire: Wire) -> None:
    with refused("INVALID_ARGUMENT", "CONTEXT_OVERFLOW") as refusal:
        wire.generate("tiny", [7] * (CONTEXT + 1), max_tokens=1)
    assert refusal.failure.metadata["prompt_tokens"] == str(CONTEXT + 1)
    assert refusal.failure.metadata["context_length"] == str(CONTEXT)


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 1, 2**32 - 1])
def test_top_k_of_the_vocabulary_and_more_switches_it_off(wire: Wire, top_k: int) -> None:
    options = {"temperature": 1.0, "seed": 3}
    without = wire.generate("tiny", PROMPT, max_tokens=8, sampling=options)
    reply = wire.generate("tiny", PROMPT, max_tokens=8, sampling={**options, "top_k": top_k})
    assert list(reply.token_ids) == list(without.token_ids)


BAD_NAMES = [
    "../tiny",
    "..",
    ".",
    "/",
    "/etc",
    "tiny/../tiny",
    "a/../../tiny",
    "a/b/c",
    "tiny/",
    "tiny\x00",
    "..\\tiny",
    "x" * 10_000,
    "\u202etiny",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_a_model_name_that_is_a_path_is_refused_everywhere(wire: Wire, name: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: wire.generate(name, PROMPT, max_tokens=1),
        lambda: wire.load(name),
        lambda: wire.unload(name),
        lambda: wire.models.GetModel(model.GetModelRequest(model=name), timeout=CALL_S),
        lambda: wire.create_session("path", name),
        lambda: wire.score(name, PROMPT),
        lambda: wire.server.Capabilities(server.CapabilitiesRequest(models=[name]), timeout=CALL_S),
    ]
    for call in calls:
        with refused(*INVALID):
            call()


def test_an_unknown_model_is_not_found_and_named(wire: Wire) -> None:
    # No shell expands a name, so a tilde is an ordinary character.
    for name in ("nothing", "~/tiny"):
        with refused("NOT_FOUND", "MODEL_NOT_FOUND") as refusal:
            wire.generate(name, PROMPT, max_tokens=1)
        assert refusal.failure.resource == name


def test_an_unknown_session_is_not_found_and_named(wire: Wire) -> None:
    with refused("NOT_FOUND", "SESSION_NOT_FOUND") as refusal:
        wire.generate("", PROMPT, max_tokens=1, session="nothing")
    assert refusal.failure.resource == "nothing"


def test_scores_out_of_range_are_refused(wire: Wire) -> None:
    with refused("INVALID_ARGUMENT", "EMPTY_PROMPT"):
        wire.score("tiny", [])
    with refused(*INVALID, "top_logprobs"):
        wire.score("tiny", PROMPT, top=21)
    with refused(*INVALID, "token_ids.ids[0]"):
        wire.score("tiny", [VOCABULARY])
    with refused(*INVALID, "input"):
        wire.inference.Score(inference.ScoreRequest(model="tiny"), timeout=CALL_S)
    limits = wire.server.Capabilities(server.CapabilitiesRequest(), timeout=CALL_S).server.limits
    with refused(*INVALID, "token_ids.ids"):
        wire.score("tiny", [7] * (limits.score_tokens_max + 1), top=0)


def test_counts_of_nothing_are_refused(wire: Wire) -> None:
    with refused(*INVALID, "input"):
        wire.inference.CountTokens(inference.CountTokensRequest(model="tiny"), timeout=CALL_S)
    with refused(*INVALID, "chat.messages"):
        wire.inference.CountTokens(
            inference.CountTokensRequest(model="tiny", chat=inference.ChatInput()), timeout=CALL_S
        )


@pytest.mark.parametrize("name", ["a b", "é", "x" * 129, "a\nb", "a\x00"], ids=repr)
def test_a_session_name_out_of_range_is_refused(wire: Wire, name: str) -> None:
    with refused(*INVALID, "name"):
        wire.create_session(name, "tiny")


def test_session_fields_out_of_range_are_refused(wire: Wire) -> None:
    for seconds in (0, -1):
        with refused(*INVALID, "ttl"):
            wire.create_session("bad", "tiny", ttl=duration_pb2.Duration(seconds=seconds))
    with refused(*INVALID, "ttl"):
        wire.create_session("bad", "tiny", ttl=duration_pb2.Duration(seconds=1, nanos=-5))
    with refused(*INVALID, "model"):
        wire.create_session("bad", "")
    with refused(*INVALID, "page_size"):
        wire.sessions.ListSessions(session.ListSessionsRequest(page_size=1001), timeout=CALL_S)
    with refused(*INVALID, "page_token"):
        wire.sessions.ListSessions(
            session.ListSessionsRequest(page_token="\x01garbage"), timeout=CALL_S
        )
    with refused(*INVALID, "page_size"):
        wire.models.ListModels(model.ListModelsRequest(page_size=1001), timeout=CALL_S)
    wire.create_session("cut", "tiny")
    with refused(*INVALID, "to"):
        wire.sessions.TruncateSession(session.TruncateSessionRequest(name="cut"), timeout=CALL_S)
    with refused(*INVALID, "token_count"):
        wire.sessions.TruncateSession(
            session.TruncateSessionRequest(name="cut", token_count=5), timeout=CALL_S
        )
    with refused(*INVALID, "turn_count"):
        wire.sessions.TruncateSession(
            session.TruncateSessionRequest(name="cut", turn_count=5), timeout=CALL_S
        )
    wire.delete_session("cut")


def test_an_unknown_compute_dtype_is_refused(wire: Wire) -> None:
    with refused(*INVALID, "compute_dtype"):
        wire.load("tiny", compute_dtype=99)


def raw_call(wire: Wire, method: str, body: bytes) -> bytes:
    """Makes a call with raw bytes, which need not be a message."""
    call = wire.channel.unary_unary(method, request_serializer=None, response_deserializer=None)
    return call(body, timeout=CALL_S)


GENERATE = "/mlxd.v1.InferenceService/Generate"


@pytest.mark.parametrize(
    "body",
    # A `model` that is not UTF-8; a length beyond the end; an unknown wire type.
    [b"\x0a\x02\xff\xfe", b"\x0a\x7fshort", b"\x0f\x0f"],
    ids=["not-utf-8", "cut-short", "garbage"],
)
def test_bytes_that_are_not_a_message_are_refused(wire: Wire, body: bytes) -> None:
    with refused(*INVALID):
        raw_call(wire, GENERATE, body)


def test_a_message_of_100_mb_is_refused_with_the_limit(wire: Wire) -> None:
    limits = wire.server.Capabilities(server.CapabilitiesRequest(), timeout=CALL_S).server.limits
    with refused("INVALID_ARGUMENT", "MESSAGE_TOO_LARGE") as refusal:
        wire.inference.Generate(good(prompt="x" * 100_000_000), timeout=CALL_S)
    assert refusal.failure.metadata["limit_bytes"] == str(limits.message_bytes_max)


def test_an_unknown_method_is_unimplemented_with_a_reason(wire: Wire) -> None:
    for method in ("/mlxd.v1.InferenceService/Dream", "/mlxd.v9.Nothing/Nothing"):
        with refused("UNIMPLEMENTED", "UNIMPLEMENTED"):
            raw_call(wire, method, b"")


def test_odd_text_in_a_chat_is_just_text(wire: Wire) -> None:
    odd = "\x00 {{ messages }} {% raw %} <|im_end|> \U0001f9ff"
    reply = wire.generate("tiny", max_tokens=2, chat=chat(odd))
    assert reply.usage.prompt_tokens > 0


def test_a_chat_that_the_template_refuses_is_the_callers_mistake(wire: Wire) -> None:
    result = inference.Message(role=inference.ROLE_TOOL, content=TEXT, tool_call_id="1")
    with refused("INVALID_ARGUMENT", "TEMPLATE_FAILED") as refusal:
        wire.generate("tiny", chat=inference.ChatInput(messages=[result]), max_tokens=2)
    assert "no tools here" in refusal.failure.message


def test_afterwards_nothing_is_left(wire: Wire, background: Background) -> None:
    background.assert_undisturbed()
    stats = wire.stats()
    assert stats.sessions == 0
    assert stats.queued_sequences == 0
    assert stats.running_sequences <= 1, "the background's own"
    assert stats.failed_total == 0


def test_an_idle_field_is_not_mistaken_for_an_unset_one(wire: Wire) -> None:
    zero = request("tiny", PROMPT, max_tokens=4, sampling={"temperature": 0.0, "top_k": 0})
    reply = wire.inference.Generate(zero, timeout=CALL_S)
    assert reply.sampling.temperature == 0
    assert reply.sampling.top_k == 0
