"""Every kernel set that this machine has against mlx-lm, on architectures that attend in every way.

A reduced form of test_models.py with a daemon for each value of `MLXD_KERNELS`: scores and greedy
output with prefill chunks of 7 and 64, in a mixed batch of 8 and on a session's cached prefix.
`fused` is what a Mac runs: MLX's fused operations, and no kernel of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from architecture_rows import ROWS
from daemon import Daemon, wait_for
from parity_cases import Case, check_greedy, check_score, check_session, daemons
from tiny_models import build
from wire import Wire

SETS = ("plain", "avx2", "avx512", "neon", "composed", "fused")
# Full attention; windows; sinks and windows with a mixture; a latent; recurrent states.
NAMES = ("llama", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next", "mixtral")
PACKED = "mixtral-q4"
SCORED = {7: 60, 64: 150}


@pytest.fixture(scope="module")
def available(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The values of the key `kernels` that this machine has, as the daemon logs them."""
    with Daemon([tmp_path_factory.mktemp("none")]) as daemon:
        found = re.search(r'available="([a-z0-9 ]+)"', daemon.log)
    assert found, "the log does not name the kernel sets"
    print("kernel sets of this machine:", found[1])
    return found[1].split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with the architectures."""
    made = tmp_path_factory.mktemp("kernels")
    for row in ROWS:
        if row.label in NAMES:
            build(row, row.base(), made / row.label)
        if row.label == "mixtral":
            build(row, row.base(), made / PACKED, "q4")
    return made


@pytest.fixture(scope="module")
def cases(root: Path) -> dict[str, Case]:
    """Each architecture's case."""
    return {name: Case(root / name) for name in NAMES}


@pytest.fixture(scope="module", params=SETS)
def kernels(request: pytest.FixtureRequest, available: list[str]) -> str:
    """A kernel set of this machine."""
    name: str = request.param
    if name not in available:
        pytest.skip(f"this machine does not have {name}")
    return name


@pytest.fixture(scope="module")
def wires(root: Path, kernels: str) -> Iterator[Callable[[int], Wire]]:
    """A connection to the set's daemon of a prefill chunk size."""
    with daemons(root, {"MLXD_KERNELS": kernels}) as wire:
        yield wire


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_set_scores_and_continues_as_mlx_lm_does(
    cases: dict[str, Case], wires: Callable[[int], Wire], name: str
) -> None:
    case = cases[name]
    for chunk, scored in SCORED.items():
        check_score(case, wires(chunk), scored)
        check_greedy(case, wires(chunk), 33)
    check_session(case, wires(64))


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_changes_nothing_in_a_kernel_set(
    cases: dict[str, Case], wires: Callable[[int], Wire], name: str
) -> None:
    case, wire = cases[name], wires(64)
    lengths = (14, 33, 64, 100)
    work = [partial(check_greedy, case, wire, length) for length in lengths]
    work += [partial(check_score, case, wire, length) for length in (2, 20, 60, 90)]
    for length in lengths:
        case.continuation(length)
    wire.load(case.name)
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(check) for check in work]:
            done.result()


def test_a_kernel_set_computes_with_packed_weights_where_dense_ones_do_not_fit(
    root: Path, kernels: str
) -> None:
    environment = {"MLXD_KERNELS": kernels}
    with Daemon([root], environment=environment) as daemon, daemon.wire() as wire:
        (dense,) = [e.loaded.model for e in wire.load(PACKED) if e.HasField("loaded")]
    budget = {"memory_budget_bytes": dense.weight_bytes - 1}
    with Daemon([root], budget, environment=environment) as daemon, daemon.wire() as wire:
        (packed,) = [e.loaded.model for e in wire.load(PACKED) if e.HasField("loaded")]
        assert packed.computes_in == "float32, quantized weights"
        case = Case(root / PACKED)
        check_score(case, wire, 90)
        check_greedy(case, wire, 33)


def test_the_log_names_the_kernels_of_a_model(root: Path, kernels: str) -> None:
    daemon = Daemon([root], environment={"MLXD_KERNELS": kernels})
    with daemon, daemon.wire() as wire:
        wire.load("llama")
        wait_for(lambda: f'attention="{kernels}"' in daemon.log, "the load is logged")
        assert f'kernels="{kernels}" attention="{kernels}"' in daemon.log


@pytest.mark.parametrize("name", SETS)
def test_a_kernel_set_that_the_machine_does_not_have_is_refused_at_start(
    tmp_path: Path, available: list[str], name: str
) -> None:
    if name in available:
        pytest.skip(f"this machine has {name}")
    daemon = Daemon([tmp_path], environment={"MLXD_KERNELS": name})
    try:
        daemon.launch()
        assert daemon.exit_code() == 1
        assert f'kernels: this machine does not have "{name}"; it has auto, ' in daemon.log
        assert ", composed, fused" in daemon.log
    finally:
        daemon.stop()


def test_an_unknown_kernel_set_is_refused_at_start(tmp_path: Path) -> None:
    daemon = Daemon([tmp_path], environment={"MLXD_KERNELS": "mmx"})
    try:
        daemon.launch()
        assert daemon.exit_code() != 0
        assert "MLXD_KERNELS: `kernels` must be one of auto, plain, avx2, avx512, " in daemon.log
    finally:
        daemon.stop()
