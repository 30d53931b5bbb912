"""Structured output: what random weights draw at temperature 1.5 obeys its schema or grammar."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf import json_format

from mlxd.v1 import inference_pb2 as pb
from wire import Wire, chat, refused

pytest.importorskip("mlx_lm", reason="the tiny checkpoints are written by mlx-lm")

from api_schemas import api_schemas
from daemon import Daemon, binary
from hostile import HOSTILE, schema_format
from schema_answers import HOT, INVALID, TOKENS, ask, is_whole
from tiny_tokenizer import EOS, SPECIAL


def test_a_thousand_answers_are_valid_for_the_schemas_of_tools_and_apis(wire: Wire) -> None:
    schemas = api_schemas()
    assert len(schemas) >= 300
    tasks = [(name, seed) for name in schemas for seed in range(4)]

    def run(task: tuple[str, int]) -> tuple[bool, str]:
        name, seed = task
        try:
            reply = ask(wire, schema_format(schemas[name]), seed)
            return is_whole(schemas[name], reply), ""
        except (AssertionError, ValueError, grpc.RpcError, *INVALID) as error:
            return False, f"{name}, seed {seed}: {error}"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(run, tasks))
    failures = [why for _, why in outcomes if why]
    assert not failures, "\n\n".join(failures[:20])
    ended = sum(whole for whole, _ in outcomes)
    assert ended > len(tasks) * 0.9, f"{ended} of {len(tasks)} ended"


CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_form_is_obeyed(wire: Wire, temperature: float) -> None:
    sampling = {"temperature": temperature}
    city = ask(wire, schema_format(CITY), sampling=sampling, chat=chat("a city"))
    assert city.finish_reason == pb.FINISH_REASON_STOP
    jsonschema.validate(json.loads(city.text), CITY)
    regex = ask(wire, pb.ResponseFormat(regex="[a-f]{3,5}-[0-9]{2}"), sampling=sampling)
    assert re.fullmatch("[a-f]{3,5}-[0-9]{2}", regex.text)
    choice = pb.ResponseFormat(choice=pb.ChoiceFormat(texts=["yes", "no", "{perhaps}"]))
    assert ask(wire, choice, sampling=sampling).text in ("yes", "no", "{perhaps}")
    lark = pb.ResponseFormat(grammar='start: "a" mid "b"\nmid: "(" mid ")" | "x"')
    inner = ask(wire, lark, sampling=sampling)
    if inner.finish_reason == pb.FINISH_REASON_STOP:
        assert re.fullmatch(r"a\(*x\)*b", inner.text)
    anything = pb.ResponseFormat(json_object=pb.JsonObjectFormat())
    reply = ask(wire, anything, sampling=sampling)
    assert reply.text.startswith("{")
    if reply.finish_reason == pb.FINISH_REASON_STOP:
        assert isinstance(json.loads(reply.text), dict)


def test_an_answer_ends_with_the_models_own_end_token(wire: Wire) -> None:
    answer = pb.ResponseFormat(choice=pb.ChoiceFormat(texts=["ok"]))
    reply = ask(wire, answer)
    assert reply.text == "ok"
    assert reply.token_ids[-1] == EOS
    assert not any(id_ < len(SPECIAL) for id_ in reply.token_ids[:-1])


def test_max_tokens_cuts_a_structure_and_says_so(wire: Wire) -> None:
    reply = ask(wire, pb.ResponseFormat(regex="[a-z]{50}"), max_tokens=7)
    assert reply.finish_reason == pb.FINISH_REASON_LENGTH
    assert reply.usage.completion_tokens == 7
    assert re.fullmatch("[a-z]{7,49}", reply.text)


def test_a_stop_string_cuts_it_too(wire: Wire) -> None:
    reply = ask(wire, pb.ResponseFormat(regex="a{9}b{9}"), stop_strings=["bb"])
    assert reply.finish_reason == pb.FINISH_REASON_STOP_STRING
    assert reply.text == "a" * 9


def test_a_batch_of_free_and_constrained_requests_is_as_each_alone(wire: Wire) -> None:
    formats = [None, schema_format(CITY), pb.ResponseFormat(regex="[a-z ]{20,60}"), None]
    kinds = [
        {"sampling": {"top_p": 0.9}},
        {"sampling": {"top_k": 20}},
        {"sampling": {"min_p": 0.05, "repetition_penalty": 1.3}},
        {"sampling": {"temperature": 0.0}},
    ]
    tasks = [(form, kind, seed) for form in formats for kind in kinds for seed in (1, 2)]

    def run(task: tuple[Any, dict[str, Any], int]) -> list[int]:
        form, kind, seed = task
        fields = {**kind, "max_tokens": 60}
        return list(ask(wire, form, seed, **fields).token_ids)

    alone = [run(task) for task in tasks]
    with ThreadPoolExecutor(len(tasks)) as pool:
        assert list(pool.map(run, tasks)) == alone


def test_a_session_goes_on_after_a_structured_turn(wire: Wire) -> None:
    name = "test/structured"
    wire.create_session(name, "tiny")
    try:
        sampling = {**HOT, "seed": 5}
        fields = {"session": name, "sampling": sampling, "max_tokens": TOKENS, "ignore_eos": False}
        fields["response_format"] = schema_format(CITY)
        first = wire.generate("", chat=chat("a city"), **fields)
        jsonschema.validate(json.loads(first.text), CITY)
        second = wire.generate("", chat=chat("another"), **fields)
        jsonschema.validate(json.loads(second.text), CITY)
        assert second.usage.cached_tokens > first.usage.prompt_tokens
        held = wire.get_session(name, include_messages=True)
        assert held.messages[1].content[0].text == first.text
    finally:
        wire.delete_session(name)


REFUSED = [
    ({"not": {"type": "null"}}, "not", ""),
    ({"properties": {"a": {"if": {}, "then": {}}}}, "if", "/properties/a"),
    ({"$ref": "http://127.0.0.1:9/schema.json"}, "$ref", ""),
    ({"type": "array", "uniqueItems": True}, "uniqueItems", ""),
    ({"type": "string", "format": "no-such"}, "format", ""),
    ({"nullable": True}, "nullable", ""),
]


@pytest.mark.parametrize(("schema", "keyword", "path"), REFUSED)
def test_a_keyword_that_is_not_supported_is_named(
    wire: Wire, schema: Any, keyword: str, path: str
) -> None:
    with refused("INVALID_ARGUMENT", "SCHEMA_UNSUPPORTED") as refusal:
        ask(wire, schema_format(schema))
    metadata = refusal.failure.metadata
    assert metadata["keyword"] == keyword
    assert metadata["path"] == path
    assert metadata["field"] == "response_format.json_schema.schema"


MALFORMED = [
    pb.ResponseFormat(),
    pb.ResponseFormat(json_schema=pb.JsonSchemaFormat(schema="{")),
    pb.ResponseFormat(regex="("),
    pb.ResponseFormat(regex="[^\\s\\S]"),
    pb.ResponseFormat(grammar="start: missing"),
    pb.ResponseFormat(choice=pb.ChoiceFormat()),
    schema_format(False),
    schema_format({"type": "integer", "minimum": 2, "maximum": 1}),
]


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda form: json_format.MessageToJson(form)[:40])
def test_a_form_that_is_malformed_or_that_nothing_obeys_is_refused(
    wire: Wire, answer: pb.ResponseFormat
) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        ask(wire, answer)


def test_limits_are_named(wire: Wire) -> None:
    with refused("INVALID_ARGUMENT", "SCHEMA_TOO_LARGE") as refusal:
        ask(wire, schema_format({"description": "x" * 5_000_000}))
    assert refusal.failure.metadata["limit"] == "grammar_bytes_max"
    deep: Any = {}
    for _ in range(60):
        deep = {"properties": {"a": deep}}
    with refused("INVALID_ARGUMENT", "SCHEMA_TOO_LARGE") as refusal:
        ask(wire, schema_format(deep))
    assert refusal.failure.metadata["limit"] == "grammar_depth_max"
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        ask(wire, pb.ResponseFormat(regex="a"), ignore_eos=True)


@pytest.fixture(scope="module")
def streams(shared_daemon: Daemon) -> Iterator[Any]:
    """Eight streams that run beside the hostile requests; yields what checks that they went on."""
    with shared_daemon.wire() as wire, ThreadPoolExecutor(8) as pool:

        def run(number: int) -> list[int]:
            return list(wire.generate("tiny", [number, 30], max_tokens=300).token_ids)

        expected = [run(number) for number in range(20, 28)]

        running = [pool.submit(run, number) for number in range(20, 28)]
        yield
        assert [stream.result() for stream in running] == expected


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("streams")
def test_a_hostile_grammar_is_answered_or_refused(wire: Wire, name: str) -> None:
    try:
        reply = ask(wire, HOSTILE[name], max_tokens=40)
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    else:
        assert reply.usage.completion_tokens > 0


def test_the_command_line_reads_a_schema(shared_daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "city.json"
    file.write_text(json.dumps(CITY))
    command = [str(binary()), "generate", "--address", shared_daemon.target, "--model", "tiny"]
    command += ["--temperature", "1.5", "--max-tokens", "200", "--no-stdin"]
    done = subprocess.run(
        [*command, "--schema", str(file), "a city"], capture_output=True, check=True
    )
    jsonschema.validate(json.loads(done.stdout), CITY)
    chosen = subprocess.run(
        [*command, "--choice", "yes", "--choice", "no", "well?"], capture_output=True, check=True
    )
    assert chosen.stdout.decode().strip() in ("yes", "no")
