"""Percentiles, and the benches' output: tables, promises met or missed, JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from daemon import default_model


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of the values that `percent` % of them do not exceed (nearest rank).

    NaN if there are none; no promise is met by that.
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(rank, 1) - 1]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, p95 and p99 of times."""
    values = list(values)
    return {
        "p50": percentile(values, 50),
        "p95": percentile(values, 95),
        "p99": percentile(values, 99),
    }


def run(main: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Runs a bench, and fails if its verdict is False; on SIGTERM too, the processes it started
    end with it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Not from within: gRPC's callbacks that were due would run twice.
    sys.exit(not asyncio.run(main()))


def parser(description: str, rounds: int = 3) -> argparse.ArgumentParser:
    """Makes the parser of the options common to all benches."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--model", type=Path, default=default_model(), help="model folder")
    made.add_argument("--rounds", type=int, default=rounds, help="results are medians over them")
    made.add_argument("--json", type=Path, help="write everything measured here")
    made.add_argument("--check", action="store_true", help="fail if a promise is not met")
    made.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    return made


@dataclass(frozen=True)
class Promise:
    """A bound, and what was measured."""

    what: str
    measured: float
    bound: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Tells whether the measurement is within the bound; NaN is not."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "ok    " if self.met else "MISSED"
        return f"{verdict}  {self.what}: {self.measured:.3g}{self.unit} ({sign} {self.bound:g})"


class Report:
    """The results of one bench: rows of numbers, medians as a table, promises."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self.title = title
        self.options = options
        self.promises: list[Promise] = []
        self.facts: dict[str, Any] = {}

    def promise(self, what: str, measured: float, bound: float, **how: Any) -> None:
        """Adds a promise."""
        self.promises.append(Promise(what, measured, bound, **how))

    def fact(self, name: str, value: Any) -> None:
        """Adds a number, or a list of them, to the JSON."""
        self.facts[name] = value

    def end(self, table: str) -> bool:
        """Prints all and writes the JSON; returns whether what was to be checked is met."""
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        print(f"\n{self.title}\n{machine}, seed {self.options.seed}\n\n{table}\n")
        for promise in self.promises:
            print(promise)
        if self.options.json:
            everything = {
                "title": self.title,
                "machine": machine,
                "options": {k: str(v) for k, v in vars(self.options).items()},
                "promises": [{**vars(p), "met": p.met} for p in self.promises],
                **self.facts,
            }
            self.options.json.write_text(json.dumps(everything, indent=2) + "\n")
        return not self.options.check or all(promise.met for promise in self.promises)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats get three digits."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(_cell(cell) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def medians(rounds: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """The median over the rounds of each of the keys."""
    return {key: median(round_[key] for round_ in rounds) for key in keys}
