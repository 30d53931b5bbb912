"""Number 7 of `neighbours`: the gaps of streams while something else goes on beside them.

Windows with and without it alternate, so that what else the machine does meets both. Attackers of
the load test take only what processors are idle (`attacker.py`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from attackers import LOADED, OTHER, OWN
from mlxd.v1 import inference_pb2
from peers import HERE, Mlxd
from stats import medians, percentile
from streams import Heard, Prompts, while_they_run

Stream = tuple[Heard, asyncio.Task[Any]]

PROMPT = 64
# The streams must outlast their windows: more than one gets in a second, and the time that an
# attacker takes to begin and to end.
TOKENS_PER_S, ATTACKER_S = 200, 2.0


@dataclass(frozen=True)
class Scene:
    """What goes on beside streams of one connection."""

    streams: int
    # The kind of attacker, and its model.
    kind: str
    model: str
    # The most that the streams' p95 gap may be, as times the quiet median.
    bound: float = 3.0
    priority: inference_pb2.Priority = inference_pb2.PRIORITY_NORMAL


# Attackers of the load test that make the most of one connection: many rows, or long prompts.
WORST = ("invented_names", "parked_caches", "interactive_prompt", "large_requests")

SCENES: dict[str, Scene] = {
    "its model prefills": Scene(1, "prefill", OWN),
    "another model prefills": Scene(1, "prefill", OTHER),
    "another model loads": Scene(1, "load", LOADED, 2.0),
    "64 ask whether one fits": Scene(1, "fits", LOADED),
    "hostile forms of answers": Scene(8, "forms", OWN, 1.5),
    **{f"{name} of the load test": Scene(4, name, OWN) for name in WORST},
    # Nineteen connections share with that of the streams, which are four of the rows.
    "every attacker of the load test": Scene(4, "all", OWN),
    "every attacker beside interactive streams": Scene(
        4, "all", OWN, priority=inference_pb2.PRIORITY_INTERACTIVE
    ),
}


@contextmanager
def daemon_of_three(model: Path, root: Path) -> Iterator[Mlxd]:
    """A daemon with the model under three names, two of them resident."""
    for name in (OWN, OTHER, LOADED):
        shutil.copytree(model, root / name)
    contestant = Mlxd(root / OWN, more=[OTHER])
    try:
        yield contestant
    finally:
        contestant.stop()


class Beside:
    """Streams, and who attacks them."""

    def __init__(self, contestant: Mlxd, folder: Path, prompts: Prompts, seconds: float) -> None:
        self.contestant = contestant
        self.folder = folder
        self.prompts = prompts
        self.seconds = seconds

    async def scene(self, scene: Scene, rounds: int) -> dict[str, float]:
        """Measures one scene: medians over the rounds of each window's numbers."""
        now = asyncio.get_running_loop().time
        answer = round(TOKENS_PER_S * rounds * (2 * self.seconds + ATTACKER_S))
        streams = []
        for ask in self.prompts.asks(scene.streams, PROMPT, answer):
            heard, request = Heard(now()), self.contestant.request(ask)
            request.priority = scene.priority
            stream = self.contestant.stream(request, ask.client, heard)
            streams.append((heard, asyncio.create_task(stream)))
        tasks = [task for _, task in streams]
        await while_they_run(tasks, lambda: not all(heard.times for heard, _ in streams))
        quiet, busy, rates = [], [], []
        try:
            for _ in range(rounds):
                quiet.append(await self.window(streams))
                gaps, done = await self.attacked(scene.kind, scene.model, streams)
                busy.append(gaps)
                rates.append(done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        pairs = list(zip(quiet, busy, strict=True))
        return {
            "gap_p50_quiet_ms": median(median(gaps) for gaps in quiet) * 1e3,
            "gap_p95_quiet_ms": median(percentile(gaps, 95) for gaps in quiet) * 1e3,
            "gap_p50_ms": median(median(gaps) for gaps in busy) * 1e3,
            "gap_p95_ms": median(percentile(gaps, 95) for gaps in busy) * 1e3,
            "gap_max_ms": max(max(gaps) for gaps in busy) * 1e3,
            "times_p50": median(median(b) / median(q) for q, b in pairs),
            "times": median(percentile(b, 95) / median(q) for q, b in pairs),
            "times_p95": median(percentile(b, 95) / percentile(q, 95) for q, b in pairs),
            **medians(rates, list(rates[0])),
        }

    async def window(self, streams: list[Stream]) -> list[float]:
        """The gaps of the next seconds."""
        start = asyncio.get_running_loop().time()
        await asyncio.sleep(self.seconds)
        end = asyncio.get_running_loop().time()
        tokens = [len(heard.times) for heard, _ in streams]
        # A gap that lasts longer than the window counts too.
        await while_they_run(
            [task for _, task in streams],
            lambda: any(
                len(heard.times) == n for (heard, _), n in zip(streams, tokens, strict=True)
            ),
        )
        return [gap for heard, _ in streams for gap in heard.gaps(start, end)]

    async def attacked(
        self, kind: str, model: str, streams: list[Stream]
    ) -> tuple[list[float], dict[str, float]]:
        """The same, with an attacker; and what that one got done, by the second."""
        arguments = [kind, self.contestant.daemon.target, model, str(self.folder)]
        attacker = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "attacker.py"),
            *arguments,
            str(self.prompts.random.randrange(2**32)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=dict(os.environ),
        )
        assert attacker.stdout is not None
        assert await attacker.stdout.readline() == b"begun\n", "the attacker did not begin"
        before = await asyncio.to_thread(self.counted)
        gaps = await self.window(streams)
        after = await asyncio.to_thread(self.counted)
        assert attacker.returncode is None, "the attacker ended"
        attacker.terminate()
        lines = await attacker.stdout.read()
        await attacker.wait()
        # What it had asked for ends with its connection.
        await asyncio.sleep(0.5)
        passed = after.pop("uptime_s") - before.pop("uptime_s")
        rates = {f"{what}_per_s": (after[what] - before[what]) / passed for what in before}
        return gaps, rates | {"repeats_per_s": lines.count(b"again") / self.seconds}

    def counted(self) -> dict[str, float]:
        """What the daemon counts of what it was asked for, and when."""
        with self.contestant.daemon.wire() as wire:
            stats = wire.stats()
        return {
            "uptime_s": stats.uptime.ToNanoseconds() / 1e9,
            "requests": float(stats.requests_total + stats.refused_total),
            "prefilled": float(stats.prefill_tokens_total),
        }
