"""Well-behaved callers beside every kind of bad one: none is refused, none gets other output."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from attackers import attacked
from daemon import Daemon
from wire import Wire

STREAMS = 4
ATTACKS = 8
TOKENS = 160
GROWTH_BYTES_MAX = 300 << 20


@pytest.fixture(scope="module")
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon of its own: its memory is looked at."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


@dataclass
class Round:
    """What the streams of one round got."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def listen(wire: Wire, at: int, heard: Round) -> None:
    """Runs one stream to its end."""
    ids, last = [], None
    try:
        for event in wire.stream("tiny", [11 + at, 12, 13, 14], max_tokens=TOKENS):
            if event.HasField("delta"):
                now = time.monotonic()
                heard.gaps += [now - last] if last is not None else []
                last = now
                ids += event.delta.token_ids
    except Exception as error:
        heard.faults.append(repr(error))
    heard.outputs[at] = ids


def listen_all(wires: list[Wire]) -> Round:
    """Runs all streams to their end, at the same time."""
    heard = Round()
    threads = [
        threading.Thread(target=listen, args=(wire, at, heard)) for at, wire in enumerate(wires)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def percentile_ms(gaps: list[float], percent: int) -> float:
    """Returns a percentile of gaps, in milliseconds."""
    return 1000 * sorted(gaps)[min(len(gaps) - 1, len(gaps) * percent // 100)]


def test_bad_neighbours_change_nothing_for_others(daemon: Daemon) -> None:
    wires = [daemon.wire() for _ in range(STREAMS)]
    quiet = listen_all(wires)
    assert not quiet.faults
    assert all(len(ids) == TOKENS for ids in quiet.outputs.values())
    has_memory = Path("/proc/self/statm").exists()
    before = peak = daemon.resident_bytes() if has_memory else 0
    gaps: list[float] = []
    rounds = 0
    with attacked(daemon.socket) as attack:
        while attack.is_on or rounds == 0:
            heard = listen_all(wires)
            assert not heard.faults, heard.faults
            assert heard.outputs == quiet.outputs
            gaps += heard.gaps
            rounds += 1
            if has_memory:
                peak = max(peak, daemon.resident_bytes())
    for wire in wires:
        wire.channel.close()
    print(
        f"\n{rounds} rounds; p95 gap quiet {percentile_ms(quiet.gaps, 95):.1f} ms,"
        f" attacked {percentile_ms(gaps, 95):.1f} ms, longest {1000 * max(gaps):.0f} ms;"
        f" memory +{(peak - before) >> 20} MiB; {attack.done}; {attack.refusals}"
    )
    assert not attack.faults, attack.faults
    assert len(attack.done) == ATTACKS
    assert peak - before <= GROWTH_BYTES_MAX, f"{(peak - before) >> 20} MiB"
