"""Requests and answers, independent of the server: prompts of exact lengths, and streams with the
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
from typing import Any

from tokenizers import Tokenizer


@dataclass
class Ask:
    """One request: greedy, past end-of-text tokens."""

    prompt: str
    ids: list[int]
    tokens: int
    # Identifies the client to servers that are fair between clients.
    client: str = ""


@dataclass
class Heard:
    """The answer, as it arrives; times are of `loop.time()`, in seconds."""

    asked: float
    # Arrival time of each piece, and its number of tokens.
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    queue_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of tokens received."""
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """Time from the request to the first token, in seconds."""
        return self.times[0] - self.asked

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Times between pieces that arrived within the window."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [b - a for a, b in pairs if start <= b and a <= end]


Hear = Callable[[Ask, Heard], Awaitable[None]]


async def together(hear: Hear, asks: Sequence[Ask]) -> tuple[float, list[Heard]]:
    """Runs all requests at once; returns the seconds until the last answer, and the answers."""
    now = asyncio.get_running_loop().time
    start = now()
    heard = [Heard(start) for _ in asks]
    await asyncio.gather(*(hear(a, h) for a, h in zip(asks, heard, strict=True)))
    return now() - start, heard


async def while_they_run(streams: Sequence[asyncio.Task[Any]], waits: Callable[[], bool]) -> None:
    """Polls while `waits` holds.

    Raises:
        RuntimeError: a stream ended, so that it could hold without end.
    """
    while waits():
        for stream in streams:
            if stream.done():
                stream.result()
                raise RuntimeError("a stream ended before what is measured beside it")
        await asyncio.sleep(0.005)


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
    """Random prompts with the same number of tokens as text and as ids."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.random = random.Random(seed)

    @cached_property
    def words(self) -> list[tuple[str, int]]:
        """Returns tokens of a space and letters. Tokenizers split there, so they never merge."""
        found = []
        for i in range(self.tokenizer.get_vocab_size()):
            text = self.tokenizer.decode([i])
            if re.fullmatch(r" [A-Za-z]+", text) and self.tokenizer.encode(text).ids == [i]:
                found.append((text, i))
        assert len(found) > 20, "too few whole words in the vocabulary"
        return found

    def ask(self, length: int, tokens: int, client: str = "") -> Ask:
        """Makes a request with a new prompt."""
        words = self.random.choices(self.words, k=length)
        prompt = "".join(word for word, _ in words)
        ids = [i for _, i in words]
        assert self.tokenizer.encode(prompt).ids == ids
        return Ask(prompt, ids, tokens, client)

    def asks(self, count: int, length: int, tokens: int) -> list[Ask]:
        """Makes several."""
        return [self.ask(length, tokens) for _ in range(count)]
