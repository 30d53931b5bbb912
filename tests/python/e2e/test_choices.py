"""Several outputs of one prompt, continued messages, and samplers: each as it is alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, wait_for
from mlxd.v1 import inference_pb2 as inference
from wire import CALL_S, Wire, chat, refused

PROMPT = list(range(60, 160))
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2, "typical_p": 0.5},
    {"temperature": 1.2, "seed": 3, "typical_p": 0.9, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "seed": 4, "dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"temperature": 0.0, "dry_multiplier": 5.0, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 5, "xtc_probability": 0.5, "presence_penalty": 0.5},
]


@pytest.fixture(scope="module")
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon with few places, so that choices wait for each other."""
    config = {"running_sequences_max": 6, "prefill_chunk_tokens": 64}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A connection; nothing is held when the test ends."""
    with daemon.wire() as wire:
        yield wire
        wait_for(wire.at_rest, "everything was given back")


def alone(
    wire: Wire, sampling: dict[str, Any], index: int, prompt: list[int] = PROMPT
) -> list[int]:
    """Returns the output of a request by itself whose seed is that of a choice."""
    seeded = {**sampling, "seed": sampling.get("seed", 0) + index}
    cache = inference.CacheOptions(off=True)
    reply = wire.generate("tiny", prompt, max_tokens=24, sampling=seeded, cache=cache)
    return list(reply.token_ids)


@pytest.mark.parametrize("cache", [False, True], ids=["off", "cached"])
def test_each_choice_is_what_its_seed_gives_alone(wire: Wire, cache: bool) -> None:
    sampling = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    prompt = [*PROMPT, 5 + cache]
    options = inference.CacheOptions(off=not cache)
    before = wire.stats().prefill_tokens_total
    reply = wire.generate("tiny", prompt, max_tokens=24, sampling=sampling, n=8, cache=options)
    computed = wire.stats().prefill_tokens_total - before
    assert computed == len(prompt), "the prompt is computed once"
    outputs = [list(choice.token_ids) for choice in reply.choices]
    assert outputs == [alone(wire, sampling, index, prompt) for index in range(8)]
    assert len({tuple(output) for output in outputs}) == 8
    assert list(reply.token_ids) == outputs[0]
    assert reply.usage.completion_tokens == 8 * 24
    assert [choice.seed for choice in reply.choices] == list(range(11, 19))


def test_streamed_choices_are_those_of_the_whole_answer(wire: Wire) -> None:
    sampling = {"temperature": 1.0, "seed": 21}
    whole = wire.generate("tiny", PROMPT, max_tokens=24, sampling=sampling, n=4)
    outputs: dict[int, list[int]] = {}
    ended = []
    events = list(wire.stream("tiny", PROMPT, max_tokens=24, sampling=sampling, n=4))
    for event in events[:-1]:
        if event.HasField("delta"):
            outputs.setdefault(event.delta.choice, []).extend(event.delta.token_ids)
        if event.HasField("choice_finished"):
            ended.append(event.choice_finished.choice)
    assert events[-1].HasField("finished")
    assert sorted(ended) == [0, 1, 2, 3]
    assert outputs == {choice.choice: list(choice.token_ids) for choice in whole.choices}


def test_the_best_of_many_are_known_by_their_logprobs(wire: Wire) -> None:
    sampling = {"temperature": 1.5, "seed": 31}
    every = wire.generate("tiny", PROMPT, max_tokens=12, sampling=sampling, n=6, logprobs=0)
    means = {}
    for choice in every.choices:
        mean = sum(token.chosen.logprob for token in choice.logprobs) / len(choice.logprobs)
        assert choice.mean_logprob == pytest.approx(mean, abs=1e-5)
        means[choice.seed] = mean
    best = wire.generate("tiny", PROMPT, max_tokens=12, sampling=sampling, n=2, best_of=6)
    order = sorted(means, key=lambda seed: -means[seed])
    assert [choice.seed for choice in best.choices] == order[:2]
    texts = {choice.seed: list(choice.token_ids) for choice in every.choices}
    assert [list(choice.token_ids) for choice in best.choices] == [texts[s] for s in order[:2]]
    assert best.usage.completion_tokens == 6 * 12


def test_a_prompt_of_as_many_tokens_as_choices_is_not_taken_for_rows_of_its_own(wire: Wire) -> None:
    sampling = {"temperature": 1.0, "seed": 17}
    for length in range(2, 6):
        prompt = PROMPT[:length]
        reply = wire.generate("tiny", prompt, max_tokens=24, sampling=sampling, n=length)
        expected = [alone(wire, sampling, index, prompt) for index in range(length)]
        assert [list(choice.token_ids) for choice in reply.choices] == expected


def test_all_kinds_of_requests_together_are_each_as_alone(wire: Wire) -> None:
    generator = random.Random(5)
    cases = [
        (
            [generator.randrange(5, 300) for _ in range(generator.choice([3, 40, 120]))],
            SAMPLING[place % len(SAMPLING)],
            1 + place % 3,
        )
        for place in range(28)
    ]

    def run(case: tuple[list[int], dict[str, Any], int]) -> list[list[int]]:
        prompt, sampling, n = case
        reply = wire.generate("tiny", prompt, max_tokens=24, sampling=sampling, n=n)
        choices = reply.choices or [reply]
        return [list(choice.token_ids) for choice in choices]

    expected = [
        [alone(wire, sampling, index, prompt) for index in range(n)]
        for prompt, sampling, n in cases
    ]
    with ThreadPoolExecutor(14) as threads:
        together = list(threads.map(run, cases))
    assert together == expected


def test_a_cancelled_call_stops_all_its_choices(wire: Wire) -> None:
    call = wire.stream("tiny", PROMPT, max_tokens=20_000, sampling={"temperature": 1.0}, n=5)
    seen: set[int] = set()
    while len(seen) < 5:
        event = next(call)
        if event.HasField("delta"):
            seen.add(event.delta.choice)
    call.cancel()
    wait_for(wire.at_rest, "all choices were stopped")


def test_what_cannot_have_choices_is_refused(wire: Wire) -> None:
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "n"):
        wire.generate("tiny", PROMPT, n=17)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "best_of"):
        wire.generate("tiny", PROMPT, n=3, best_of=2)


def test_a_continued_message_and_its_score(wire: Wire) -> None:
    conversation = chat("Say it.", "Once ")
    conversation.continue_final_message = True
    count = inference.CountTokensRequest(model="tiny", chat=conversation, return_token_ids=True)
    tokens = wire.inference.CountTokens(count, timeout=CALL_S).token_ids
    reply = wire.generate("tiny", chat=conversation, max_tokens=8)
    same = wire.generate("tiny", list(tokens), max_tokens=8)
    assert list(reply.token_ids) == list(same.token_ids)
    scored = wire.inference.Score(
        inference.ScoreRequest(model="tiny", chat=conversation), timeout=CALL_S
    )
    assert [score.token.token_id for score in scored.tokens] == list(tokens)
