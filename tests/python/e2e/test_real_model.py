"""The default model: a well-known answer, alone, in a batch, and turn by turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daemon import Daemon
from wire import Wire, chat

pytestmark = pytest.mark.real

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]
PROMPT_TOKENS = 37


@pytest.fixture(scope="module")
def served(real_daemon: tuple[Daemon, str]) -> Iterator[tuple[Wire, str]]:
    """A connection and the model's name."""
    daemon, name = real_daemon
    with daemon.wire() as wire:
        yield wire, name


def test_it_knows_the_capital_of_france(served: tuple[Wire, str]) -> None:
    wire, name = served
    reply = wire.generate(name, chat=chat(QUESTION), ignore_eos=False, max_tokens=30)
    assert reply.text == ANSWER
    assert list(reply.token_ids) == ANSWER_IDS
    assert reply.usage.prompt_tokens == PROMPT_TOKENS


def test_it_knows_the_capital_in_a_batch(served: tuple[Wire, str]) -> None:
    wire, name = served
    others = [
        wire.stream(name, chat=chat(f"Tell me a story about {n} ships."), max_tokens=200)
        for n in range(7)
    ]
    for other in others:
        assert next(other).HasField("started")
    reply = wire.generate(name, chat=chat(QUESTION), ignore_eos=False, max_tokens=30)
    for other in others:
        other.cancel()
    assert list(reply.token_ids) == ANSWER_IDS


def test_a_second_turn_prefills_only_its_new_tokens(served: tuple[Wire, str]) -> None:
    wire, name = served
    wire.create_session("france", name)
    options = {"session": "france", "ignore_eos": False, "max_tokens": 30}
    first = wire.generate("", chat=chat(QUESTION), **options)
    second = wire.generate("", chat=chat("And of Italy?"), **options)
    assert second.usage.cached_tokens >= first.session_token_count - 1
    whole = wire.generate(
        name, chat=chat(QUESTION, first.text, "And of Italy?"), ignore_eos=False, max_tokens=30
    )
    assert list(second.token_ids) == list(whole.token_ids)
    assert second.usage.prompt_tokens == whole.usage.prompt_tokens
    wire.delete_session("france")


def test_the_same_seed_gives_the_same_story_alone_and_in_a_batch(served: tuple[Wire, str]) -> None:
    wire, name = served
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 42}
    options = {"chat": chat("Tell me a story."), "max_tokens": 24, "sampling": sampling}
    alone = wire.generate(name, **options)
    other = wire.stream(name, chat=chat("Count to a hundred."), max_tokens=200)
    assert next(other).HasField("started")
    among = wire.generate(name, **options)
    other.cancel()
    assert among.text == alone.text
