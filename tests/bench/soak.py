"""Number 8: 500 streams, most of which end badly, must leave nothing behind.

    tests/bench/run.sh soak [--streams 500] [--at-once 64] [--check]

Streams are cancelled at once or after some tokens, run out of their deadline, or belong to a
process that is killed; the others must give exactly the output of the same prompt alone. At the
end no sequence runs, no slot is in use, nothing is reserved, and the process, at rest, is as large
as after the warm-up, which is the same load once.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from checkpoints import Checkpoint, build
from peers import Mlxd
from stats import Report, markdown, parser, run
from streams import Ask, Heard, Prompts
from wire import DETAILS, Wire

# The ends of streams, by weight.
ENDS = {"survive": 8, "cancel": 4, "cancel at once": 3, "deadline": 4, "dead client": 1}
# A dead client takes this many streams with it.
DEAD_STREAMS = 5
PROMPTS = 40
MB = 1_000_000
# Longer than the time after which the daemon releases memory held for reuse.
REST_S = 3.0
KV_IDLE_BYTES = 4 * MB

DEAD_CLIENT = """
import sys, threading
from wire import Wire
wire = Wire(sys.argv[1])
def run():
    for event in wire.stream(sys.argv[2], prompt=sys.argv[3], max_tokens=2000):
        if event.HasField("delta"):
            print("token", flush=True)
for _ in range(int(sys.argv[4])):
    threading.Thread(target=run, daemon=True).start()
# Until it is killed, or its parent is gone.
sys.stdin.read()
"""


@dataclass
class Soak:
    """The load and its outcomes."""

    mlxd: Mlxd
    asks: list[Ask]
    alone: list[str]
    random: random.Random
    outcomes: Counter[str]
    wrong: int = 0

    async def run(self, streams: int, at_once: int) -> None:
        """Runs all streams, a bounded number at once."""
        gate = asyncio.Semaphore(at_once)

        async def one(end: str) -> None:
            async with gate:
                await self._stream(end)

        ends = []
        while len(ends) < streams:
            (end,) = self.random.choices(list(ENDS), list(ENDS.values()))
            ends.append(end)
            if end == "dead client":
                streams -= DEAD_STREAMS - 1
        await asyncio.gather(*(one(end) for end in ends))

    async def _stream(self, end: str) -> None:
        which = self.random.randrange(len(self.asks))
        ask = self.asks[which]
        if end == "dead client":
            await self._dead_client(ask)
            self.outcomes[end] += DEAD_STREAMS
            return
        heard = Heard(asyncio.get_running_loop().time())
        request = self.mlxd.request(ask)
        if end != "survive":
            request.stopping.max_tokens = 2000
        call: dict[str, Any] = {}
        if end == "deadline":
            call["timeout"] = self.random.uniform(0.05, 5.0)
        task = asyncio.create_task(self.mlxd.stream(request, "", heard, **call))
        if end.startswith("cancel"):
            tokens = 0 if end == "cancel at once" else self.random.randint(1, 60)
            while not task.done() and heard.tokens < tokens:
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.random.uniform(0, 0.02))
            task.cancel()
        try:
            await task
            self.outcomes[f"{end}: finished"] += 1
            if end == "survive":
                self.wrong += heard.text != self.alone[which]
        except asyncio.CancelledError:
            self.outcomes[f"{end}: cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            self.outcomes[f"{end}: {_reason(error)}"] += 1

    async def _dead_client(self, ask: Ask) -> None:
        """Runs streams of a process that is killed after some tokens."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            DEAD_CLIENT,
            self.mlxd.daemon.target,
            self.mlxd.model,
            ask.prompt,
            str(DEAD_STREAMS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(self.random.randint(1, 100)):
            await process.stdout.readline()
        process.kill()
        await process.wait()


def _reason(error: grpc.aio.AioRpcError) -> str:
    """Returns the daemon's reason, or the code of a failure without one."""
    for key, value in error.trailing_metadata():
        if key == DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return error.code().name


async def left_over(wire: Wire) -> dict[str, int]:
    """Returns what is still held when nothing should be, after waiting for its release."""
    for _ in range(500):
        stats = await asyncio.to_thread(wire.stats)
        held = {
            "running sequences": stats.running_sequences,
            "waiting requests": stats.queued_sequences,
            "slots in use": sum(slab.slots_in_use for slab in stats.slabs),
        }
        # A daemon that does not report it is not counted as having none.
        if hasattr(stats.memory, "kv_reserved_bytes"):
            held["reserved bytes"] = stats.memory.kv_reserved_bytes
        if not any(held.values()):
            break
        await asyncio.sleep(0.02)
    return held


async def main() -> bool:
    """Runs the load and checks what it left behind."""
    made = parser(__doc__, rounds=1)
    made.add_argument("--streams", type=int, default=500)
    made.add_argument("--at-once", type=int, default=64)
    options = made.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-")))
        long = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
        folder = build(Checkpoint("tiny", long), root / "models", seed=1)
        prompts = Prompts(folder, options.seed)
        # Parked caches of ended requests are not a leak; bounded, they cannot look like one.
        mlxd = Mlxd(folder, {"kv_idle_bytes_max": KV_IDLE_BYTES})
        stack.callback(mlxd.stop)
        wire = stack.enter_context(mlxd.daemon.wire())
        generator = random.Random(options.seed)
        asks = [
            prompts.ask(generator.randint(4, 200), generator.randint(16, 160))
            for _ in range(PROMPTS)
        ]
        alone = []
        for ask in asks:
            _, (heard,) = await mlxd.together([ask])
            alone.append(heard.text)
        resident, wrong = [], 0
        for _ in range(options.rounds + 1):
            soak = Soak(mlxd, asks, alone, generator, Counter())
            await soak.run(options.streams, options.at_once)
            wrong += soak.wrong
            held = await left_over(wire)
            await asyncio.sleep(REST_S)
            resident.append(mlxd.daemon.resident_bytes() / MB)
            memory = wire.stats().memory
            print(
                f"{dict(soak.outcomes)}, {held}, {resident[-1]:.0f} MB, in it MLX active"
                f" {memory.mlx_active_bytes / MB:.0f}, cached {memory.mlx_cache_bytes / MB:.0f}",
                file=sys.stderr,
            )
        # Does it still serve?
        _, (heard,) = await mlxd.together([asks[0]])
        wrong += heard.text != alone[0]
        stats = wire.stats()
    report = Report(
        f"Tiny llama (hidden 64); {options.streams} streams, {options.at_once} at once", options
    )
    for what, count in held.items():
        report.promise(f"8: {what} at the end", count, 0)
    growth = (resident[-1] / resident[0] - 1) * 100
    report.promise(f"8: growth of {resident[0]:.0f} MB resident", growth, 5.0, unit=" %")
    survivors = sum(count for how, count in soak.outcomes.items() if how.startswith("survive"))
    report.promise("8: survivors with a wrong text", wrong, 0)
    finished = soak.outcomes["survive: finished"]
    report.promise("8: survivors that finished", finished, survivors, at_least=True)
    report.fact("outcomes", dict(soak.outcomes))
    report.fact("resident_mb", resident)
    rows = [[how, count] for how, count in sorted(soak.outcomes.items())]
    rows += [["KV slabs, MB", stats.memory.kv_slab_bytes / MB]]
    rows += [["KV idle, MB", stats.memory.kv_idle_bytes / MB]]
    return report.end(markdown(["outcome", "streams"], rows))


if __name__ == "__main__":
    run(main)
