"""Cached KV that several share: what it holds, and that each goes on as if it were alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon import Daemon
from wire import Wire

FORKS = 8
PREFIX = [(7 * place) % 300 + 20 for place in range(1000)]
# What each fork goes on with, and the tokens of its answer.
NEW, ANSWER = 20, 30


def own(number: int, count: int = NEW) -> list[int]:
    """Tokens of one fork."""
    return [(number * 37 + 11 * place) % 300 + 20 for place in range(count)]


@pytest.fixture(scope="module")
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon that has cached nothing."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def cold(tiny_root: Path) -> Iterator[Wire]:
    """A daemon that caches nothing."""
    settings = {"kv_idle_bytes_max": 1}
    with Daemon([tiny_root], settings, models=["tiny"]) as daemon, daemon.wire() as wire:
        yield wire


def bytes_of(wire: Wire, tokens: int) -> int:
    """The bytes of these tokens in a KV cache of `tiny`."""
    (model,) = [model for model in wire.load("tiny") if model.HasField("loaded")]
    return tokens * model.loaded.model.kv_bytes_per_token


def test_eight_forks_hold_their_prefix_once_and_answer_as_eight_cold_runs(
    daemon: Daemon, cold: Wire
) -> None:
    first = f"test/{uuid.uuid4().hex}"
    with daemon.wire() as wire:
        wire.create_session(first, "tiny")
        answer = wire.generate("", PREFIX, session=first, max_tokens=1)
        context = PREFIX + list(answer.token_ids)
        names = [f"{first}/{number}" for number in range(FORKS)]
        for name in names:
            wire.fork_session(first, name)

        def go_on(number: int) -> tuple[list[int], int]:
            with daemon.wire() as own_wire:
                done = own_wire.generate("", own(number), session=names[number], max_tokens=ANSWER)
                return list(done.token_ids), done.usage.cached_tokens

        with ThreadPoolExecutor(FORKS) as pool:
            heard = list(pool.map(go_on, range(FORKS)))
        held = wire.stats().memory.kv_idle_bytes
        most = 1.1 * bytes_of(wire, len(context) + FORKS * (NEW + ANSWER))
    # One that begins when another has ended has the session's last token from it as well.
    assert {cached for _, cached in heard} <= {len(PREFIX), len(context)}
    assert held <= most
    for number, (ids, _) in enumerate(heard):
        alone = cold.generate("tiny", context + own(number), max_tokens=ANSWER)
        assert alone.usage.cached_tokens == 0
        assert ids == list(alone.token_ids), f"fork {number}"


def test_an_edited_history_shares_what_stands_before_the_edit(daemon: Daemon, cold: Wire) -> None:
    with daemon.wire() as wire:
        before = wire.stats().memory.kv_idle_bytes
        start = own(50, 600)
        for number in range(4):
            ids = start[:400] + own(number, 200) if number else start
            done = wire.generate("tiny", ids, max_tokens=8)
            assert done.usage.cached_tokens >= (400 if number else 0)
            alone = cold.generate("tiny", ids, max_tokens=8)
            assert list(done.token_ids) == list(alone.token_ids)
        held = wire.stats().memory.kv_idle_bytes - before
        assert held <= 1.1 * bytes_of(wire, 400 + 4 * (200 + 8))
