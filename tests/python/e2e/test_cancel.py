"""A cancelled call costs nothing more: in decode, in prefill, in the queue, unary or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from daemon import Daemon, wait_for
from wire import Wire, failure, refused, request

# Half of a long prompt is thousands of launches: a client has seconds for its cancellation.
CHUNK = 4
LONG = 24_000
ENDLESS = 30_000


@pytest.fixture(scope="module")
def slow_daemon(tiny_root: Path) -> Iterator[Daemon]:
    """Small chunks make a long prefill of many launches; two sequences run at once."""
    config = {"prefill_chunk_tokens": CHUNK, "running_sequences_max": 2}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture
def wire(slow_daemon: Daemon) -> Iterator[Wire]:
    """A connection; nothing runs before and after the test."""
    with slow_daemon.wire() as wire:
        assert idle(wire)
        yield wire
        wait_for(lambda: idle(wire), "everything stopped")


def idle(wire: Wire) -> bool:
    """Tells whether nothing runs or waits."""
    stats = wire.stats()
    return stats.running_sequences == 0 and stats.queued_sequences == 0


def long_prompt() -> list[int]:
    """Returns a prompt of many chunks."""
    return [7 + n % 300 for n in range(LONG)]


def assert_at_rest(wire: Wire) -> Any:
    """Checks that nothing is launched anymore: only the probe's own steps are counted."""
    wait_for(lambda: idle(wire), "everything stopped")
    before = wire.stats()
    wire.generate("tiny", [5, 6, 7], max_tokens=2)
    after = wire.stats()
    assert after.steps_total - before.steps_total <= 3
    assert after.prefill_tokens_total - before.prefill_tokens_total <= 3
    return before


def test_cancelled_in_prefill_it_stops_before_the_next_launch(wire: Wire) -> None:
    start = wire.stats()
    call = wire.stream("tiny", long_prompt(), max_tokens=5)
    done = 0
    for event in call:
        if event.HasField("progress") and event.progress.done_tokens > 0:
            done = event.progress.done_tokens
            break
    assert 0 < done < LONG
    call.cancel()
    rest = assert_at_rest(wire)
    prefilled = rest.prefill_tokens_total - start.prefill_tokens_total
    assert prefilled < LONG / 2, "it went on"
    assert rest.steps_total - start.steps_total <= prefilled / CHUNK + 1
    assert rest.cancelled_total - start.cancelled_total == 1


def test_cancelled_in_decode_it_stops(wire: Wire) -> None:
    start = wire.stats()
    call = wire.stream("tiny", [5, 6, 7], max_tokens=ENDLESS)
    for event in call:
        if event.delta.token_ids:
            break
    call.cancel()
    rest = assert_at_rest(wire)
    assert rest.decode_tokens_total - start.decode_tokens_total < ENDLESS / 4


def test_a_cancelled_unary_call_stops_too(wire: Wire) -> None:
    start = wire.stats()
    call = wire.inference.Generate.future(request("tiny", long_prompt(), max_tokens=5))
    wait_for(lambda: wire.stats().prefill_tokens_total > start.prefill_tokens_total, "prefill")
    call.cancel()
    rest = assert_at_rest(wire)
    assert rest.prefill_tokens_total - start.prefill_tokens_total < LONG / 2


def test_cancelled_in_the_queue_it_never_runs(wire: Wire) -> None:
    running = [wire.stream("tiny", [5, 6, 7], max_tokens=ENDLESS) for _ in range(2)]
    for call in running:
        assert next(call).HasField("started")
    waiting = wire.inference.Generate.future(request("tiny", long_prompt(), max_tokens=5))
    wait_for(lambda: wire.stats().queued_sequences == 1, "it waits")
    before = wire.stats()
    waiting.cancel()
    wait_for(lambda: wire.stats().queued_sequences == 0, "it left the queue")
    for call in running:
        call.cancel()
    rest = assert_at_rest(wire)
    assert rest.prefill_tokens_total == before.prefill_tokens_total


