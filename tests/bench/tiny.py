"""Numbers 2 and 3, on a tiny random llama (hidden 64), where a server is all overhead.

    tests/bench/run.sh tiny [--streams 16] [--tokens 256] [--rounds 3] [--check]

2: the tokens/s of 16 streams together, against BatchGenerator called without any server. The daemon
   is measured from this process, over one connection with grpc.aio, and from `mlxd bench`, if the
   program has it: at these speeds the Python client takes as long as the daemon.
3: the time to first token of requests that arrive at random while 8 others decode, against the same
   arrivals on an idle daemon. `mlxd bench` is the others, so that they do not share our event loop.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import Checkpoint, build
from daemon import binary
from dense import dense
from peers import BATCH, OURS, SERVER, Batch, Contestant, Mlxd, Server, blas_library
from stats import Report, markdown, parser, percentile, run
from streams import Heard, Prompts

RUST = "mlxd, by mlxd bench"
PROMPT = 64
# Number 3: how many others decode, how many requests arrive, and how far apart on average.
OTHERS, ARRIVALS, PAUSE_S = 8, 40, 0.05


class RustClient:
    """The daemon again, measured by `mlxd bench`; it shares the daemon's process."""

    name = RUST

    def __init__(self, mlxd: Mlxd) -> None:
        self.mlxd = mlxd
        self.awake = mlxd.awake

    def tokens_per_s(self, streams: int, tokens: int) -> float:
        """One run of all streams."""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = bench_command(self.mlxd, streams, tokens)
            command += ["--requests", str(streams), "--json", file.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return json.loads(Path(file.name).read_text())["rows"][0]["output_tokens_per_s"]


def bench_command(mlxd: Mlxd, streams: int, tokens: int) -> list[str]:
    """Runs `mlxd bench` with this number of streams at once."""
    command = [str(binary()), "bench", "--address", str(mlxd.daemon.socket), "--warmup", "0"]
    command += ["--concurrency", str(streams), "--prompt-tokens", str(PROMPT)]
    return [*command, "--output-tokens", str(tokens)]


@cache
def has_bench() -> bool:
    """Tells whether the program under test has `mlxd bench`."""
    command = [str(binary()), "bench", "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def throughput(
    contestants: list[Contestant | RustClient], prompts: Prompts, options: Any
) -> dict[str, list[float]]:
    """Number 2: tokens/s by contestant, one value a round; each number is the best of two runs."""
    speeds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    # The first round only warms up.
    for round_ in range(options.rounds + 1):
        for contestant in contestants:
            with contestant.awake():
                if isinstance(contestant, RustClient):
                    speed = await asyncio.to_thread(
                        contestant.tokens_per_s, options.streams, options.tokens
                    )
                else:
                    asks = prompts.asks(options.streams, PROMPT, options.tokens)
                    seconds, heard = await contestant.together(asks)
                    speed = sum(h.tokens for h in heard) / seconds
            if round_ > 0:
                speeds[contestant.name].append(speed)
    return speeds


async def first_tokens(
    contestant: Contestant, prompts: Prompts, pauses: list[float]
) -> list[float]:
    """Sends requests of one token after these pauses; returns their times to first token."""
    times = []
    for pause in pauses:
        await asyncio.sleep(pause)
        _, (heard,) = await contestant.together([prompts.ask(PROMPT, 1)])
        times.append(heard.ttft)
    return times


@asynccontextmanager
async def others(contestant: Contestant, prompts: Prompts) -> AsyncIterator[None]:
    """Streams that decode without end while the block runs.

    The daemon's are another program's, as they would be: at thousands of tokens per second a Python
    client that listens to them is late for everything else.
    """
    if isinstance(contestant, Mlxd) and has_bench():
        command = bench_command(contestant, OTHERS, 4000)
        process = subprocess.Popen([*command, "--duration", "600"], stdout=subprocess.DEVNULL)
        with contestant.daemon.wire() as wire:
            try:
                while wire.stats().running_sequences < OTHERS:
                    await asyncio.sleep(0.01)
                yield
            finally:
                process.send_signal(signal.SIGINT)
                await asyncio.to_thread(process.wait)
            while wire.stats().running_sequences:
                await asyncio.sleep(0.01)
        return

    heard: list[Heard] = []

    async def decode() -> None:
        while True:
            heard.append(Heard(asyncio.get_running_loop().time()))
            await contestant.hear(prompts.ask(PROMPT, 4000), heard[-1])

    tasks = [asyncio.create_task(decode()) for _ in range(OTHERS)]
    while len(heard) < OTHERS or not all(one.times for one in heard):
        await asyncio.sleep(0.01)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def arrivals(contestant: Contestant, prompts: Prompts, seed: int) -> dict[str, float]:
    """Number 3, one round: idle first, then while the others decode."""
    generator = random.Random(seed)
    pauses = [generator.expovariate(1 / PAUSE_S) for _ in range(ARRIVALS)]
    await first_tokens(contestant, prompts, pauses[:4])
    idle = await first_tokens(contestant, prompts, pauses)
    async with others(contestant, prompts):
        busy = await first_tokens(contestant, prompts, pauses)
    return {
        "idle_p50_s": median(idle),
        "idle_p95_s": percentile(idle, 95),
        "busy_p50_s": median(busy),
        "busy_p95_s": percentile(busy, 95),
        "times": percentile(busy, 95) / median(idle),
    }


async def main() -> bool:
    """Measures, prints and judges."""
    made = parser(__doc__)
    made.add_argument("--streams", type=int, default=16)
    made.add_argument("--tokens", type=int, default=256, help="tokens out, number 2")
    options = made.parse_args()
    late: dict[str, list[dict[str, float]]] = {OURS: [], SERVER: []}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-")))
        long = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
        folder = build(Checkpoint("tiny", long), root / "models", seed=1)
        copy = dense(folder, root / "dense")
        prompts = Prompts(folder, options.seed)
        mlxd = Mlxd(folder)
        server, batch = Server(copy, blas_library()), Batch(copy, blas_library())
        contestants: list[Contestant] = [mlxd, server, batch]
        for contestant in contestants:
            stack.callback(contestant.stop)
        rust = [RustClient(mlxd)] if has_bench() else []
        speeds = await throughput([*contestants, *rust], prompts, options)
        print("number 2 is measured", file=sys.stderr)
        for round_ in range(options.rounds):
            for contestant in (mlxd, server):
                with contestant.awake():
                    found = await arrivals(contestant, prompts, options.seed + round_)
                late[contestant.name].append(found)
                print(f"number 3, round {round_ + 1}, {contestant.name}: {found}", file=sys.stderr)
    report = Report(
        f"Tiny llama (hidden 64), {PROMPT} tokens in; 2: {options.streams} streams,"
        f" {options.tokens} out; 3: {ARRIVALS} arrivals while {OTHERS} decode",
        options,
    )
    best = RUST if rust else OURS
    ratios = [a / b for a, b in zip(speeds[best], speeds[BATCH], strict=True)]
    what = f"2: tokens/s of {best} as times {BATCH}'s"
    report.promise(what, median(ratios), 1.0, at_least=True)
    times = median(round_["times"] for round_ in late[OURS])
    report.promise("3: p95 of TTFT while others decode, as times the idle median", times, 3.0)
    report.fact("throughput_tokens_per_s", speeds)
    report.fact("arrivals", late)
    rows = [["2", name, "tokens/s", median(values)] for name, values in speeds.items()]
    for name, found in late.items():
        rows += [["3", name, key, median(round_[key] for round_ in found)] for key in found[0]]
    return report.end(markdown(["number", "", "", "median"], rows))


if __name__ == "__main__":
    run(main)
