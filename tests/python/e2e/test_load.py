"""Many clients at once: no client's output depends on the others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, wait_for
from wire import Wire, refused, request

CLIENTS = 16
REQUESTS = 1000
VOCABULARY = 320
# Tokens that occur only in their owner's prompts.
SECRETS = {client: list(range(200 + 4 * client, 204 + 4 * client)) for client in range(CLIENTS)}


@pytest.fixture(scope="module")
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon with few slots and small steps, so that much is shared."""
    config = {"running_sequences_max": 12, "prefill_chunk_tokens": 64, "priority_ageing_s": 1}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A connection; nothing is held when the test ends."""
    with daemon.wire() as wire:
        yield wire
        wait_for(wire.at_rest, "everything was given back")


def ids(generator: random.Random, count: int) -> list[int]:
    """Returns random tokens, none of them a secret."""
    return [generator.randrange(5, 200) for _ in range(count)]


def read(call: Any) -> list[int]:
    """Reads the tokens of a stream."""
    return [token for event in call for token in event.delta.token_ids]


def test_greedy_output_is_the_same_whatever_joins_leaves_or_is_cancelled(wire: Wire) -> None:
    generator = random.Random(1)
    cases = [
        (ids(generator, generator.choice([1, 3, 30, 150, 700])), generator.randrange(1, 60))
        for _ in range(40)
    ]
    alone = [list(wire.generate("tiny", p, max_tokens=n).token_ids) for p, n in cases]
    order = generator.sample(range(len(cases)), len(cases))
    calls: list[tuple[int, Any]] = []
    for place in order:
        prompt, count = cases[place]
        calls.append((place, wire.stream("tiny", prompt, max_tokens=count, priority=place % 4)))
        disturbance = wire.stream("tiny", ids(generator, 200), max_tokens=500)
        if generator.random() < 0.5:
            next(disturbance)
        disturbance.cancel()
    for place, call in calls:
        assert read(call) == alone[place], f"case {place}"


def test_seeded_sampling_gives_the_same_tokens_alone_and_among_200(wire: Wire) -> None:
    generator = random.Random(2)
    filters: list[dict[str, Any]] = [
        {},
        {"top_p": 0.8},
        {"top_k": 20, "min_p": 0.01},
        {"top_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.02},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    ]
    cases = [
        (
            ids(generator, generator.randrange(1, 60)),
            {"temperature": 1.0, "seed": n, **filters[n % 5]},
        )
        for n in range(200)
    ]

    def run(case: tuple[list[int], dict[str, Any]]) -> list[int]:
        prompt, sampling = case
        return list(wire.generate("tiny", prompt, max_tokens=12, sampling=sampling).token_ids)

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(40) as threads:
        together = list(threads.map(run, cases))
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > 190, "seeds make a difference"


def test_no_secret_reaches_another_client_in_a_thousand_requests(
    daemon: Daemon, wire: Wire
) -> None:
    generator = random.Random(3)
    shared = ids(generator, 90)
    prompts = {
        client: [shared[: 30 * n] + SECRETS[client] + ids(generator, 5 + 9 * n) for n in range(4)]
        for client in range(CLIENTS)
    }
    alone = {
        client: [list(wire.generate("tiny", p, max_tokens=16).token_ids) for p in mine]
        for client, mine in prompts.items()
    }

    def client(number: int) -> int:
        mine = random.Random(100 + number)
        done = 0
        with daemon.wire() as own:
            for _ in range(REQUESTS // CLIENTS + 1):
                case = mine.randrange(4)
                call = own.stream("tiny", prompts[number][case], max_tokens=16)
                if mine.random() < 0.2:
                    next(call)
                    call.cancel()
                    continue
                tokens = read(call)
                assert tokens == alone[number][case], f"client {number}: tokens of another client"
                done += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as threads:
        done = sum(threads.map(client, range(CLIENTS)))
    assert done > REQUESTS / 2


# Each of these ends generation for every client of mlx_lm.server.
ODD: dict[str, tuple[dict[str, Any], str | None]] = {
    "an empty prompt": ({"ids": []}, "EMPTY_PROMPT"),
    "top_k of the vocabulary": ({"sampling": {"temperature": 1.0, "top_k": VOCABULARY}}, None),
    "top_k beyond it": ({"sampling": {"temperature": 1.0, "top_k": 1 << 31}}, None),
    "xtc_threshold above a half": ({"sampling": {"xtc_threshold": 0.6}}, "INVALID_FIELD"),
    "an empty stop string": ({"stop_strings": [""]}, "INVALID_FIELD"),
    "a bias beyond the vocabulary": ({"sampling": {"logit_bias": {1 << 20: 1.0}}}, "INVALID_FIELD"),
    "a token beyond it": ({"ids": [1 << 20]}, "INVALID_FIELD"),
    "a NaN bias": (
        {"sampling": {"logit_bias": {5: float("nan")}}},
        "INVALID_FIELD",
    ),
    "more than the context": ({"ids": [7] * 40_000}, "CONTEXT_OVERFLOW"),
    "everything forbidden": (
        {"sampling": {"logit_bias": dict.fromkeys(range(VOCABULARY), -1000.0)}},
        None,
    ),
}


def test_odd_requests_are_answered_and_eight_streams_run_on(wire: Wire) -> None:
    generator = random.Random(4)
    prompts = [ids(generator, 20) for _ in range(8)]
    alone = [list(wire.generate("tiny", p, max_tokens=400).token_ids) for p in prompts]
    streams = [wire.stream("tiny", p, max_tokens=400) for p in prompts]
    for stream in streams:
        assert next(stream).HasField("started")
    for name, (fields, reason) in ODD.items():
        fields = {"ids": prompts[0], "max_tokens": 3, **fields}
        call = request("tiny", fields.pop("ids"), **fields)
        if reason is None:
            answer = wire.inference.Generate(call, timeout=60)
            assert len(answer.token_ids) == 3, name
        else:
            with refused("INVALID_ARGUMENT", reason):
                wire.inference.Generate(call, timeout=60)
    # An exact cache hit, twice.
    for _ in range(2):
        assert list(wire.generate("tiny", prompts[1], max_tokens=9).token_ids) == alone[1][:9]
    for place, stream in enumerate(streams):
        assert read(stream) == alone[place], f"stream {place} was disturbed"


def test_a_caller_that_stops_reading_is_ended_and_gives_everything_back(tiny_root: Path) -> None:
    # Small windows, and logprobs to fill them: by default gRPC reads megabytes ahead.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with (
        Daemon([tiny_root], {"slow_reader_s": 5}, models=["tiny"]) as daemon,
        daemon.wire() as wire,
        daemon.wire(options=options) as slow,
    ):
        unread = slow.stream("tiny", [5, 6, 7], max_tokens=30_000, logprobs=20)
        assert next(unread).HasField("started")
        wait_for(lambda: wire.stats().stalled_sequences == 1, "its sequence pauses")
        assert len(wire.generate("tiny", [8, 9], max_tokens=20).token_ids) == 20
        wait_for(lambda: wire.stats().running_sequences == 0, "it was ended")
        with refused("ABORTED", "SLOW_READER"):
            read(unread)
        assert wire.at_rest()
