"""Shared by the parity tests: a checkpoint with its oracle, and comparisons over the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from daemon import Daemon
from oracle import TOLERANCE, Continuation, Oracle
from tiny_tokenizer import VOCABULARY
from wire import Wire

GREEDY = 32
TOP = 20


class Case:
    """A checkpoint on disk with its oracle and the prompts it is asked to continue."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.oracle = Oracle(folder)
        self._continuations: dict[int, Continuation] = {}

    def continuation(self, length: int) -> Continuation:
        """Returns a prompt of this length in tokens and its greedy output; searched once."""
        if length not in self._continuations:
            self._continuations[length] = self.oracle.stable(length, seed=7, count=GREEDY)
        return self._continuations[length]

    def text(self, length: int) -> list[int]:
        """Returns random ids to score."""
        return np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()


def assert_scores(case: Case, scores: Any, context: Sequence[int], start: int) -> float:
    """Compares a ScoreResponse for context[start:] with the oracle's forward over `context`.

    Returns the largest difference of an actual token, as a fraction of max |logit|.
    """
    expected, scale = case.oracle.logprobs(context)
    bound, apart = TOLERANCE * scale, 0.0
    assert [entry.token.token_id for entry in scores.tokens] == list(context[start:])
    for position, entry in enumerate(scores.tokens, start):
        assert entry.has_logprob == (position > 0)
        if position == 0:
            continue
        row = expected[position - 1]
        apart = max(apart, abs(entry.token.logprob - row[context[position]]))
        assert apart <= bound, f"{apart / scale:.1e} at {position}"
        top = np.array([item.logprob for item in entry.top])
        ids = [item.token_id for item in entry.top]
        # Equal values may come in either order, so ids are compared by their value.
        assert len(set(ids)) == TOP
        np.testing.assert_allclose(top, row[ids], rtol=0, atol=bound)
        np.testing.assert_allclose(top, np.sort(row)[::-1][:TOP], rtol=0, atol=bound)
    return apart / scale


def check_score(case: Case, wire: Wire, length: int) -> float:
    """Compares the scores of a text without a session."""
    text = case.text(length)
    return assert_scores(case, wire.score(case.name, text, TOP), text, 0)


def check_greedy(case: Case, wire: Wire, length: int) -> None:
    """Compares the continuation of a prompt without a session."""
    expected = case.continuation(length)
    reply = wire.generate(case.name, expected.prompt, max_tokens=GREEDY)
    assert list(reply.token_ids) == expected.output


def check_session(case: Case, wire: Wire) -> None:
    """Compares a session's turns on its cached prefix with fresh runs."""
    first = case.continuation(33)
    wire.create_session("prefix", case.name)
    try:
        reply = wire.generate(case.name, first.prompt, max_tokens=GREEDY, session="prefix")
        assert list(reply.token_ids) == first.output
        held = list(wire.get_session("prefix", include_token_ids=True).token_ids)
        assert held == first.prompt + first.output
        added = case.text(30)
        scores = wire.score(case.name, added, TOP, session="prefix")
        assert scores.usage.cached_tokens > 0
        assert_scores(case, scores, held + added, len(held))
        second = case.oracle.stable(9, seed=7, count=GREEDY, after=held)
        again = wire.generate(case.name, second.prompt, max_tokens=GREEDY, session="prefix")
        assert again.usage.cached_tokens >= len(held) - 1
        assert list(again.token_ids) == second.output
    finally:
        wire.delete_session("prefix")


@contextmanager
def daemons(
    root: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[int], Wire]]:
    """Yields a function from a prefill chunk size to a connection to its daemon, started once."""
    running: dict[int, tuple[Daemon, Wire]] = {}

    def wire(chunk: int) -> Wire:
        if chunk not in running:
            config = {"prefill_chunk_tokens": chunk}
            daemon = Daemon([root], config, environment=environment).start()
            running[chunk] = (daemon, daemon.wire())
        return running[chunk][1]

    try:
        yield wire
    finally:
        for daemon, connection in running.values():
            connection.channel.close()
            daemon.stop()
