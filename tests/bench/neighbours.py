"""Numbers 4, 5 and 7: the effect of a long prompt on other streams, long prompts together, and
what else may go on beside a stream.

    tests/bench/run.sh neighbours [--long 4000] [--lengths 6000 1000 10] [--rounds 3] [--check]
    tests/bench/run.sh neighbours --only 7 [--seconds 4]

4: four streams decode; a prompt of 4,000 tokens arrives. Gaps between the pieces of a stream
   before and while the prompt runs, and the prompt's time to first token against that alone.
5: prompts of 6,000, 1,000 and 10 tokens, started together and one after another.
7: one stream decodes; in every other window of some seconds its own model or another one prefills
   prompts of 500 to 2,000 tokens, another one loads again and again, or 64 callers ask whether one
   would fit; then four streams beside each of the worst attackers of test_neighbours.py alone, and
   beside all of them, once as normal ones and once as interactive ones.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from beside import SCENES, Beside, daemon_of_three
from dense import dense
from peers import OURS, SERVER, Contestant, Mlxd, Server, bench_cache, blas_library
from stats import Report, markdown, medians, parser, percentile, run
from streams import Heard, Prompts, after_each_other, while_they_run

STREAMS, SHORT = 4, 64
# Number 4: tokens that the streams decode undisturbed before the prompt arrives.
QUIET_TOKENS = 48
# Number 5: tokens of each answer.
ANSWER = 32


async def neighbour(contestant: Contestant, prompts: Prompts, length: int) -> dict[str, float]:
    """Number 4, one round."""
    now = asyncio.get_running_loop().time
    _, (alone,) = await contestant.together([prompts.ask(length, 1)])

    heard = [Heard(now()) for _ in range(STREAMS)]
    streams = [asyncio.create_task(contestant.hear(prompts.ask(SHORT, 4000), one)) for one in heard]

    async def until(tokens: int) -> float:
        goals = [one.tokens + tokens for one in heard]
        await while_they_run(
            streams, lambda: any(one.tokens < goal for one, goal in zip(heard, goals, strict=True))
        )
        return now()

    start = await until(2)
    quiet_end = await until(QUIET_TOKENS)
    quiet = [gap for one in heard for gap in one.gaps(start, quiet_end)]
    _, (crowded,) = await contestant.together([prompts.ask(length, 1)])
    end = crowded.times[0]
    # A stream that got nothing while the prompt ran shows its gap only with its next piece.
    await until(1)
    disturbed = [gap for one in heard for gap in one.gaps(quiet_end, end)]
    tokens = sum(
        count
        for one in heard
        for at, count in zip(one.times, one.counts, strict=True)
        if quiet_end < at <= end
    )
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return {
        "gap_p50_quiet_s": median(quiet),
        "gap_p95_quiet_s": percentile(quiet, 95),
        "gap_p50_s": median(disturbed),
        "gap_p95_s": percentile(disturbed, 95),
        "gap_max_s": max(disturbed),
        "gap_times": percentile(disturbed, 95) / median(quiet),
        "gap_times_p95": percentile(disturbed, 95) / percentile(quiet, 95),
        "ttft_alone_s": alone.ttft,
        "ttft_s": crowded.ttft,
        "ttft_times": crowded.ttft / alone.ttft,
        "streams_tokens_per_s": tokens / (end - quiet_end),
    }


async def lengths(contestant: Contestant, prompts: Prompts, tokens: list[int]) -> dict[str, float]:
    """Number 5, one round."""
    together_s, _ = await contestant.together([prompts.ask(length, ANSWER) for length in tokens])
    asks = [prompts.ask(length, ANSWER) for length in tokens]
    apart_s, _ = await after_each_other(contestant.hear, asks)
    return {"together_s": together_s, "apart_s": apart_s, "times": together_s / apart_s}


async def scenes(options: argparse.Namespace, report: Report) -> list[list[Any]]:
    """Number 7; returns rows of its table."""
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="mlxd-bench-") as root,
        daemon_of_three(options.model, Path(root)) as contestant,
    ):
        prompts = Prompts(options.model, options.seed)
        beside = Beside(contestant, options.model, prompts, options.seconds)
        for name, scene in SCENES.items():
            found[name] = await beside.scene(scene, options.rounds)
            print(f"{name}: {found[name]}", file=sys.stderr)
            what = f"7: {name}: p95 of the streams' gaps, as times the quiet median"
            report.promise(what, found[name]["times"], scene.bound)
    report.fact("scenes", found)
    return [[7, f"{scene}: {key}", v] for scene, of in found.items() for key, v in of.items()]


async def main() -> bool:
    """Measures, prints and judges."""
    made = parser(__doc__)
    made.add_argument("--long", type=int, default=4000, help="tokens of the prompt, number 4")
    made.add_argument("--lengths", type=int, nargs="+", default=[6000, 1000, 10])
    made.add_argument(
        "--peer-rounds", type=int, default=1, help="rounds of the peer, which is slow"
    )
    made.add_argument("--only", type=int, choices=(7,), help="measure only this number")
    made.add_argument("--seconds", type=float, default=4.0, help="length of a window, number 7")
    options = made.parse_args()
    if options.only:
        report = Report(f"{options.model.name}; {options.rounds} rounds", options)
        return report.end(markdown(["number", "median of", OURS], await scenes(options, report)))
    found: dict[str, dict[str, list[dict[str, float]]]] = {"4": {}, "5": {}}
    with ExitStack() as stack:
        contestants: list[Contestant] = [Mlxd(options.model)]
        if options.peer_rounds:
            folder = dense(options.model, bench_cache())
            contestants.append(Server(folder, blas_library()))
        for contestant in contestants:
            stack.callback(contestant.stop)
        prompts = Prompts(options.model, options.seed)
        for round_ in range(options.rounds):
            for contestant in contestants[: 1 if round_ >= options.peer_rounds else None]:
                with contestant.awake():
                    await contestant.together(prompts.asks(STREAMS, SHORT, 4))
                    measured: dict[str, Any] = {
                        "4": await neighbour(contestant, prompts, options.long),
                        "5": await lengths(contestant, prompts, options.lengths),
                    }
                for number, values in measured.items():
                    found[number].setdefault(contestant.name, []).append(values)
                print(f"round {round_ + 1}, {contestant.name}: {measured}", file=sys.stderr)
    report = Report(
        f"{options.model.name}; 4: {options.long} tokens come while {STREAMS} streams decode;"
        f" 5: {options.lengths} tokens in, {ANSWER} out; {options.rounds} rounds",
        options,
    )
    ours = {n: medians(of[OURS], list(of[OURS][0])) for n, of in found.items()}
    what = "4: p95 of the streams' gaps, as times the median gap before"
    report.promise(what, ours["4"]["gap_times"], 3.0)
    report.promise("4: the prompt's TTFT, as times that alone", ours["4"]["ttft_times"], 1.6)
    report.promise("5: together, as times one after another", ours["5"]["times"], 1.0)
    report.fact("rounds", found)
    names = [name for name in (OURS, SERVER) if name in found["4"]]
    rows = [
        [number, key, *(median(r[key] for r in of[name]) for name in names)]
        for number, of in found.items()
        for key in of[OURS][0]
    ]
    rows += [[*row, *[""] * (len(names) - 1)] for row in await scenes(options, report)]
    return report.end(markdown(["number", "median of", *names], rows))


if __name__ == "__main__":
    run(main)
