"""Calls that a request demands: what random weights write, in each format, calls the tools."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer

import mlxd
from daemon import Daemon, binary

pytest.importorskip("mlx_lm", reason="the tiny checkpoints are written by mlx-lm")

from checkpoints import Checkpoint, build
from tiny_tokenizer import TEMPLATE, VOCABULARY

FORMATS = (
    "hermes",
    "qwen3_coder",
    "llama3_json",
    "mistral",
    "pythonic",
    "glm4",
    "deepseek_v3",
    "deepseek_v3_1",
    "kimi_k2",
    "minimax_m2",
    "gemma4",
    "function_gemma",
    "phi4",
    "harmony",
    "nemotron",
)
# What is a token of its own in the tokenizers of models with these formats.
MARKERS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # noqa: RUF001
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),  # noqa: RUF001
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<minimax:tool_call>"),
    *("</minimax:tool_call>", "<|tool_call>", "<tool_call|>", '<|"|>', "<start_function_call>"),
    *("<end_function_call>", "<escape>", "<|tool_call|>", "<|/tool_call|>", "<TOOLCALL>"),
    *("</TOOLCALL>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
    *("<|call|>", "<|return|>"),
]
SIZE = VOCABULARY + 64
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + TEMPLATE
THINKING = WITH_TOOLS.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "New York"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SAY: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "times": {"type": "integer"}},
    "required": ["text"],
    "additionalProperties": False,
}
RAIN: dict[str, Any] = {
    "type": "object",
    "properties": {"exact": {"type": "boolean"}},
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "rain": RAIN, "say": SAY}
LONGEST = 500


def described(name: str) -> dict[str, Any]:
    """Returns a tool's definition as OpenAI writes it."""
    function = {"name": name, "description": "", "parameters": SCHEMAS[name]}
    return {"type": "function", "function": function}


TOOLS = [described("weather"), described("rain")]


