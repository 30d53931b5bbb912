"""Well-behaved callers beside every kind of bad one: none is refused, none gets other output."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from attackers import attacked, attackers
from daemon import Daemon
from wire import Wire

# What is at least done: rounds of the honest streams, and time in seconds that they go on.
ROUNDS, LOAD_S = 12, 60.0
STREAMS, TOKENS = 4, 160
GROWTH_BYTES_MAX = 300 << 20

# What callers may make the daemon keep for a while is part of what it may grow by.
CONFIG = {"memory_budget_bytes": 64 << 20, "sessions_bytes_max": 64 << 20}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The models of honest callers and attackers, all with a long context."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from checkpoints import Checkpoint, build

    long = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
    for seed, name in enumerate(("tiny", "other", "third"), 1):
        build(Checkpoint(name, long), tmp_path, seed)
    return tmp_path


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


def test_bad_neighbours_change_nothing_for_others(root: Path) -> None:
    with Daemon([root], CONFIG, models=["tiny"]) as daemon:
        wires = [daemon.wire() for _ in range(STREAMS)]
        quiet = listen_all(wires)
        assert not quiet.faults
        assert all(len(ids) == TOKENS for ids in quiet.outputs.values())
        has_memory = Path("/proc/self/status").exists()
        before = daemon.resident_bytes(peak=True) if has_memory else 0
        gaps: list[float] = []
        rounds = 0
        with attacked(daemon.socket) as attack:
            end = time.monotonic() + LOAD_S
            while rounds < ROUNDS or time.monotonic() < end:
                heard = listen_all(wires)
                assert not heard.faults, heard.faults
                assert heard.outputs == quiet.outputs
                gaps += heard.gaps
                rounds += 1
        grown = daemon.resident_bytes(peak=True) - before if has_memory else 0
        for wire in wires:
            wire.channel.close()
    print(
        f"\n{rounds} rounds; p95 gap quiet {percentile_ms(quiet.gaps, 95):.1f} ms, attacked"
        f" {percentile_ms(gaps, 95):.1f} ms, longest {1000 * max(gaps):.0f} ms;"
        f" memory +{grown >> 20} MiB; {attack.done}; {attack.refusals}"
    )
    assert not attack.faults, attack.faults
    assert not attack.wrong_refusals()
    assert all(attack.done[name] >= attacker.least for name, attacker in attackers().items())
    assert grown <= GROWTH_BYTES_MAX, f"{grown >> 20} MiB"
