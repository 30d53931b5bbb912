"""Number 1: the daemon against mlx_lm.server and BatchGenerator, in one run and taking turns.

    tests/bench/run.sh compare [--streams 1 4 16] [--tokens 64] [--rounds 3] [--our-blas] [--check]

Dense float32 on the CPU, greedy, past end-of-text tokens; every stream of every round has its own
random prompt, so no cached prefix helps any of them. The daemon and the server are measured at a
client that streams, BatchGenerator inside its own process. mlx-lm runs on OpenBLAS with renamed
symbols; --our-blas adds a server on the daemon's BLAS.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from statistics import median
from typing import Any

from dense import dense
from memory import Memory
from mlxd.v1 import model_pb2 as model
from peers import BATCH, OURS, SERVER, Batch, Contestant, Mlxd, Server, bench_cache, blas_library
from stats import Report, markdown, parser, run
from streams import Prompts
from wire import CALL_S

# Promised tokens/s as a multiple of mlx_lm.server's, by streams.
PROMISED = {1: 2.5, 4: 2.0, 16: 2.0}
# Promised median time to first token as a fraction of mlx_lm.server's, by streams.
PROMISED_TTFT = {16: 0.5}


async def measure(contestants: list[Contestant], prompts: Prompts, options: Any) -> list[dict]:
    """Runs all rounds: for each number of streams each contestant once, with new prompts."""
    for contestant in contestants:
        with contestant.awake():
            for streams in options.streams:
                await contestant.together(prompts.asks(streams, options.tokens, 4))
    results = []
    for round_ in range(options.rounds):
        for streams in options.streams:
            for contestant in contestants:
                with contestant.awake():
                    # The first work of a process that was stopped is not measured.
                    await contestant.together(prompts.asks(1, 8, 2))
                    asks = prompts.asks(streams, options.tokens, options.tokens)
                    seconds, heard = await contestant.together(asks)
                assert all(h.tokens == options.tokens for h in heard), [h.tokens for h in heard]
                result = {
                    "round": round_,
                    "streams": streams,
                    "who": contestant.name,
                    "tokens_per_s": sum(h.tokens for h in heard) / seconds,
                    "ttft_s": median(h.ttft for h in heard),
                }
                results.append(result)
                print(
                    f"round {round_ + 1}  {streams:>3} streams  {contestant.name:<24}"
                    f"{result['tokens_per_s']:8.1f} tokens/s  TTFT {result['ttft_s']:.3f} s",
                    file=sys.stderr,
                )
    return results


async def agreement(mlxd: Mlxd, server: Server, batch: Batch, prompts: Prompts) -> dict[str, float]:
    """Returns the fraction of greedy output that the daemon shares with each before they differ.

    A sanity check that all run the same model: random prompts have near-ties, so not all agree.
    """
    shares: dict[str, list[float]] = {SERVER: [], BATCH: []}
    for _ in range(4):
        asks = prompts.asks(1, 24, 24)
        heard = {}
        for contestant in (mlxd, server, batch):
            with contestant.awake():
                heard[contestant.name] = (await contestant.together(asks))[1][0]
        mine = heard[OURS]
        shares[BATCH].append(_common(mine.ids, heard[BATCH].ids))
        # The server drops a leading space.
        shares[SERVER].append(_common(mine.text.strip(), heard[SERVER].text.strip()))
    return {name: sum(found) / len(found) for name, found in shares.items()}


def _common(mine: Any, theirs: Any) -> float:
    same = [a == b for a, b in zip(mine, theirs, strict=False)]
    return (same.index(False) if False in same else len(same)) / max(len(mine), len(theirs))


def summary(results: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Adds the medians over the rounds, and ours as a multiple of each peer's, round by round."""
    rows = []
    for streams in sorted({result["streams"] for result in results}):
        by_name = {
            name: [r for r in results if (r["streams"], r["who"]) == (streams, name)]
            for name in names
        }
        for name in names:
            pairs = list(zip(by_name[OURS], by_name[name], strict=True))
            rows.append(
                {
                    "streams": streams,
                    "who": name,
                    "tokens_per_s": median(r["tokens_per_s"] for r in by_name[name]),
                    "ttft_s": median(r["ttft_s"] for r in by_name[name]),
                    "times": median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs),
                    "ttft_share": median(a["ttft_s"] / b["ttft_s"] for a, b in pairs),
                }
            )
    return rows


def judge(report: Report, rows: list[dict[str, Any]], memory: Memory) -> None:
    """Adds every promise and its measurement."""
    for row in (row for row in rows if row["who"] == SERVER):
        streams = row["streams"]
        if bound := PROMISED.get(streams):
            what = f"{streams} streams, tokens/s as times {SERVER}'s"
            report.promise(what, row["times"], bound, at_least=True)
        if bound := PROMISED_TTFT.get(streams):
            what = f"{streams} streams, median TTFT as share of {SERVER}'s"
            report.promise(what, row["ttft_share"], bound)
    for promise in memory.promises():
        report.promise(*promise, unit=" MB")


async def main() -> bool:
    """Measures, prints and judges."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=64, help="tokens in, and tokens out")
    made.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    made.add_argument("--our-blas", action="store_true", help="also a server on the daemon's BLAS")
    options = made.parse_args()
    folder = dense(options.model, bench_cache())
    prompts = Prompts(options.model, options.seed)
    with ExitStack() as stack:
        mlxd = Mlxd(options.model)
        stack.callback(mlxd.stop)
        wire = stack.enter_context(mlxd.daemon.wire())
        get = model.GetModelRequest(model=mlxd.model)
        info = wire.models.GetModel(get, timeout=CALL_S).model
        memory = Memory(mlxd.daemon, info.parameter_count)
        server, batch = Server(folder, blas_library()), Batch(folder, blas_library())
        contestants: list[Contestant] = [mlxd, server, batch]
        if options.our_blas:
            ours = Server(folder, blas_library("MLXD_BLAS"))
            ours.name = f"{SERVER}, our BLAS"
            contestants.append(ours)
        for contestant in contestants[1:]:
            stack.callback(contestant.stop)
        shares = await agreement(mlxd, server, batch, prompts)
        results = await measure(contestants, prompts, options)
        with mlxd.awake():
            memory.note_steady(wire.stats().memory)
    rows = summary(results, [contestant.name for contestant in contestants])
    report = Report(
        f"{info.name}, {info.computes_in}: {options.tokens} tokens in, {options.tokens} out,"
        f" {options.rounds} rounds; greedy agreement {shares[SERVER]:.0%}, {shares[BATCH]:.0%}",
        options,
    )
    judge(report, rows, memory)
    for name, value in (("rows", rows), ("rounds", results), ("agreement", shares)):
        report.fact(name, value)
    report.fact("memory", memory.numbers())
    header = ["streams", "", "tokens/s", "median TTFT s", "mlxd is", "its TTFT"]
    return report.end(markdown(header, map(_line, rows)))


def _line(row: dict[str, Any]) -> list[Any]:
    ours = row["who"] == OURS
    times = ["", ""] if ours else [f"{row['times']:.2f} x", f"{row['ttft_share']:.2f} x"]
    return [row["streams"], row["who"], row["tokens_per_s"], row["ttft_s"], *times]


if __name__ == "__main__":
    run(main)
