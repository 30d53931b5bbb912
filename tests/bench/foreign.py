"""Whether somebody can tell by the time to first token that another principal sent a prefix.

    tests/bench/run.sh foreign [--tries 200] [--tokens 400] [--check]

The peer of the unix socket sends prompts; the holder of the token, on TCP, sends the same prompts,
and others of the same length that nobody sent, in random order, on a tiny random llama. Both times
should be drawn from one distribution: the largest distance between the two is that of Kolmogorov
and Smirnov, which chance exceeds once in a hundred times at 1.63 x sqrt(2 / tries). The table shows
a prompt of the caller's own beside them.
"""

from __future__ import annotations

import random
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

from checkpoints import Checkpoint, build
from daemon import Daemon, free_port
from stats import Report, markdown, parser, run, spread
from tiny_tokenizer import VOCABULARY
from wire import Wire

TOKEN = "a-token-of-the-bench"
CRITICAL = 1.63
FOREIGN, UNKNOWN, OWN = "foreign", "unknown", "own"


def distance(a: list[float], b: list[float]) -> float:
    """The largest difference of the parts of both that are at most some value."""
    a, b = sorted(a), sorted(b)
    return max(
        abs(bisect_right(a, value) / len(a) - bisect_right(b, value) / len(b)) for value in a + b
    )


class Tries:
    """Times to first token of a caller, by what the daemon has of its prompt."""

    def __init__(self, owner: Wire, caller: Wire, tokens: int, seed: int) -> None:
        self.owner, self.caller, self.tokens = owner, caller, tokens
        self.random = random.Random(seed)
        self.seconds: dict[str, list[float]] = {FOREIGN: [], UNKNOWN: [], OWN: []}

    def prompt(self) -> list[int]:
        """A prompt that no other begins like."""
        return [self.random.randrange(4, VOCABULARY) for _ in range(self.tokens)]

    def one(self) -> None:
        """A try of each kind, in random order."""
        foreign, own = self.prompt(), self.prompt()
        self.owner.generate("tiny", foreign, max_tokens=1)
        self.caller.generate("tiny", own, max_tokens=1)
        asks = [(FOREIGN, foreign), (UNKNOWN, self.prompt()), (OWN, own)]
        self.random.shuffle(asks)
        for kind, prompt in asks:
            begun = time.perf_counter()
            reply = self.caller.generate("tiny", prompt, max_tokens=1)
            self.seconds[kind].append(time.perf_counter() - begun)
            assert (reply.usage.cached_tokens > 8) == (kind == OWN), kind


async def main() -> bool:
    """Measures, and reports."""
    made = parser(__doc__ or "")
    made.add_argument("--tries", type=int, default=200)
    made.add_argument("--tokens", type=int, default=400, help="of a prompt")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        long = {"max_position_embeddings": 8192, "num_key_value_heads": 2}
        build(Checkpoint("tiny", long), root / "models", seed=1)
        (root / "token").write_text(TOKEN)
        (root / "token").chmod(0o600)
        address = f"127.0.0.1:{free_port()}"
        config = {"listen": address, "token_file": str(root / "token")}
        with (
            Daemon([root / "models"], config, models=["tiny"]) as daemon,
            daemon.wire() as owner,
            daemon.wire(address, TOKEN) as caller,
        ):
            tries = Tries(owner, caller, options.tokens, options.seed)
            for _ in range(5):
                tries.one()
            for times in tries.seconds.values():
                times.clear()
            for _ in range(options.tries):
                tries.one()
    report = Report(f"Tiny llama, {options.tokens} tokens in, {options.tries} tries", options)
    apart = distance(tries.seconds[FOREIGN], tries.seconds[UNKNOWN])
    bound = CRITICAL * (2 / options.tries) ** 0.5
    report.promise("distance of foreign and unknown prefixes", apart, round(bound, 3))
    report.fact("seconds", tries.seconds)
    rows = [
        [kind, *(1000 * value for value in spread(times).values())]
        for kind, times in tries.seconds.items()
    ]
    return report.end(markdown(["TTFT ms", "p50", "p95", "p99"], rows))


if __name__ == "__main__":
    run(main)
