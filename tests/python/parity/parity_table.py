"""Every architecture beside mlx-lm, in every storage: `make parity`.

    parity_table.py [--architectures a,b] [--draws N]

Prints the largest difference of a log-probability over all positions, of max |logit|, and whether
greedy output is the same; then a sweep of random configurations, each of which must agree or be
refused by name. Stored floats are cast to float32 in mlx-lm, and quantized weights are the same
ones. Exits with 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc

from architecture_rows import ROWS
from oracle import TOLERANCE
from parity_cases import GREEDY, Case, daemons
from tiny_models import STORAGES, Architecture, build
from wire import Wire, failure

SCORED = 150
PROMPT = 33
REFUSALS = ("MODEL_UNSUPPORTED",)


@dataclass(frozen=True)
class Cell:
    """The result of one checkpoint."""

    apart: float = 0.0
    greedy: bool = False
    refused: str = ""

    @property
    def good(self) -> bool:
        """Tells whether it agrees."""
        return self.apart <= TOLERANCE and self.greedy

    def __str__(self) -> str:
        if self.refused:
            return "refused"
        return f"{self.apart:.0e} {'=' if self.greedy else 'DIFFERS'}"


def compare(folder: Path, wire: Wire) -> Cell:
    """Scores a text and continues a prompt in both."""
    try:
        wire.load(folder.name)
    except grpc.RpcError as error:
        found = failure(error)
        if found.reason in REFUSALS:
            return Cell(refused=found.message)
        raise
    case = Case(folder)
    text = case.text(SCORED)
    expected, scale = case.oracle.logprobs(text)
    scores = wire.score(case.name, text).tokens
    apart = max(
        abs(entry.token.logprob - expected[position - 1][text[position]])
        for position, entry in enumerate(scores[1:], 1)
    )
    prompt = case.continuation(PROMPT)
    reply = wire.generate(case.name, prompt.prompt, max_tokens=GREEDY)
    wire.unload(folder.name)
    return Cell(float(apart / scale), list(reply.token_ids) == prompt.output)


def table(rows: list[Architecture], root: Path, wire: Wire) -> bool:
    """Every architecture in every storage."""
    print(f"{'':18}" + "".join(f"{storage:>14}" for storage in STORAGES), flush=True)
    good = True
    for row in rows:
        cells = []
        for storage in STORAGES:
            folder = build(row, row.base(), root / f"{row.label}-{storage}", storage)
            cells.append(compare(folder, wire))
        good &= all(cell.good for cell in cells)
        print(f"{row.label:18}" + "".join(f"{cell!s:>14}" for cell in cells), flush=True)
    return good


def sweep(rows: list[Architecture], draws: int, root: Path, wire: Wire) -> bool:
    """Configurations drawn at random."""
    print(f"\n{'':18}{'draws':>7}{'agree':>7}{'refused':>9}{'worst':>9}", flush=True)
    good = True
    for row in rows:
        cells = []
        for seed in range(draws):
            config = row.draw(seed)
            cell = compare(build(row, config, root / f"{row.label}-draw-{seed}"), wire)
            cells.append(cell)
            if not cell.good:
                print(f"  {row.label} {seed}: {cell} {cell.refused} {config}", flush=True)
        agree, refused = sum(c.good for c in cells), sum(bool(c.refused) for c in cells)
        worst = max((c.apart for c in cells), default=0.0)
        print(f"{row.label:18}{draws:>7}{agree:>7}{refused:>9}{worst:>9.0e}", flush=True)
        good &= agree + refused == draws
    return good


def main() -> int:
    """The table and the sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", help="names with commas; all by default")
    parser.add_argument("--draws", type=int, default=10, help="configurations of each")
    args = parser.parse_args()
    wanted = args.architectures.split(",") if args.architectures else None
    rows = [row for row in ROWS if wanted is None or row.label in wanted]
    with tempfile.TemporaryDirectory() as folder, daemons(Path(folder)) as wires:
        root = Path(folder)
        good = table(rows, root, wires(64))
        good &= sweep(rows, args.draws, root, wires(64))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
