"""What a turn of a session costs besides its own tokens.

    tests/bench/run.sh sessions [--long 2000] [--context 32000] [--rounds 5] [--only N] [--check]

1: the time to first token of a turn on a session of 2,000 tokens, against that of the same tokens
   from the start; the turn follows at once, after another session's, or after a pause in which the
   daemon rests.
2: on a tiny model, what it takes to end a turn and to begin the next in a context of 32,000 tokens,
   in decode steps: the time of a turn of two tokens, less that of its own prefill and steps. The
   context is computed once, for all rounds.
3: the bytes of eight forks of 1,000 tokens, against one prefix and eight ends.
4: the time to first token of a turn whose 2,000 tokens are read from a snapshot, against that of
   the same number from the start. The files are in the system's cache, as after a restart of the
   daemon; the model was loaded again before.
5: the gaps of a stream while snapshots of 1,000 tokens each are written, against those without.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import Checkpoint, build
from mlxd.v1 import inference_pb2, session_pb2
from peers import Mlxd
from stats import Report, markdown, parser, percentile, run
from streams import Heard, while_they_run
from wire import token_ids

# Tokens that a turn adds, and pause after which the daemon has rested, in seconds.
NEW, PAUSE_S = 8, 2.5
FORKS, PREFIX, ANSWER = 8, 1000, 32
# Time in which a context is computed, in seconds.
EXTEND_S = 1800.0
# Snapshots written in a round, tokens of the stream beside them, and those before the first gap
# that counts.
SAVED, STREAM_TOKENS, SETTLING = 4, 4000, 20


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


def ids_request(
    mlxd: Mlxd, ids: list[int], tokens: int, session: str = ""
) -> inference_pb2.GenerateRequest:
    """A greedy request."""
    return inference_pb2.GenerateRequest(
        model="" if session else mlxd.model,
        token_ids=inference_pb2.TokenIds(ids=ids),
        session=session,
        sampling=inference_pb2.SamplingOptions(temperature=0.0),
        stopping=inference_pb2.StoppingOptions(max_tokens=tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(return_token_ids=True),
    )


async def ask(mlxd: Mlxd, ids: list[int], tokens: int, session: str = "") -> Heard:
    """Runs one request."""
    heard = Heard(asyncio.get_running_loop().time())
    await mlxd.stream(ids_request(mlxd, ids, tokens, session), "", heard)
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


def extended(mlxd: Mlxd, ids: list[int]) -> str:
    """Makes a session with these tokens."""
    name = session_of(mlxd)
    with mlxd.daemon.wire() as wire:
        request = session_pb2.ExtendSessionRequest(name=name, token_ids=token_ids(ids))
        wire.sessions.ExtendSession(request, timeout=EXTEND_S)
    return name


async def ends(mlxd: Mlxd, tokens: Tokens, session: str) -> dict[str, float]:
    """Number 2, one round: what ends and begins a turn, in decode steps."""
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


async def restored(mlxd: Mlxd, tokens: Tokens, long: int) -> dict[str, float]:
    """Number 4, one round: the time to first token of a turn that is read back."""
    session = await asyncio.to_thread(extended, mlxd, tokens.take(long))
    with mlxd.daemon.wire() as wire:
        saved = wire.save_session(session)
        wire.unload(mlxd.model)
        wire.load(mlxd.model)
        cold = await ask(mlxd, tokens.take(long), 1)
        before = wire.stats().snapshots.restored_tokens_total
        turn = await ask(mlxd, tokens.take(NEW), 1, session)
        read = wire.stats().snapshots.restored_tokens_total - before
        wire.delete_session(session)
    assert read >= long - 1, f"{read} tokens were read, of {saved.token_count} that were saved"
    return {
        "cold_s": cold.ttft,
        "restored_s": turn.ttft,
        "restored_percent": 100 * turn.ttft / cold.ttft,
        "file_bytes": float(saved.bytes),
    }


async def written(mlxd: Mlxd, tokens: Tokens, long: int) -> dict[str, float]:
    """Number 5, one round: the gaps of a stream while snapshots are written, and without."""
    names = [await asyncio.to_thread(extended, mlxd, tokens.take(long)) for _ in range(SAVED)]
    now = asyncio.get_running_loop().time
    request = ids_request(mlxd, tokens.take(NEW), STREAM_TOKENS)
    heard = Heard(now())
    stream = asyncio.create_task(mlxd.stream(request, "", heard))
    quiet, busy, bytes_ = [], [], 0
    try:
        await while_they_run([stream], lambda: len(heard.times) < SETTLING)
        with mlxd.daemon.wire() as wire:
            for name in names:
                start = now()
                bytes_ += (await asyncio.to_thread(wire.save_session, name)).bytes
                end = now()
                # As long without.
                await asyncio.sleep(end - start)
                count = len(heard.times)
                await while_they_run([stream], lambda count=count: len(heard.times) == count)
                busy += heard.gaps(start, end)
                quiet += heard.gaps(end, now())
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    with mlxd.daemon.wire() as wire:
        for name in names:
            wire.delete_session(name)
    return {
        "quiet_p50_s": median(quiet),
        "quiet_p95_s": percentile(quiet, 95),
        "busy_p50_s": median(busy),
        "busy_p95_s": percentile(busy, 95),
        "times_p50": median(busy) / median(quiet),
        "times_p95": percentile(busy, 95) / percentile(quiet, 95),
        "file_bytes": float(bytes_),
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The medians."""
    rows = [
        [name, key, median(round_[key] for round_ in rounds)]
        for name, rounds in found.items()
        for key in rounds[0]
    ]
    return markdown(["what", "", "median"], rows)


