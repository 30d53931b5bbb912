"""What a client asks and hears, whoever answers: prompts of exact lengths, and streams with the
time of every piece.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer


@dataclass
class Ask:
    """One request: greedy, past end-of-text tokens."""

    prompt: str
    ids: list[int]
    tokens: int
    # Names the caller for fairness, where that is known.
    client: str = ""


@dataclass
class Heard:
    """The answer, as it came in; times are of `loop.time()`."""

    asked: float
    # When each piece arrived, and how many tokens it had.
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    queue_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens heard."""
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """From the request to the first token."""
        return self.times[0] - self.asked

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Times between pieces that arrived within the window."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [b - a for a, b in pairs if start <= b and a <= end]


Hear = Callable[[Ask, Heard], Awaitable[None]]


async def together(hear: Hear, asks: Sequence[Ask]) -> tuple[float, list[Heard]]:
    """All requests at once; the seconds until all were answered, and the answers."""
    now = asyncio.get_running_loop().time
    start = now()
    heard = [Heard(start) for _ in asks]
    await asyncio.gather(*(hear(a, h) for a, h in zip(asks, heard, strict=True)))
    return now() - start, heard


async def after_each_other(hear: Hear, asks: Sequence[Ask]) -> tuple[float, list[Heard]]:
    """As `together`, but each request starts when the one before has ended."""
    now = asyncio.get_running_loop().time
    start = now()
    heard = []
    for ask in asks:
        heard.append(Heard(now()))
        await hear(ask, heard[-1])
    return now() - start, heard


class Prompts:
    """Random prompts that are the same number of tokens as text and as ids."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.random = random.Random(seed)

    @cached_property
    def words(self) -> list[tuple[str, int]]:
        """Tokens that are a space and letters. Tokenizers split there, so they never merge."""
        found = []
        for i in range(self.tokenizer.get_vocab_size()):
            text = self.tokenizer.decode([i])
            if re.fullmatch(r" [A-Za-z]+", text) and self.tokenizer.encode(text).ids == [i]:
                found.append((text, i))
        assert len(found) > 20, "too few whole words in the vocabulary"
        return found

    def ask(self, length: int, tokens: int, client: str = "") -> Ask:
        """A request with a new prompt."""
        words = self.random.choices(self.words, k=length)
        prompt = "".join(word for word, _ in words)
        ids = [i for _, i in words]
        assert self.tokenizer.encode(prompt).ids == ids
        return Ask(prompt, ids, tokens, client)

    def asks(self, count: int, length: int, tokens: int) -> list[Ask]:
        """Several."""
        return [self.ask(length, tokens) for _ in range(count)]
