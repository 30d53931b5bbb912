"""The daemon against mlx-lm on a GPU: random 4-bit weights, same machine, same run, alternating.

    MLXD_BIN=.../mlxd python tests/bench/gpu.py [--shapes llama-3.1-8b llama-3.2-1b] [--json FILE]

Decode speed is the tokens that all streams got while all of them decoded, over that time: from the
first token of the last stream to start, to the last token of the first stream to end. Ours is
measured at a gRPC client, theirs in their own process. Every prompt is new, so no prefix is shared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "support"))

from daemon import Daemon
from tiny_tokenizer import write_tokenizer
from wire import Wire

PEER = Path(__file__).with_name("gpu_peer.py")
OURS, THEIRS = "mlxd", "mlx-lm"
# Promised tokens/s on one H200 as a multiple of the peer's, by shape and case.
PROMISED = {
    ("llama-3.1-8b", "1 x 128"): 1.0,
    ("llama-3.1-8b", "8 x 128"): 2.0,
    ("llama-3.1-8b", "32 x 128"): 4.0,
    ("llama-3.1-8b", "32 x 64..2048"): 3.0,
    ("llama-3.2-1b", "1 x 128"): 1.2,
}

# Largest mean difference of log-probabilities from the peer's: bfloat16 rounds both, a wrong
# kernel gives 1.
DIFFERENCE_MAX = 0.1

Times = list[list[float]]
Run = Callable[[list[list[int]], int], Times]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="mlxd against mlx-lm on a GPU")
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--root", type=Path, help="folder of the checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="tokens out")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--no-mixed", action="store_true", help="no prompts of 64 to 2048 tokens")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--budget-gb", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--check", action="store_true", help="fail if a promise is not met")
    return parser.parse_args()


def checkpoint(root: Path, shape: str) -> Path:
    """Returns the folder of a checkpoint; makes it if it is missing."""
    folder = root / shape
    if not (folder / "tokenizer.json").exists():
        subprocess.run([sys.executable, str(PEER), "make", str(folder), shape], check=True)
        write_tokenizer(folder)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        pad_tokenizer(folder / "tokenizer.json", vocabulary)
    return folder


def pad_tokenizer(file: Path, vocabulary: int) -> None:
    """Gives every id of the vocabulary a text."""
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    ids |= {f"w{number}": number for number in range(len(ids), vocabulary)}
    file.write_text(json.dumps(tokenizer))


class Peer:
    """mlx-lm in a process of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends one command and returns its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        """Generates, one stream per prompt."""
        return self.ask(prompts=prompts, tokens=tokens)["times"]


class Ours:
    """The daemon through its API; a context manager."""

    def __init__(self, folder: Path, budget_gb: int) -> None:
        self.model = folder.name
        config = {"memory_budget_bytes": budget_gb << 30}
        self.daemon = Daemon([folder.parent], config, models=[folder.name])
        self.stack = ExitStack()

    def __enter__(self) -> Ours:
        self.stack.enter_context(self.daemon)
        self.wire = self.stack.enter_context(self.daemon.wire())
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def together(self, prompts: list[list[int]], stream: Callable[[list[int]], Any]) -> list[Any]:
        """Runs all prompts at once."""
        try:
            with ThreadPoolExecutor(len(prompts)) as threads:
                return list(threads.map(stream, prompts))
        except Exception:
            print(self.daemon.log[-4000:], file=sys.stderr)
            raise

    def run(self, prompts: list[list[int]], tokens: int) -> Times:
        """Generates, one stream per prompt."""
        start = time.perf_counter()
        return self.together(
            prompts, lambda prompt: list(stamps(self.wire, self.model, prompt, tokens, start))
        )

    def chosen(self, prompt: list[int], tokens: int) -> list[tuple[int, float]]:
        """Returns the ids of an answer, each with its log-probability."""
        events = self.wire.stream(self.model, prompt, max_tokens=tokens, logprobs=0)
        tokens_ = [token.chosen for event in events for token in event.delta.logprobs]
        return [(token.token_id, token.logprob) for token in tokens_]


def agreement(mine: Ours, peer: Peer, lengths: list[int], tokens: int = 32) -> dict[str, float]:
    """Compares our log-probabilities of our own batched answers with the peer's."""
    given = prompts(lengths)
    answers = mine.together(given, lambda prompt: mine.chosen(prompt, tokens))
    differences = []
    for prompt, answer in zip(given, answers, strict=True):
        assert len(answer) == tokens
        ids = prompt + [id_ for id_, _ in answer]
        theirs = peer.ask(**{"ids": ids, "from": len(prompt)})["logprobs"]
        differences += [abs(a - b) for (_, a), b in zip(answer, theirs, strict=True)]
    return {"mean": sum(differences) / len(differences), "max": max(differences)}


