"""The daemon against mlx-lm: same machine, same run, one after the other in turn.

    tests/bench/run.sh [--rounds 3] [--tokens 64] [--streams 1 16] [--json FILE] [--check]

Dense float32 on the CPU, greedy, past end-of-text tokens. Every stream of every round has its own
random prompt, so no cached prefix helps anybody. Ours is measured at a gRPC client. mlx-lm runs
twice: on an OpenBLAS whose symbols are only renamed, and on the daemon's own BLAS shim. Only one of
the three works at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memory import Memory

from conftest import default_model
from daemon import Daemon
from mlxd.v1 import model_pb2 as model
from wire import CALL_S, Wire

PEER = Path(__file__).with_name("peer.py")
THREADS = "2"
OURS, PLAIN, SGEMV = "mlxd", "mlx-lm, OpenBLAS", "mlx-lm, our BLAS shim"
# What the project promises: times the peer's tokens/s, by streams.
PROMISED = {1: 1.8, 16: 1.4}

Run = Callable[[list[list[int]], int], dict[str, Any]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="mlxd against mlx-lm on the CPU")
    parser.add_argument("--model", type=Path, default=default_model(), help="model folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="tokens in, and tokens out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--check", action="store_true", help="fail where a promise is not kept")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    return parser.parse_args()


def blas_libraries() -> dict[str, str]:
    """The libraries that go under mlx-lm, by the name of the peer."""
    if platform.system() != "Linux":
        # MLX uses Accelerate there, for everybody.
        return {PLAIN: ""}
    plain, sgemv = os.environ.get("MLXD_BLAS_PLAIN"), os.environ.get("MLXD_BLAS")
    if not plain or not sgemv:
        sys.exit("compare.py: MLXD_BLAS_PLAIN and MLXD_BLAS are not set: use tests/bench/run.sh")
    return {PLAIN: plain, SGEMV: sgemv}


@contextmanager
def peer(folder: Path, blas: str) -> Iterator[Run]:
    """mlx-lm in a process of its own, on this BLAS."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": THREADS}
    if blas:
        environment["LD_PRELOAD"] = blas
    process = subprocess.Popen(
        [sys.executable, str(PEER), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


def ours(wire: Wire, name: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """The daemon through its API, one stream per prompt."""
    start = time.perf_counter()

    def stream(prompt: list[int]) -> tuple[list[int], float]:
        output: list[int] = []
        first = 0.0
        for event in wire.stream(name, prompt, max_tokens=tokens):
            output += event.delta.token_ids
            if output and not first:
                first = time.perf_counter() - start
        assert len(output) == tokens
        return output, first

    with ThreadPoolExecutor(len(prompts)) as threads:
        done = list(threads.map(stream, prompts))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "first": [d[1] for d in done], "outputs": [d[0] for d in done]}


def measure(runs: dict[str, Run], options: argparse.Namespace, vocabulary: int) -> list[dict]:
    """All rounds: for each count of streams everybody in turn, each with new prompts."""
    generator = random.Random(options.seed)

    def prompts(count: int) -> list[list[int]]:
        return [
            [generator.randrange(vocabulary) for _ in range(options.tokens)] for _ in range(count)
        ]

    for run in runs.values():
        for streams in options.streams:
            run(prompts(streams), 4)
    results = []
    for round_ in range(options.rounds):
        for streams in options.streams:
            for name, run in runs.items():
                done = run(prompts(streams), options.tokens)
                result = {
                    "round": round_,
                    "streams": streams,
                    "who": name,
                    "tokens_per_s": streams * options.tokens / done["seconds"],
                    "ttft_s": median(done["first"]),
                }
                results.append(result)
                print(
                    f"round {round_ + 1}  {streams:>3} streams  {name:<22}"
                    f"{result['tokens_per_s']:8.1f} tokens/s",
                    file=sys.stderr,
                )
    return results


def agreement(runs: dict[str, Run], vocabulary: int) -> float:
    """The share of greedy tokens that the daemon and mlx-lm have in common before they part.

    A sanity check that both run the same model: random prompts have near-ties, so not all agree.
    """
    generator = random.Random(1)
    prompts = [[generator.randrange(vocabulary) for _ in range(24)] for _ in range(4)]
    common = total = 0
    for prompt in prompts:
        mine, theirs = (runs[who]([prompt], 24)["outputs"][0] for who in (OURS, PLAIN))
        same = [a == b for a, b in zip(mine, theirs, strict=True)]
        common += same.index(False) if False in same else len(same)
        total += len(same)
    return common / total


def summary(results: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Medians over the rounds, and ours as a multiple of each peer's, round by round."""
    rows = []
    for streams in sorted({result["streams"] for result in results}):
        by_name = {
            name: [r for r in results if (r["streams"], r["who"]) == (streams, name)]
            for name in names
        }
        speeds = {name: [r["tokens_per_s"] for r in by_name[name]] for name in names}
        for name in names:
            pairs = zip(speeds[OURS], speeds[name], strict=True)
            rows.append(
                {
                    "streams": streams,
                    "who": name,
                    "tokens_per_s": median(speeds[name]),
                    "ttft_s": median(r["ttft_s"] for r in by_name[name]),
                    "ours_is_times": median(mine / theirs for mine, theirs in pairs),
                }
            )
    return rows


def verdicts(rows: list[dict[str, Any]], memory: Memory) -> list[tuple[str, bool]]:
    """Every promise and whether it was kept."""
    kept = []
    for row in rows:
        promised = PROMISED.get(row["streams"])
        if row["who"] == PLAIN and promised:
            kept.append(
                (
                    f"{row['streams']} streams: {row['ours_is_times']:.2f} x {PLAIN}"
                    f" (promised {promised})",
                    row["ours_is_times"] >= promised,
                )
            )
    return kept + memory.verdicts()


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| streams | | tokens/s | median TTFT s | mlxd is |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = "" if row["who"] == OURS else f"{row['ours_is_times']:.2f} x"
        lines.append(
            f"| {row['streams']} | {row['who']} | {row['tokens_per_s']:.1f}"
            f" | {row['ttft_s']:.2f} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and judges."""
    options = arguments()
    folder = options.model
    with ExitStack() as stack:
        daemon = Daemon(
            [folder.parent],
            models=[folder.name],
            environment={"OPENBLAS_NUM_THREADS": THREADS},
        )
        stack.enter_context(daemon)
        wire = stack.enter_context(daemon.wire())
        get = model.GetModelRequest(model=folder.name)
        info = wire.models.GetModel(get, timeout=CALL_S).model
        memory = Memory(daemon, info.parameter_count)
        runs: dict[str, Run] = {OURS: partial(ours, wire, folder.name)}
        for name, blas in blas_libraries().items():
            runs[name] = stack.enter_context(peer(folder, blas))
        agreed = agreement(runs, info.vocabulary_size)
        results = measure(runs, options, info.vocabulary_size)
        memory.note_steady(wire.stats().memory)
    rows = summary(results, list(runs))
    judged = verdicts(rows, memory)
    print(
        f"\n{info.name}, {info.computes_in}; {platform.machine()}, {os.cpu_count()} cores,"
        f" {THREADS} BLAS threads; {options.tokens} tokens in, {options.tokens} out;"
        f" {options.rounds} rounds; greedy agreement {agreed:.0%}\n"
    )
    print(table(rows), end="\n\n")
    for text, ok in judged:
        print(f"{'ok    ' if ok else 'MISSED'}  {text}")
    if options.json:
        everything = {"seed": options.seed, "agreement": agreed, "memory": memory.numbers()}
        everything |= {"rows": rows, "rounds": results}
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    if options.check and not all(ok for _, ok in judged):
        sys.exit(1)


if __name__ == "__main__":
    main()