def add_model(root: Path, name: str, markers: list[str], template: str = WITH_TOOLS) -> None:
    """Writes a copy of the tiny checkpoint with special tokens."""
    folder = root / name
    shutil.copytree(root / "base", folder)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([AddedToken(marker, normalized=False) for marker in markers])
    made.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves a model of each format, with and without tokens of its own."""
    root = tmp_path_factory.mktemp("demanded")
    long = {"max_position_embeddings": 16384, "vocab_size": SIZE}
    build(Checkpoint("base", long), root, seed=1)
    forms = {}
    for name in FORMATS:
        add_model(root, name, MARKERS)
        add_model(root, f"{name}-text", [])
        forms |= {name: (name, "none"), f"{name}-text": (name, "none")}
    add_model(root, "thinks", MARKERS, THINKING)
    add_model(root, "may-think", MARKERS)
    add_model(root, "harmony-thinks", MARKERS)
    forms |= {"thinks": ("hermes", "think"), "may-think": ("hermes", "think")}
    forms |= {"harmony-thinks": ("harmony", "harmony")}
    config = {
        f'model."{name}".{key}': value
        for name, form in forms.items()
        for key, value in zip(("tool_format", "reasoning_format"), form, strict=True)
    }
    with Daemon([root], config) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[mlxd.Client]:
    """The Python client."""
    with mlxd.Client(f"unix://{daemon.socket}") as client:
        yield client


def ask(client: mlxd.Client, model: str, seed: int, **options: Any) -> mlxd.Completion:
    """Demands calls."""
    options = {"tools": TOOLS, "tool_choice": "required", "max_tokens": LONGEST, **options}
    return client.chat("call", model=model, temperature=1.5, seed=seed, **options)


def checked(done: mlxd.Completion) -> list[str]:
    """Checks the calls of an answer, and returns their names; none if it was cut."""
    for call in done.tool_calls:
        jsonschema.validate(call.arguments, SCHEMAS[call.name])
    if done.finish_reason == "length":
        # Some formats leave what was cut behind a call as text.
        assert done.completion_tokens == LONGEST
        return []
    assert (done.finish_reason, done.text) == ("tool_calls", "")
    assert done.tool_calls
    return [call.name for call in done.tool_calls]


@pytest.mark.parametrize("tokens", ["", "-text"])
@pytest.mark.parametrize("name", FORMATS)
def test_in_each_format_a_demanded_answer_calls(
    client: mlxd.Client, name: str, tokens: str
) -> None:
    one: dict[str, Any] = {"parallel_tool_calls": False}
    named = {"tool_choice": {"name": "rain"}}
    # Of a text that nothing bounds random weights seldom find the end.
    text = {"tools": [*TOOLS, described("say")], "tool_choice": described("say"), **one}
    tasks = [(options, seed) for options in ({}, one, {**named, **one}, text) for seed in range(4)]

    def run(task: tuple[dict[str, Any], int]) -> list[str]:
        options, seed = task
        return checked(ask(client, name + tokens, seed, **options))

    with ThreadPoolExecutor(len(tasks)) as pool:
        called = list(pool.map(run, tasks))
    several, single, rain, say = (called[at : at + 4] for at in range(0, 16, 4))
    assert all(len(names) <= 1 for names in [*single, *rain, *say])
    assert any([*several, *single, *rain])
    assert all(names in ([], ["rain"]) for names in rain)
    assert all(names in ([], ["say"]) for names in say)


def test_a_model_that_knows_no_tools_is_made_to_call(client: mlxd.Client) -> None:
    asked = {"tool_format": "prompted", "parallel_tool_calls": False}
    assert any(checked(ask(client, "base", seed, **asked)) for seed in range(6))
    with pytest.raises(mlxd.InvalidRequestError, match="tool_choice"):
        ask(client, "base", 1)


def test_the_same_seed_calls_alike_streamed_or_not(client: mlxd.Client) -> None:
    done = ask(client, "hermes", 5)
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.5, "seed": 5}
    with client.stream(model="hermes", messages="call", max_tokens=LONGEST, **options) as stream:
        streamed = [(call.name, call.arguments) for call in stream.result().tool_calls]
    assert streamed == [(call.name, call.arguments) for call in done.tool_calls]


def test_reasoning_comes_before_calls_and_forms(client: mlxd.Client) -> None:
    budget = {"reasoning_budget": 6}
    for seed in range(4):
        done = ask(client, "thinks", seed, **budget)
        checked(done)
        assert 1 <= done.reasoning_tokens <= 16
        schema = {"response_format": WEATHER, "tools": None, "tool_choice": None}
        formed = ask(client, "thinks", seed, **schema, **budget)
        assert 1 <= formed.reasoning_tokens <= 16
        jsonschema.validate(json.loads(formed.text), WEATHER)
    # Whether it begins to reason is the model's own choice.
    think = VOCABULARY + MARKERS.index("<think>")
    for bias in (-100.0, 100.0):
        options = {"logit_bias": {think: bias}, "reasoning_budget": 0, **schema}
        formed = ask(client, "may-think", 1, **options)
        assert (formed.reasoning_tokens > 0) == (bias > 0)
        jsonschema.validate(json.loads(formed.text), WEATHER)


def test_harmony_calls_after_its_analysis(client: mlxd.Client) -> None:
    options: dict[str, Any] = {"reasoning_budget": 5, "parallel_tool_calls": False}
    done = [ask(client, "harmony-thinks", seed, **options) for seed in range(6)]
    assert any(answer.reasoning_tokens > 0 and checked(answer) for answer in done)


def test_a_session_goes_on_after_demanded_calls(client: mlxd.Client) -> None:
    session = client.session("demanded", model="hermes")
    options: dict[str, Any] = {"temperature": 1.5, "seed": 2, "max_tokens": LONGEST}
    options["parallel_tool_calls"] = False
    first = session.generate("call", tools=TOOLS, tool_choice={"name": "weather"}, **options)
    checked(first)
    held = session.messages()[1]
    assert [call.name for call in held.tool_calls] == [call.name for call in first.tool_calls]
    again = session.generate("again", tools=TOOLS, tool_choice="required", **options)
    checked(again)
    session.delete()


def test_what_a_format_cannot_be_held_to_is_named(client: mlxd.Client) -> None:
    pattern = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x+$"}}}
    odd = {"name": "odd", "parameters": pattern}
    with pytest.raises(mlxd.InvalidRequestError, match="pattern"):
        ask(client, "qwen3_coder", 1, tools=[odd])
    assert ask(client, "hermes", 1, tools=[odd], max_tokens=5).completion_tokens == 5
    unsupported = {"name": "odd", "parameters": {"type": "object", "not": {}}}
    with pytest.raises(mlxd.MlxdError, match="not"):
        ask(client, "hermes", 1, tools=[unsupported])


def test_the_cli_demands_calls(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    command = [str(binary()), "generate", "-m", "hermes", "--address", f"unix://{daemon.socket}"]
    command += ["--tool", str(file), "--tool-choice", "weather", "--json", "--seed", "3"]
    done = subprocess.run(
        [*command, "call"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)["tool_calls"]
    assert {call["name"] for call in calls} == {"weather"}