def stamps(wire: Wire, name: str, prompt: list[int], tokens: int, start: float) -> Iterator[float]:
    """Returns the arrival time of each token of a stream."""
    got = 0
    for event in wire.stream(name, prompt, max_tokens=tokens):
        now = time.perf_counter() - start
        for _ in event.delta.token_ids:
            got += 1
            yield now
    assert got == tokens, f"{got} tokens instead of {tokens}"


def decode_speed(times: Times) -> float:
    """Returns the tokens per second while all streams decode."""
    begin, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    assert end - begin > 0.5, "the streams hardly ran together: ask for more tokens"
    count = sum(begin < at <= end for stream in times for at in stream)
    return count / (end - begin)


def cases(options: argparse.Namespace) -> dict[str, tuple[list[int], int]]:
    """Prompt lengths and tokens out by name."""
    found = {f"{n} x 128": ([128] * n, options.tokens) for n in options.streams}
    if not options.no_mixed:
        lengths = [64 + 1984 * stream // 31 for stream in range(32)]
        # The first to start must not have ended long before the last one starts.
        found["32 x 64..2048"] = (lengths, 3 * options.tokens)
    return found


def prompts(lengths: list[int]) -> list[list[int]]:
    """Makes random prompts."""
    generator = random.Random(time.time_ns())
    return [[generator.randrange(3, 128000) for _ in range(length)] for length in lengths]


def measure(
    shape: str, runs: dict[str, Run], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Runs all rounds: each case with each contestant."""
    for case, (lengths, tokens) in cases(options).items():
        for run in runs.values():
            run(prompts(lengths), 16)
        for round_ in range(options.rounds):
            for who, run in runs.items():
                times = run(prompts(lengths), tokens)
                first = [stream[0] for stream in times]
                result = {
                    "shape": shape,
                    "case": case,
                    "who": who,
                    "round": round_,
                    "tokens_per_s": decode_speed(times),
                    "ttft_s": median(first),
                    "ttft_max_s": max(first),
                }
                print(
                    f"{shape}  {case:<14} {who:<7}{result['tokens_per_s']:9.1f} tokens/s"
                    f"  TTFT {result['ttft_s']:.3f} s, last {result['ttft_max_s']:.3f} s",
                    file=sys.stderr,
                    flush=True,
                )
                yield result


def report(results: list[dict[str, Any]]) -> bool:
    """Prints medians as Markdown; returns whether every promise was met."""
    print("| shape | streams x prompt | mlxd tokens/s | mlx-lm | ratio | promised |")
    print("|---|---|---|---|---|---|")
    kept = True
    for shape, case in dict.fromkeys((r["shape"], r["case"]) for r in results):
        speeds = {
            who: [
                r["tokens_per_s"]
                for r in results
                if (r["shape"], r["case"], r["who"]) == (shape, case, who)
            ]
            for who in (OURS, THEIRS)
        }
        mine = f"{median(speeds[OURS]):.1f}" if speeds[OURS] else ""
        if not (speeds[OURS] and speeds[THEIRS]):
            print(f"| {shape} | {case} | {mine} | | | |")
            continue
        ratio = median(a / b for a, b in zip(speeds[OURS], speeds[THEIRS], strict=True))
        promised = PROMISED.get((shape, case))
        kept &= promised is None or ratio >= promised
        print(
            f"| {shape} | {case} | {mine} | {median(speeds[THEIRS]):.1f} | {ratio:.2f} |"
            f" {promised or ''} |"
        )
    return kept


def main() -> None:
    """Measures, prints and judges."""
    options = arguments()
    results, kept = [], True
    with ExitStack() as stack:
        root = options.root
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxd-gpu-")))
        for shape in options.shapes:
            folder = checkpoint(root, shape)
            with ExitStack() as running:
                mine = running.enter_context(Ours(folder, options.budget_gb))
                runs = {OURS: mine.run}
                if not options.no_peer:
                    peer = running.enter_context(Peer(folder))
                    runs[THEIRS] = peer.run
                    for lengths in ([20], [5, 100, 300, 17, 64, 1000, 2, 31], [40] * 20):
                        found = agreement(mine, peer, lengths)
                        print(f"{shape}  {len(lengths)} prompts: log-probabilities {found}")
                        kept &= found["mean"] <= DIFFERENCE_MAX
                for result in measure(shape, runs, options):
                    results.append(result)
                    if options.json:
                        options.json.write_text(json.dumps(results, indent=2) + "\n")
    kept &= report(results)
    if options.check and not kept:
        sys.exit(1)


if __name__ == "__main__":
    main()
