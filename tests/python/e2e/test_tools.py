"""Reasoning and tool calls, from a model that says what a test wants: through the engine, the
clients and the CLI."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxd
from daemon import Daemon, binary, wait_for
from mlxd.types import GenerateDelta
from mlxd.v1 import inference_pb2 as pb
from wire import Wire, message, refused

pytest.importorskip("mlx_lm", reason="the tiny checkpoints are written by mlx-lm")

from scripted import build, ids_of

MODEL = "scripted"
# Qwen3's, shortened. What a message ends with is the cue of the answer.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- 'For each call: <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {{- '<|' + (loop.previtem.content.split(' ') | last) + '|>' }}
  {%- endif %}
  {%- if message.reasoning_content %}
    {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
  {%- endif %}
  {{- message.content }}
  {%- for call in message.tool_calls or [] %}
    {{- '\\n' if message.content or not loop.first }}
    {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
    {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- set last = (messages | last).content.split(' ') | last %}
  {%- if enable_thinking is defined and enable_thinking %}
    {{- '<think>\\n\\n' if last == 'on' else '<think>\\n\\n\\n' }}
  {%- else %}
    {{- '<|' + last + '|>' }}
  {%- endif %}
{%- endif %}
"""
SCRIPTS = {
    "<|weather|>": [
        "<think>",
        "\nThe tool",
        " knows.\n",
        "</think>",
        "\n\nI ask.",
        "\n<tool_call>",
        '\n{"name": "weather"',
        ', "arguments": {"city": ',
        '"São ',
        'Paulo"}}',
        "\n</tool_call>",
    ],
    "<|two|>": [
        "<tool_call>\n",
        '{"name": "f", ',
        '"arguments": {}}\n',
        "</tool_call>\n",
        "<tool_call> ",
        '{"name": "g", ',
        '"arguments": {} }\n',
        "</tool_call> ",
    ],
    "<think>\n\n": ["on", " and", " on", " it", " goes", "\n</think>\n\n", "Done."],
    "<think>\n\n\n": [f" step {n}" for n in range(40)],
    "<|rain|>": ["It", " rains."],
}


def described(name: str) -> dict[str, Any]:
    """Returns a tool's definition as OpenAI writes it."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": city}}


TOOLS = [described("weather"), described("f"), described("g")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with the scripted model."""
    root = tmp_path_factory.mktemp("tools")
    build(root / MODEL, TEMPLATE, SCRIPTS)
    return root


