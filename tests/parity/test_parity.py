"""The daemon against mlx-lm over the wire, on every tiny checkpoint.

Compared are the log-probability of each actual next token, the top 20 at each position, and 32
greedy ids: alone, in a mixed batch of 8, with prefill chunks of 1, 7 and 512, and on top of a
session's cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from checkpoints import PARITY, Checkpoint, build
from daemon import Daemon
from oracle import TOLERANCE, Continuation, Oracle
from tiny_tokenizer import VOCABULARY
from wire import Wire

GREEDY = 32
TOP = 20
# Shorter and longer than a chunk of 7, whole and not whole multiples of it, and 250,
# which passes 256 on the way.
LENGTHS = (1, 5, 14, 15, 33, 64, 100, 250)
# The longest text scored for a chunk size: more than one chunk, in bearable time.
SCORED = {1: 40, 7: 100, 512: 700}


class Case:
    """A checkpoint on disk with its oracle and the prompts it is asked to continue."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.oracle = Oracle(folder)
        self._continuations: dict[int, Continuation] = {}

    def continuation(self, length: int) -> Continuation:
        """A prompt of this length and its greedy output; found once."""
        if length not in self._continuations:
            self._continuations[length] = self.oracle.stable(length, seed=7, count=GREEDY)
        return self._continuations[length]

    def text(self, length: int) -> list[int]:
        """Random ids to score."""
        return np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with every checkpoint."""
    made = tmp_path_factory.mktemp("parity")
    for seed, checkpoint in enumerate(PARITY):
        build(checkpoint, made, seed)
    return made


@pytest.fixture(scope="session")
def cases(root: Path) -> Callable[[str], Case]:
    """The case of a name; made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(root / name)
        return made[name]

    return case


@pytest.fixture(scope="session")
def wires(root: Path) -> Iterator[Callable[[int], Wire]]:
    """A connection to the daemon of a prefill chunk size; started once."""
    running: dict[int, tuple[Daemon, Wire]] = {}

    def wire(chunk: int) -> Wire:
        if chunk not in running:
            daemon = Daemon([root], {"prefill_chunk_tokens": chunk}).start()
            running[chunk] = (daemon, daemon.wire())
        return running[chunk][1]

    yield wire
    for daemon, connection in running.values():
        connection.channel.close()
        daemon.stop()


def assert_scores(case: Case, scores: Any, context: Sequence[int], start: int) -> None:
    """Compares a ScoreResponse for context[start:] with the oracle's forward over `context`."""
    expected, scale = case.oracle.logprobs(context)
    bound = TOLERANCE * scale
    assert [entry.token.token_id for entry in scores.tokens] == list(context[start:])
    for position, entry in enumerate(scores.tokens, start):
        assert entry.has_logprob == (position > 0)
        if position == 0:
            continue
        row = expected[position - 1]
        assert abs(entry.token.logprob - row[context[position]]) <= bound, f"at {position}"
        top = np.array([item.logprob for item in entry.top])
        ids = [item.token_id for item in entry.top]
        # Equal values may come in either order, so ids are compared by their value.
        assert len(set(ids)) == TOP
        np.testing.assert_allclose(top, row[ids], rtol=0, atol=bound)
        np.testing.assert_allclose(top, np.sort(row)[::-1][:TOP], rtol=0, atol=bound)


def check_score(case: Case, wire: Wire, length: int) -> None:
    """Scores a text that stands alone."""
    text = case.text(length)
    assert_scores(case, wire.score(case.name, text, TOP), text, 0)


def check_greedy(case: Case, wire: Wire, length: int) -> None:
    """Continues a prompt that stands alone."""
    expected = case.continuation(length)
    reply = wire.generate(case.name, expected.prompt, max_tokens=GREEDY)
    assert list(reply.token_ids) == expected.output


def parametrized(test: Callable[..., None]) -> Callable[..., None]:
    """One test per checkpoint."""
    return pytest.mark.parametrize("checkpoint", PARITY, ids=lambda c: c.name)(test)


@pytest.mark.parametrize("chunk", SCORED)
@parametrized
def test_alone_it_scores_and_continues_as_mlx_lm_does(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], checkpoint: Checkpoint, chunk: int
) -> None:
    case, wire = cases(checkpoint.name), wires(chunk)
    check_score(case, wire, SCORED[chunk])
    for length in (1, 15, 33):
        check_greedy(case, wire, length)


@pytest.mark.parametrize("chunk", [7, 512])
@parametrized
def test_in_a_mixed_batch_of_eight_nothing_changes(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], checkpoint: Checkpoint, chunk: int
) -> None:
    case, wire = cases(checkpoint.name), wires(chunk)
    greedy = [partial(check_greedy, case, wire, length) for length in LENGTHS[2::2] + LENGTHS[-2:]]
    scores = [partial(check_score, case, wire, length) for length in (2, 20, 90)]
    for length in LENGTHS:
        case.continuation(length)
    work = [*greedy, *scores]
    assert len(work) == 8
    wire.load(case.name)
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(check) for check in work]:
            done.result()


def test_concurrent_requests_share_their_steps(
    cases: Callable[[str], Case], wires: Callable[[int], Wire]
) -> None:
    case, wire = cases(PARITY[0].name), wires(512)
    wire.load(case.name)
    prompt, clients, tokens = case.text(16), 8, 400
    before = wire.stats().steps_total
    with ThreadPoolExecutor(clients) as threads:
        replies = list(
            threads.map(
                lambda _: wire.generate(case.name, prompt, max_tokens=tokens), range(clients)
            )
        )
    steps = wire.stats().steps_total - before
    assert len({tuple(reply.token_ids) for reply in replies}) == 1
    # One by one it would be 8 x 400; together 400 and a few while the last ones join.
    assert steps < clients * tokens / 2


@parametrized
def test_a_session_s_cached_prefix_changes_nothing(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], checkpoint: Checkpoint
) -> None:
    case, wire = cases(checkpoint.name), wires(512)
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
        expected, _ = case.oracle.greedy(held + added[:9], GREEDY)
        again = wire.generate(case.name, added[:9], max_tokens=GREEDY, session="prefix")
        assert again.usage.cached_tokens >= len(held) - 1
        assert list(again.token_ids) == expected
    finally:
        wire.delete_session("prefix")


@pytest.mark.parametrize(
    "checkpoint", [c for c in PARITY if c.quantized], ids=lambda checkpoint: checkpoint.name
)
def test_where_dense_weights_do_not_fit_it_computes_with_packed_ones(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], root: Path, checkpoint: Checkpoint
) -> None:
    case = cases(checkpoint.name)
    (dense,) = [
        event.loaded.model for event in wires(512).load(case.name) if event.HasField("loaded")
    ]
    assert dense.computes_in == "float32, dequantized at load"
    daemon = Daemon([root], {"memory_budget_bytes": dense.weight_bytes - 1}).start()
    try:
        with daemon.wire() as wire:
            (packed,) = [e.loaded.model for e in wire.load(case.name) if e.HasField("loaded")]
            assert packed.computes_in == "float32, quantized weights"
            assert packed.weight_bytes < dense.weight_bytes
            check_score(case, wire, 40)
            check_greedy(case, wire, 15)
    finally:
        daemon.stop()
