"""The daemon against mlx-lm over the wire, on every tiny checkpoint.

Compared are the log-probability of each actual next token, the top 20 at each position, and 32
greedy ids: alone, in a mixed batch of 8, with prefill chunks of 1, 7 and 512, and on top of a
session's cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from checkpoints import PARITY, Checkpoint, build
from daemon import Daemon
from parity_cases import Case, check_greedy, check_score, check_session, daemons
from wire import Wire

# Shorter and longer than a chunk of 7, multiples of it and others, and 250, which passes 256
# while it is continued.
LENGTHS = (1, 5, 14, 15, 33, 64, 100, 250)
# The longest text scored for a chunk size: several chunks, in acceptable time.
SCORED = {1: 40, 7: 100, 512: 700}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with every checkpoint."""
    made = tmp_path_factory.mktemp("parity")
    for seed, checkpoint in enumerate(PARITY):
        build(checkpoint, made, seed)
    return made


@pytest.fixture(scope="session")
def cases(root: Path) -> Callable[[str], Case]:
    """Returns the case of a name; made once."""
    return cache(lambda name: Case(root / name))


@pytest.fixture(scope="session")
def wires(root: Path) -> Iterator[Callable[[int], Wire]]:
    """Returns a connection to the daemon of a prefill chunk size."""
    with daemons(root) as wire:
        yield wire


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
def test_a_sessions_cached_prefix_changes_nothing(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], checkpoint: Checkpoint
) -> None:
    check_session(cases(checkpoint.name), wires(512))


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
