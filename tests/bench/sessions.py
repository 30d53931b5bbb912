"""What a turn of a session costs besides its own tokens.

    tests/bench/run.sh sessions [--long 2000] [--context 32000] [--rounds 5] [--check]

1: the time to first token of a turn on a session of 2,000 tokens, against that of the same tokens
   from the start; the turn follows at once, after another session's, or after a pause in which the
   daemon rests.
2: on a tiny model, what it takes to end a turn and to begin the next in a context of 32,000 tokens,
   in decode steps: the time of a turn of two tokens, less that of its own prefill and steps.
3: the bytes of eight forks of 1,000 tokens, against one prefix and eight ends.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import Checkpoint, build
from mlxd.v1 import inference_pb2
from peers import Mlxd
from stats import Report, markdown, parser, run
from streams import Heard

# Tokens that a turn adds, and pause after which the daemon has rested, in seconds.
NEW, PAUSE_S = 8, 2.5
FORKS, PREFIX, ANSWER = 8, 1000, 32


class Tokens:
    """Random prompts that have nothing in common."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def take(self, count: int) -> list[int]:
        """Returns the next one."""
        self.seed += 1
        return [
            (self.seed * 7919 + place * place * 31 + place * 7) % 300 + 20 for place in range(count)
        ]


async def ask(mlxd: Mlxd, ids: list[int], tokens: int, session: str = "") -> Heard:
    """Runs one request."""
    request = inference_pb2.GenerateRequest(
        model="" if session else mlxd.model,
        token_ids=inference_pb2.TokenIds(ids=ids),
        session=session,
        sampling=inference_pb2.SamplingOptions(temperature=0.0),
        stopping=inference_pb2.StoppingOptions(max_tokens=tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(return_token_ids=True),
    )
    heard = Heard(asyncio.get_running_loop().time())
    await mlxd.stream(request, "", heard)
    return heard


def session_of(mlxd: Mlxd) -> str:
    """Makes a session."""
    name = f"bench/{uuid.uuid4().hex}"
    with mlxd.daemon.wire() as wire:
        wire.create_session(name, mlxd.model)
    return name


async def first_tokens(mlxd: Mlxd, tokens: Tokens, long: int) -> dict[str, float]:
    """Number 1, one round: times to first token, in seconds."""
    cold = await ask(mlxd, tokens.take(long), 1)
    one, other = session_of(mlxd), session_of(mlxd)
    for session in (one, other):
        await ask(mlxd, tokens.take(long), NEW, session)
    await ask(mlxd, tokens.take(NEW), NEW, one)
    warm = await ask(mlxd, tokens.take(NEW), NEW, one)
    await ask(mlxd, tokens.take(NEW), NEW, other)
    in_turn = await ask(mlxd, tokens.take(NEW), NEW, one)
    await asyncio.sleep(PAUSE_S)
    rested = await ask(mlxd, tokens.take(NEW), NEW, one)
    times = {"warm": warm.ttft, "in_turn": in_turn.ttft, "rested": rested.ttft}
    return {"cold_s": cold.ttft} | {
        key: value
        for name, ttft in times.items()
        for key, value in ((f"{name}_s", ttft), (f"{name}_percent", 100 * ttft / cold.ttft))
    }


async def ends(mlxd: Mlxd, tokens: Tokens, context: int) -> dict[str, float]:
    """Number 2, one round: what ends and begins a turn, in decode steps."""
    session = session_of(mlxd)
    await ask(mlxd, tokens.take(context), NEW, session)
    decoding = await ask(mlxd, tokens.take(1), 33, session)
    step = median(decoding.gaps())
    now = asyncio.get_running_loop().time
    turns = []
    for _ in range(9):
        start = now()
        # One token is prefilled, which draws the first one; the second one takes a step.
        await ask(mlxd, tokens.take(1), 2, session)
        turns.append(now() - start)
    short = session_of(mlxd)
    await ask(mlxd, tokens.take(NEW), NEW, short)
    calls, gaps = [], []
    for _ in range(9):
        start = now()
        heard = await ask(mlxd, tokens.take(1), 2, short)
        calls.append(now() - start)
        gaps += heard.gaps()
    # What a call takes on a session of a few tokens, without its two steps.
    call = median(calls) - 2 * median(gaps)
    return {
        "step_s": step,
        "turn_s": median(turns),
        "call_s": call,
        "ends_in_steps": (median(turns) - call - 2 * step) / step,
    }


async def forks(mlxd: Mlxd, tokens: Tokens) -> dict[str, float]:
    """Number 3: the bytes of forks as times those of one prefix and all ends."""
    first = session_of(mlxd)
    with mlxd.daemon.wire() as wire:
        before = wire.stats().memory.kv_idle_bytes
        await ask(mlxd, tokens.take(PREFIX), 1, first)
        of_prefix = wire.stats().memory.kv_idle_bytes - before
        names = [f"{first}/{number}" for number in range(FORKS)]
        for name in names:
            wire.fork_session(first, name)
        await asyncio.gather(*(ask(mlxd, tokens.take(NEW), ANSWER, name) for name in names))
        held = wire.stats().memory.kv_idle_bytes - before
    wanted = of_prefix / PREFIX * (PREFIX + FORKS * (NEW + ANSWER))
    return {"held_bytes": held, "times": held / wanted}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The medians."""
    rows = [
        [name, key, median(round_[key] for round_ in rounds)]
        for name, rounds in found.items()
        for key in rounds[0]
    ]
    return markdown(["what", "", "median"], rows)


async def main() -> None:
    """Measures, prints and judges."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--long", type=int, default=2000, help="tokens of the session, number 1")
    made.add_argument("--context", type=int, default=32000, help="tokens of the context, number 2")
    made.add_argument("--only", type=int, help="one of the numbers")
    options = made.parse_args()
    tokens = Tokens(options.seed % 10_000)
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-")))
        long = {"max_position_embeddings": 65536, "num_key_value_heads": 2}
        folder = build(Checkpoint("tiny", long), root / "models", seed=1)
        if options.only in (None, 1):
            mlxd = Mlxd(options.model)
            stack.callback(mlxd.stop)
            for _ in range(options.rounds):
                found.setdefault("1", []).append(await first_tokens(mlxd, tokens, options.long))
                print(found["1"][-1], file=sys.stderr)
        tiny = Mlxd(folder)
        stack.callback(tiny.stop)
        for _ in range(options.rounds if options.only in (None, 2) else 0):
            found.setdefault("2", []).append(await ends(tiny, tokens, options.context))
            print(found["2"][-1], file=sys.stderr)
        if options.only in (None, 3):
            found["3"] = [await forks(tiny, tokens)]
    report = Report("Turns of sessions", options)
    percents = [round_["warm_percent"] for round_ in found.get("1", [])]
    if percents:
        report.promise("1: warm TTFT of the cold one", median(percents), 2.0, unit=" %")
    steps = [round_["ends_in_steps"] for round_ in found.get("2", [])]
    if steps:
        report.promise("2: to end a turn and begin the next, in decode steps", median(steps), 3.0)
    for round_ in found.get("3", []):
        report.promise("3: bytes of forks, as times prefix and ends", round_["times"], 1.1)
    report.fact("found", found)
    report.end(table(found))


if __name__ == "__main__":
    run(main)