@pytest.fixture(scope="module")
def daemon(root: Path) -> Iterator[Daemon]:
    """A daemon that serves it."""
    with Daemon([root], models=[MODEL]) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[mlxd.Client]:
    """The Python client."""
    with mlxd.Client(f"unix://{daemon.socket}") as client:
        yield client


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A connection to the daemon."""
    with daemon.wire() as wire:
        yield wire


def ask(client: mlxd.Client, script: str, **options: Any) -> mlxd.Completion:
    """Asks for a script."""
    return client.chat(f"please {script}", model=MODEL, temperature=0, **options)


def test_an_answer_is_parted_streamed_or_not(client: mlxd.Client) -> None:
    done = ask(client, "weather", tools=TOOLS, return_token_ids=True, logprobs=1)
    assert (done.reasoning, done.text) == ("The tool knows.", "I ask.")
    assert [(c.name, c.arguments) for c in done.tool_calls] == [("weather", {"city": "São Paulo"})]
    assert (done.finish_reason, done.reasoning_tokens) == ("tool_calls", 4)
    assert done.completion_tokens == len(done.token_ids) == len(done.logprobs) == 12
    with client.stream(model=MODEL, messages="a weather", tools=TOOLS, temperature=0) as stream:
        events = list(stream)
        streamed = stream.result()
    assert (streamed.reasoning, streamed.text) == (done.reasoning, done.text)
    assert [c.arguments for c in streamed.tool_calls] == [c.arguments for c in done.tool_calls]
    deltas = [event for event in events if isinstance(event, GenerateDelta)]
    assert not any("<" in d.text or "<" in d.reasoning for d in deltas), "no markup"


def test_calls_are_text_where_no_tools_are_offered(client: mlxd.Client) -> None:
    plain = ask(client, "two")
    assert plain.text == "".join(SCRIPTS["<|two|>"])
    none = ask(client, "two", tools=TOOLS, tool_choice="none")
    assert (none.text, none.tool_calls, none.prompt_tokens) == (plain.text, (), plain.prompt_tokens)


def test_parallel_calls_and_one_call(client: mlxd.Client) -> None:
    both = ask(client, "two", tools=TOOLS)
    assert [call.name for call in both.tool_calls] == ["f", "g"]
    assert len({call.id for call in both.tool_calls}) == 2
    one = ask(client, "two", tools=TOOLS, parallel_tool_calls=False)
    assert ([call.name for call in one.tool_calls], one.text) == (["f"], "")
    assert (one.finish_reason, one.completion_tokens) == ("tool_calls", 4)


@pytest.mark.parametrize("max_tokens", range(5, 12))
def test_a_call_that_max_tokens_cuts_is_none(client: mlxd.Client, max_tokens: int) -> None:
    done = ask(client, "weather", tools=TOOLS, max_tokens=max_tokens)
    assert (done.text, done.finish_reason) == ("I ask.", "length")
    # A call that lacks only its closing mark is whole.
    assert len(done.tool_calls) == (max_tokens >= 10)


def test_stop_strings_are_looked_for_in_the_text(client: mlxd.Client) -> None:
    done = ask(client, "weather", tools=TOOLS, stop=["tool", "city"])
    assert (done.finish_reason, len(done.tool_calls)) == ("tool_calls", 1)
    done = ask(client, "weather", tools=TOOLS, stop=["ask"])
    assert (done.finish_reason, done.text, done.tool_calls) == ("stop_string", "I ", ())


def test_raw_output_stays_raw(client: mlxd.Client) -> None:
    done = client.generate(model=MODEL, prompt="<|weather|>", temperature=0)
    assert done.text == "".join(SCRIPTS["<|weather|>"])
    assert (done.reasoning, done.tool_calls, done.reasoning_tokens) == ("", (), 0)


def test_reasoning_that_the_template_begins_is_reasoning(client: mlxd.Client) -> None:
    done = ask(client, "on", reasoning=True)
    assert (done.reasoning, done.text, done.reasoning_tokens) == ("on and on it goes", "Done.", 6)


def test_a_budget_ends_reasoning_with_the_models_own_marks(
    client: mlxd.Client, root: Path, wire: Wire
) -> None:
    closing = ids_of(root / MODEL, "\n</think>\n\n")
    free = ask(client, "endless", reasoning=True, max_tokens=30, return_token_ids=True)
    assert (free.text, free.finish_reason, free.reasoning_tokens) == ("", "length", 30)
    for budget in (0, 1, 7):
        options = {"reasoning": True, "reasoning_budget": budget, "return_token_ids": True}
        done = ask(client, "endless", max_tokens=30, logprobs=0, **options)
        assert list(done.token_ids[: budget + 1]) == [*free.token_ids[:budget], closing[0]]
        assert list(done.token_ids[budget : budget + len(closing)]) == closing
        assert done.reasoning == "".join(SCRIPTS["<think>\n\n\n"][:budget])
        assert (done.text, done.reasoning_tokens) == ("Done.", budget + len(closing))
        # Its log-probability is the model's, which would have said something else.
        assert done.logprobs[budget].chosen.logprob < -0.1
    early = ask(client, "on", reasoning=True, reasoning_budget=100)
    assert (early.text, early.reasoning_tokens) == ("Done.", 6)
    cut = ask(client, "endless", reasoning=True, reasoning_budget=5, max_tokens=5)
    assert (cut.finish_reason, cut.text) == ("length", "")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "reasoning"):
        options = pb.ReasoningOptions(budget_tokens=1)
        wire.inference.Generate(pb.GenerateRequest(model=MODEL, prompt="a", reasoning=options))


def test_a_session_goes_on_from_its_calls_and_survives(root: Path) -> None:
    with Daemon([root], models=[MODEL]) as daemon:
        address = f"unix://{daemon.socket}"
        with mlxd.Client(address) as client:
            session = client.session("s", model=MODEL)
            first = session.generate("how is the weather", tools=TOOLS, temperature=0)
            [call] = first.tool_calls
            held = session.messages()[1]
            assert (held.reasoning, held.tool_calls[0].name) == (first.reasoning, "weather")
            before = list(session.get(include_token_ids=True).token_ids)
        daemon.kill()
        daemon.start()
        with mlxd.Client(address) as client:
            session = client.session("s", model=MODEL)
            assert session.messages()[1] == held
            fork = session.fork("f")
            result = {"role": "tool", "content": "it says rain", "tool_call_id": call.id}
            for talk in (session, fork):
                done = talk.generate([result], tools=TOOLS, temperature=0, max_tokens=9)
                assert (done.text, done.history) == ("It rains.", "continued")
                ids = list(talk.get(include_token_ids=True).token_ids)
                assert ids[: len(before)] == before, "the tokens are what was generated"


def test_a_conversation_without_a_session_goes_on(client: mlxd.Client) -> None:
    question = {"role": "user", "content": "how is the weather"}
    first = client.chat([question], model=MODEL, tools=TOOLS, temperature=0)
    result = {"role": "tool", "content": "rain", "tool_call_id": first.tool_calls[0].id}
    messages = [question, first.message, result]
    done = client.chat(messages, model=MODEL, tools=TOOLS, temperature=0)
    assert done.text == "It rains."
    # All but the cue of the first answer is written again.
    assert done.cached_tokens > first.prompt_tokens - 3


def test_a_cancelled_call_leaves_the_session_as_it_was(wire: Wire) -> None:
    wire.create_session("c", MODEL)
    chat = pb.ChatInput(messages=[message("USER", "endless")])
    reasoning = pb.ReasoningOptions(enabled=True)
    stream = wire.stream("", session="c", chat=chat, reasoning=reasoning, max_tokens=2000)
    for event in stream:
        if event.HasField("delta"):
            break
    stream.cancel()
    wait_for(lambda: not wire.get_session("c").session.busy, "the session is free again")
    reply = wire.generate(
        "", session="c", chat=pb.ChatInput(messages=[message("USER", "rain")]), ignore_eos=False
    )
    assert reply.text == "It rains."
    held = wire.get_session("c", include_messages=True).messages
    assert [m.content[0].text for m in held] == ["rain", "It rains."]
    wire.delete_session("c")


def run(daemon: Daemon, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the CLI."""
    command = [str(binary()), *arguments, "--address", f"unix://{daemon.socket}"]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_cli_prints_calls(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    common = ["-m", MODEL, "--temperature", "0", "--tool", str(file)]
    done = run(daemon, "generate", *common, "--json", "the weather")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["reasoning"], answer["text"]) == ("The tool knows.", "I ask.")
    assert answer["tool_calls"][0]["arguments"] == {"city": "São Paulo"}
    assert (answer["finish_reason"], answer["usage"]["reasoning_tokens"]) == ("tool_calls", 4)
    shown = run(daemon, "generate", *common, "the weather").stdout.splitlines()
    assert (shown[0], json.loads(shown[1])["name"]) == ("I ask.", "weather")
    talk = run(
        daemon, "chat", *common, "--thinking", "on", "--reasoning-budget", "2", stdin="go on\n"
    )
    assert talk.returncode == 0, talk.stderr
    raw = run(daemon, "generate", *common, "--raw", "x")
    assert (raw.returncode, "--raw" in raw.stderr) == (2, True)


def test_capabilities_name_the_forms(client: mlxd.Client) -> None:
    described = client.capabilities(MODEL).models[0]
    assert (described.tool_format, described.reasoning_format) == ("hermes", "think")
    assert described.reasoning_switch == "enable_thinking"
