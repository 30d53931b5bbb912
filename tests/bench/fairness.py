"""Number 6: three clients that keep 1, 4 and 16 requests outstanding, with room for 6 sequences.

    tests/bench/run.sh fairness [--seconds 20] [--rounds 3] [--check]

Max-min by client: the first gets all that one request can use, the others share the rest evenly.
The model is a random llama of 27M parameters, whose steps take long compared with a call's cost.
Idle capacity shows in the running sequences and in the tokens/s against one client with 21
requests. mlx_lm.server, with --decode-concurrency 6, does not distinguish clients, as its numbers
show.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from checkpoints import Checkpoint, build
from dense import dense
from mlxd.v1 import server_pb2, server_pb2_grpc
from peers import OURS, SERVER, Contestant, Mlxd, Server, blas_library
from stats import Report, markdown, parser, percentile, run
from streams import Heard, Prompts

ROOM = 6
OUTSTANDING = {"one": 1, "four": 4, "sixteen": 16}
CONTROL = {"all": sum(OUTSTANDING.values())}
PROMPT, ANSWER = 16, (8, 32)
STEP_APART_S = 0.002
SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclass
class Load:
    """Clients that keep requests outstanding, and their answers within the window."""

    contestant: Contestant
    prompts: Prompts
    random: random.Random
    heard: dict[str, list[Heard]] = field(default_factory=dict)
    start: float = 0.0
    end: float = float("inf")
    ends: list[float] = field(default_factory=list)

    async def run(self, outstanding: Mapping[str, int], seconds: float) -> dict[str, Any]:
        """Runs until the end of the window; returns its numbers."""
        now = asyncio.get_running_loop().time
        self.heard = {client: [] for client in outstanding}
        self.ends = []
        tasks = [
            asyncio.create_task(self._keep(client))
            for client, count in outstanding.items()
            for _ in range(count)
        ]
        # The start, when all send requests at once, is not measured.
        await asyncio.sleep(seconds / 4)
        self.start = now()
        steps, running = await self._watch(seconds)
        self.end = now()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return self._numbers(steps, running)

    async def _keep(self, client: str) -> None:
        while True:
            ask = self.prompts.ask(PROMPT, self.random.randint(*ANSWER), client)
            heard = Heard(asyncio.get_running_loop().time())
            self.heard[client].append(heard)
            await self.contestant.hear(ask, heard)

    async def _watch(self, seconds: float) -> tuple[int, list[int]]:
        """Waits; returns the daemon's steps meanwhile and samples of its running sequences."""
        if not isinstance(self.contestant, Mlxd):
            await asyncio.sleep(seconds)
            return 0, []
        stub = server_pb2_grpc.ServerServiceStub(self.contestant.channel)
        first = await stub.GetStats(server_pb2.GetStatsRequest())
        running = []
        for _ in range(int(seconds / 0.1)):
            await asyncio.sleep(0.1)
            last = await stub.GetStats(server_pb2.GetStatsRequest())
            running.append(last.running_sequences)
        return last.steps_total - first.steps_total, running

    def _numbers(self, steps: int, running: list[int]) -> dict[str, Any]:
        window = self.end - self.start
        ended = {
            client: [one for one in heard if self._in_window(one)]
            for client, heard in self.heard.items()
        }
        return {
            "tokens_per_s": {c: self._tokens(heard) / window for c, heard in self.heard.items()},
            "ttft_p95_s": {c: percentile([h.ttft for h in e], 95) for c, e in ended.items()},
            "queue_s": {c: [h.queue_s for h in e if h.queue_s] for c, e in ended.items()},
            "queue_steps": {c: [self._steps(h) for h in e if h.queue_s] for c, e in ended.items()},
            "step_s": window / steps if steps else 0.0,
            "running_mean": fmean(running) if running else 0.0,
        }

    def _steps(self, one: Heard) -> int:
        """The steps that ended while it waited: their tokens came to those with many requests.

        Tokens of one step come within a millisecond or two, steps end five or more apart.
        """
        if not self.ends:
            heard = [h for client, all_ in self.heard.items() if client != "one" for h in all_]
            times = sorted(at for h in heard for at in h.times)
            self.ends = [b for a, b in pairwise([0.0, *times]) if b - a > STEP_APART_S]
        return sum(one.asked < end <= one.asked + one.queue_s for end in self.ends)

    def _in_window(self, heard: Heard) -> bool:
        return bool(heard.times) and self.start <= heard.asked and heard.times[0] < self.end

    def _tokens(self, heard: list[Heard]) -> int:
        return sum(
            count
            for one in heard
            for at, count in zip(one.times, one.counts, strict=True)
            if self.start < at <= self.end
        )


