"""Lets a model call a tool, gives it the result and reads its answer, 20 times in three ways.

By hand, because it needs a model that can, of which the tests have none:

    mlxd serve --socket /tmp/s --model-root FOLDER --model NAME
    MLXD_BIN=… python tests/python/support/tool_rounds.py unix:///tmp/s NAME

The ways are AbstractLLM's Session, whose loop runs the tool, the Python client, and the command
line in a session, where the result is the next message. The call is demanded (`tool_choice`
required), the answer is free. Needs abstractllm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlxd

ROUNDS = 20
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 100}
CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the weather of a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "name of the city"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Round:
    """What happened: the question's city, the calls' arguments, the answer."""

    city: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    result: str = ""
    answer: str = ""
    ended: str = ""

    def weather(self) -> str:
        """Returns the tool's result for the round's city."""
        celsius = 11 + CITIES.index(self.city)
        self.result = json.dumps({"city": self.city, "celsius": celsius, "sky": "cloudy"})
        return self.result

    @property
    def question(self) -> str:
        """What is asked."""
        return f"What is the weather in {self.city} now?"

    @property
    def is_called(self) -> bool:
        """Tells whether there was one call, for the city that is asked for."""
        return [str(call.get("city")).casefold() for call in self.calls] == [self.city.casefold()]

    @property
    def is_answered(self) -> bool:
        """Tells whether the answer ended by itself, is a text, and has the result's number."""
        celsius = str(json.loads(self.result or '{"celsius": "?"}')["celsius"])
        clean = self.answer.strip() and "tool_call" not in self.answer
        return self.ended == "stop" and bool(clean) and celsius in self.answer


def through_client(address: str, model: str, seed: int) -> Round:
    """The Python client: the call, its result as a message of role tool, the answer."""
    one = Round(CITIES[seed % len(CITIES)])
    with mlxd.Client(address) as client:
        asked: list[Any] = [{"role": "user", "content": one.question}]
        options: dict[str, Any] = {"model": model, "tools": [WEATHER], "seed": seed, **SAMPLING}
        done = client.chat(asked, tool_choice="required", parallel_tool_calls=False, **options)
        one.calls = [dict(call.arguments) for call in done.tool_calls]
        for call in done.tool_calls:
            result = {"role": "tool", "content": one.weather(), "tool_call_id": call.id}
            asked += [done.message, result]
        done = client.chat(asked, tool_choice="none", **options)
        one.answer, one.ended = done.text, done.finish_reason
    return one


def through_session(address: str, model: str, seed: int) -> Round:
    """AbstractLLM's Session: its loop runs the tool and asks again with the same options.

    So the tool itself ends the demand for calls.
    """
    from abstractllm import create_llm
    from abstractllm.session import Session

    import mlxd.abstractllm  # noqa: F401

    one = Round(CITIES[seed % len(CITIES)])
    llm = create_llm("mlxd", base_url=address, model=model, seed=seed, **SAMPLING)
    llm.config_manager.update_config({"tool_choice": "required"})

    def get_weather(city: str) -> str:
        """Returns the weather of a city now.

        Args:
            city: name of the city
        """
        one.calls.append({"city": city})
        llm.config_manager.update_config({"tool_choice": "none"})
        return one.weather()

    session = Session(provider=llm, tools=[get_weather])
    done = session.generate(one.question)
    one.answer, one.ended = str(done.content), str(done.finish_reason)
    return one


def through_command(address: str, model: str, seed: int) -> Round:
    """The command line in a session: what comes back goes in as the next message."""
    one = Round(CITIES[seed % len(CITIES)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weather.json"
        file.write_text(json.dumps(WEATHER))
        command = [os.environ["MLXD_BIN"], "generate", "--address", address, "--model", model]
        command += ["--session", f"rounds/{seed}", "--seed", str(seed), "--json", "--no-stdin"]
        command += ["--tool", str(file)]
        for name, value in SAMPLING.items():
            command += [f"--{name.replace('_', '-')}", str(value)]

        def run(choice: str, text: str) -> Any:
            asked = [*command, "--tool-choice", choice, text]
            done = subprocess.run(asked, capture_output=True, check=False, text=True)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        one.calls = [call["arguments"] for call in run("required", one.question)["tool_calls"]][:1]
        done = run("none", f"The tool returned {one.weather()}. Tell me in one sentence.")
        one.answer, one.ended = done["text"], done["finish_reason"]
    with mlxd.Client(address) as client, suppress(mlxd.MlxdError):
        client.delete_session(f"rounds/{seed}")
    return one


WAYS: dict[str, Callable[[str, str, int], Round]] = {
    "AbstractLLM": through_session,
    "Python client": through_client,
    "command line": through_command,
}


def main() -> None:
    """Runs the rounds and prints what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--way", choices=WAYS, action="append")
    options = parser.parse_args()
    # Session keeps files of its own in the working folder.
    os.chdir(tempfile.mkdtemp())
    for way in options.way or WAYS:
        rounds = [WAYS[way](options.address, options.model, n) for n in range(options.rounds)]
        called = sum(one.is_called for one in rounds)
        answered = sum(one.is_called and one.is_answered for one in rounds)
        print(f"{way}: of {len(rounds)} {called} called, {answered} of these answered", flush=True)
        odd = [one for one in rounds if not (one.is_called and one.is_answered)]
        for one in rounds[:1] + odd:
            print(f"  {one}", flush=True)


if __name__ == "__main__":
    main()