def test_a_deadline_ends_the_call_and_its_work(wire: Wire) -> None:
    start = wire.stats()
    with pytest.raises(grpc.RpcError) as raised:
        wire.inference.Generate(request("tiny", [5, 6, 7], max_tokens=ENDLESS), timeout=1.5)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    rest = assert_at_rest(wire)
    assert rest.cancelled_total - start.cancelled_total == 1


GONE = """
import sys
from wire import Wire
call = Wire(sys.argv[1]).stream("tiny", [7 + n % 300 for n in range(int(sys.argv[2]))],
                                max_tokens=30000)
for event in call:
    print(event.WhichOneof("event"), flush=True)
"""


@pytest.mark.parametrize(
    ("tokens", "until"), [(LONG, "progress"), (8, "delta")], ids=["prefill", "decode"]
)
def test_a_killed_client_costs_nothing_more(
    slow_daemon: Daemon, wire: Wire, tokens: int, until: str
) -> None:
    start = wire.stats()
    client = subprocess.Popen(
        [sys.executable, "-c", GONE, slow_daemon.target, str(tokens)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        text=True,
    )
    assert client.stdout is not None
    for line in client.stdout:
        if line.strip() == until:
            break
    else:
        raise AssertionError(f"no {until} event")
    client.kill()
    client.wait()
    rest = assert_at_rest(wire)
    assert rest.prefill_tokens_total - start.prefill_tokens_total < LONG / 2
    assert rest.decode_tokens_total - start.decode_tokens_total < ENDLESS / 4


def test_others_go_on_when_one_is_cancelled(wire: Wire) -> None:
    alone = wire.generate("tiny", [5, 6, 7], max_tokens=100)
    other = wire.stream("tiny", long_prompt(), max_tokens=5)
    assert next(other).HasField("started")
    stream = wire.stream("tiny", [5, 6, 7], max_tokens=100)
    ids = []
    for event in stream:
        ids += event.delta.token_ids
        if len(ids) > 10:
            other.cancel()
    assert ids == list(alone.token_ids)


def test_a_full_queue_is_refused_with_the_limit(tiny_root: Path) -> None:
    config = {"running_sequences_max": 1, "queue_length_max": 1}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon, daemon.wire() as wire:
        running = wire.stream("tiny", [5], max_tokens=ENDLESS)
        assert next(running).HasField("started")
        waiting = wire.inference.Generate.future(request("tiny", [5], max_tokens=1))
        wait_for(lambda: wire.stats().queued_sequences == 1, "one waits")
        with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL") as refusal:
            wire.generate("tiny", [5], max_tokens=1)
        assert refusal.failure.has_retry_info
        assert refusal.failure.metadata["limit"] == "queue_length_max"
        running.cancel()
        assert waiting.result(60).usage.completion_tokens == 1


def test_a_deadline_before_the_first_token_is_refused_at_once(wire: Wire) -> None:
    half = wire.generate("tiny", long_prompt()[: LONG // 2], max_tokens=1)
    # The whole prompt takes 16 times as long on this machine; the daemon's estimate has a margin.
    deadline_s = half.timings.time_to_first_token.ToMilliseconds() / 8000
    before = wire.stats()
    prompts = ([n % 300 + first for n in range(LONG)] for first in range(8, 20))

    def refusal() -> Any:
        # On a busy machine the deadline may pass before the refusal arrives, without a reason.
        call = request("tiny", next(prompts), max_tokens=5)
        with pytest.raises(grpc.RpcError) as raised:
            wire.inference.Generate(call, timeout=deadline_s)
        found = failure(raised.value)
        assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
        return found if found.reason else None

    found = wait_for(refusal, "a refusal")
    assert found.reason == "DEADLINE_UNMEETABLE"
    assert {"needed_ms", "available_ms"} <= set(found.metadata)
    assert wire.stats().refused_total > before.refused_total