async def repeated(
    number: str, scene: Callable[[], Awaitable[dict[str, float]]], rounds: int
) -> list[dict[str, Any]]:
    """Runs a scene some times."""
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        found.append(await scene())
        print(number, found[-1], file=sys.stderr)
    return found


async def on_the_model(
    mlxd: Mlxd, tokens: Tokens, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Numbers 1, 4 and 5."""
    scenes = {
        "1": lambda: first_tokens(mlxd, tokens, options.long),
        "4": lambda: restored(mlxd, tokens, options.long),
        "5": lambda: written(mlxd, tokens, options.long // 2),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for number, scene in scenes.items():
        if options.only in (None, int(number)):
            found[number] = await repeated(number, scene, options.rounds)
    return found


async def on_a_tiny_one(
    mlxd: Mlxd, tokens: Tokens, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Numbers 2 and 3."""
    found: dict[str, list[dict[str, Any]]] = {}
    if options.only in (None, 2):
        session = await asyncio.to_thread(extended, mlxd, tokens.take(options.context))
        found["2"] = await repeated("2", lambda: ends(mlxd, tokens, session), options.rounds)
    if options.only in (None, 3):
        found["3"] = [await forks(mlxd, tokens)]
    return found


# By number: which of its medians is promised, what that is, at most what.
PROMISES: dict[str, list[tuple[str, str, float, str]]] = {
    "1": [("warm_percent", "warm TTFT of the cold one", 2.0, " %")],
    "2": [("ends_in_steps", "to end a turn and begin the next, in decode steps", 3.0, "")],
    "3": [("times", "bytes of forks, as times prefix and ends", 1.1, "")],
    "4": [("restored_percent", "TTFT of a restored turn, of the cold one", 25.0, " %")],
    "5": [
        ("times_p50", "gaps while snapshots are written, as times those without", 1.1, ""),
        ("times_p95", "the same, p95", 1.1, ""),
    ],
}


async def main() -> bool:
    """Measures, prints and judges."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--long", type=int, default=2000, help="tokens of the session, 1, 4 and 5")
    made.add_argument("--context", type=int, default=32000, help="tokens of the context, number 2")
    made.add_argument("--only", type=int, choices=range(1, 6), help="one of the numbers")
    options = made.parse_args()
    tokens = Tokens(options.seed % 10_000)
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-bench-")))
        # The tiny one first: its daemon has ended before the other begins.
        if options.only in (None, 2, 3):
            long = {"max_position_embeddings": 65536, "num_key_value_heads": 2}
            tiny = Mlxd(build(Checkpoint("tiny", long), root / "models", seed=1))
            try:
                found |= await on_a_tiny_one(tiny, tokens, options)
            finally:
                tiny.stop()
        if options.only in (None, 1, 4, 5):
            mlxd = Mlxd(options.model)
            stack.callback(mlxd.stop)
            found |= await on_the_model(mlxd, tokens, options)
    report = Report("Turns of sessions", options)
    for number, rounds in sorted(found.items()):
        for key, what, bound, unit in PROMISES[number]:
            value = median(round_[key] for round_ in rounds)
            report.promise(f"{number}: {what}", value, bound, unit=unit)
    report.fact("found", found)
    return report.end(table(dict(sorted(found.items()))))


if __name__ == "__main__":
    run(main)