def judge(report: Report, rounds: list[dict[str, Any]], controls: list[dict[str, Any]]) -> None:
    """The promises; queue times of all rounds together, as one round has few requests."""
    steps = [count for r in rounds for count in r["queue_steps"]["one"]]
    what = "6: steps that ended while the first client's request waited, p95"
    report.promise(what, percentile(steps, 95), 2.0)
    means = [q / r["step_s"] for r in rounds for q in r["queue_s"]["one"]]
    report.fact("queue_p95_mean_steps", percentile(means, 95))
    uneven = [
        abs(1 - r["tokens_per_s"]["four"] / r["tokens_per_s"]["sixteen"]) * 100 for r in rounds
    ]
    report.promise("6: difference of the other two's tokens", median(uneven), 5.0, unit=" %")
    running = median(r["running_mean"] for r in rounds)
    what = f"6: running sequences, mean, of {ROOM}"
    report.promise(what, running, 0.97 * ROOM, at_least=True)
    pairs = zip(rounds, controls, strict=True)
    share = median(sum(r["tokens_per_s"].values()) / c["tokens_per_s"]["all"] for r, c in pairs)
    what = "6: tokens/s of all, as times those of one client with 21 requests"
    report.promise(what, share, 0.95, at_least=True)


async def main() -> bool:
    """Measures, prints and judges."""
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=20.0, help="length of one window")
    options = made.parse_args()
    found: dict[str, list[dict[str, Any]]] = {OURS: [], SERVER: [], "control": []}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-")))
        folder = build(Checkpoint("small", SMALL), root / "models", seed=1)
        copy = dense(folder, root / "dense")
        prompts = Prompts(folder, options.seed)
        mlxd = Mlxd(folder, {"running_sequences_max": ROOM})
        server = Server(copy, blas_library(), "--decode-concurrency", str(ROOM))
        stack.callback(mlxd.stop)
        stack.callback(server.stop)
        for round_ in range(options.rounds):
            for name, contestant, outstanding in (
                (OURS, mlxd, OUTSTANDING),
                ("control", mlxd, CONTROL),
                (SERVER, server, OUTSTANDING),
            ):
                load = Load(contestant, prompts, random.Random(options.seed + round_))
                with contestant.awake():
                    numbers = await load.run(outstanding, options.seconds)
                found[name].append(numbers)
                print(f"round {round_ + 1}, {name}: {numbers['tokens_per_s']}", file=sys.stderr)
    report = Report(
        f"Random llama of 27M parameters; room for {ROOM}, clients with"
        f" {list(OUTSTANDING.values())} requests outstanding; {PROMPT} in, {ANSWER} out",
        options,
    )
    judge(report, found[OURS], found["control"])
    report.fact("rounds", found)
    rows = [
        [
            name,
            *(median(r["tokens_per_s"][c] for r in found[name]) for c in OUTSTANDING),
            *(median(r["ttft_p95_s"][c] for r in found[name]) for c in OUTSTANDING),
        ]
        for name in (OURS, SERVER)
    ]
    header = [f"{what}, {n}" for what in ("tokens/s", "TTFT p95 s") for n in OUTSTANDING.values()]
    return report.end(markdown(["", *header], rows))


if __name__ == "__main__":
    run(main)
