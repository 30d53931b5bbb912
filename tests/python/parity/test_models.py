"""Every architecture against mlx-lm over the wire, on tiny random checkpoints in float32.

A reduced form of parity/parity_table.py, which `make parity` runs: scores and greedy output
alone, with prefill chunks of 1, 7 and 64, in a mixed batch of 8, on a session's cached prefix, and
after a fork and a truncation; and one drawn configuration. Prompts go beyond the windows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import grpc
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from architecture_rows import ROWS, row_of
from daemon import Daemon, wait_for
from parity_cases import GREEDY, Case, check_greedy, check_score, check_session, daemons
from raw_layouts import RAW, rewrite
from tiny_models import Architecture, build
from wire import Wire, failure

# Prompts to continue, shorter and longer than a chunk and than every window.
LENGTHS = (14, 33, 64, 100)
SCORED = {1: 40, 7: 60, 64: 150}
DRAWN = "drawn"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with every architecture, and a drawn configuration of each."""
    made = tmp_path_factory.mktemp("architectures")
    for row in ROWS:
        build(row, row.base(), made / row.label)
        build(row, row.draw(0), made / f"{row.label}-{DRAWN}")
    return made


@pytest.fixture(scope="module")
def cases(root: Path) -> Callable[[str], Case]:
    """Returns the case of a name; made once."""
    return cache(lambda name: Case(root / name))


@pytest.fixture(scope="module")
def wires(root: Path) -> Iterator[Callable[[int], Wire]]:
    """Returns a connection to the daemon of a prefill chunk size."""
    with daemons(root) as wire:
        yield wire


def parametrized(test: Callable[..., None]) -> Callable[..., None]:
    """One test per architecture."""
    return pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)(test)


@parametrized
def test_it_scores_and_continues_as_mlx_lm_does_whatever_the_chunk(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], row: Architecture
) -> None:
    case = cases(row.label)
    for chunk, scored in SCORED.items():
        check_score(case, wires(chunk), scored)
        check_greedy(case, wires(chunk), 33)


@parametrized
def test_in_a_mixed_batch_of_eight_nothing_changes(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], row: Architecture
) -> None:
    case, wire = cases(row.label), wires(64)
    work = [partial(check_greedy, case, wire, length) for length in LENGTHS]
    work += [partial(check_score, case, wire, length) for length in (2, 20, 60, 90)]
    for length in LENGTHS:
        case.continuation(length)
    wire.load(case.name)
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(check) for check in work]:
            done.result()


@parametrized
def test_a_sessions_cached_prefix_changes_nothing(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], row: Architecture
) -> None:
    check_session(cases(row.label), wires(64))


@parametrized
def test_a_fork_and_a_truncated_session_go_on_as_fresh_runs_do(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], row: Architecture
) -> None:
    case, wire = cases(row.label), wires(64)
    first = case.continuation(33)
    held = first.prompt + first.output
    branch = case.oracle.stable(14, seed=7, count=GREEDY, after=held)
    # Back to the middle of the prompt, where no state was saved.
    stem = case.oracle.stable(14, seed=7, count=GREEDY, after=held[:20])
    wire.create_session("stem", case.name)
    try:
        wire.generate(case.name, first.prompt, max_tokens=GREEDY, session="stem")
        wire.fork_session("stem", "branch")
        reply = wire.generate(case.name, branch.prompt, max_tokens=GREEDY, session="branch")
        assert list(reply.token_ids) == branch.output
        wire.truncate_session("stem", 20)
        reply = wire.generate(case.name, stem.prompt, max_tokens=GREEDY, session="stem")
        assert list(reply.token_ids) == stem.output
    finally:
        wire.delete_session("stem")
        wire.delete_session("branch")


@parametrized
def test_a_drawn_configuration_agrees(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], row: Architecture
) -> None:
    case = cases(f"{row.label}-{DRAWN}")
    check_score(case, wires(64), 90)
    check_greedy(case, wires(64), 33)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "lfm2"])
@pytest.mark.parametrize("storage", ["q4", "mxfp4"])
def test_where_dense_weights_do_not_fit_it_computes_with_packed_ones(
    tmp_path: Path, name: str, storage: str
) -> None:
    row = row_of(name)
    case = Case(build(row, row.base(), tmp_path / name, storage))
    with daemons(tmp_path) as wires:
        (dense,) = [e.loaded.model for e in wires(64).load(name) if e.HasField("loaded")]
    assert dense.computes_in == "float32, dequantized at load"
    with (
        Daemon([tmp_path], {"memory_budget_bytes": dense.weight_bytes - 1}) as daemon,
        daemon.wire() as wire,
    ):
        (packed,) = [e.loaded.model for e in wire.load(name) if e.HasField("loaded")]
        assert packed.computes_in == "float32, quantized weights"
        assert packed.weight_bytes < dense.weight_bytes
        check_score(case, wire, 90)
        check_greedy(case, wire, 33)


def test_an_option_that_is_not_implemented_is_refused_by_name(tmp_path: Path) -> None:
    row = row_of("llama")
    wrong = {
        "rope": {"rope_scaling": {"type": "spiral", "factor": 2.0}},
        "activation": {"hidden_act": "mish"},
        "layers": {"layer_types": ["full_attention", "full_attention", "dreaming"]},
        "type": {"model_type": "llama9"},
    }
    for name, change in wrong.items():
        folder = build(row, row.base(), tmp_path / name)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    words = {"rope": "spiral", "activation": "mish", "layers": "dreaming", "type": "llama9"}
    with Daemon([tmp_path]) as daemon, daemon.wire() as wire:
        for name, word in words.items():
            with pytest.raises(grpc.RpcError) as raised:
                wire.load(name)
            found = failure(raised.value)
            assert found.reason == "MODEL_UNSUPPORTED"
            assert word in found.message


@pytest.mark.parametrize("name", RAW)
def test_a_checkpoint_as_its_makers_publish_it_loads_too(tmp_path: Path, name: str) -> None:
    row = row_of(name)
    only_experts = name == "gpt_oss"
    folder = build(row, row.base(), tmp_path / name, "mxfp4-experts" if only_experts else "f32")
    rewrite(folder, name)
    case = Case(folder)
    with daemons(tmp_path) as wires:
        check_score(case, wires(64), 60)
        check_greedy(case, wires(64), 33)


@pytest.mark.parametrize("storage", ["q2", "q3", "q5", "q6", "mxfp8", "nvfp4"])
def test_every_other_quantization_loads(tmp_path: Path, storage: str) -> None:
    row = row_of("mixtral")
    folder = build(row, row.base(), tmp_path / storage, storage)
    case = Case(folder)
    with daemons(tmp_path) as wires:
        check_score(case, wires(64), 60)
        check_greedy(case, wires(64), 33)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "nemotron_h"])
def test_a_raw_prompt_that_was_prefilled_is_found_by_who_sends_it_again(
    cases: Callable[[str], Case], wires: Callable[[int], Wire], name: str
) -> None:
    """Recurrent states cannot be cut back: the last token's own must have been saved before it."""
    case, wire = cases(name), wires(64)
    for length, is_cancelled in ((100, False), (64, True)):
        asked = case.continuation(length)
        if is_cancelled:
            call = wire.stream(case.name, asked.prompt, max_tokens=1000)
            next(event for event in call if event.HasField("delta"))
            call.cancel()
            wait_for(lambda: wire.stats().running_sequences == 0, "it was cancelled")
        else:
            wire.generate(case.name, asked.prompt, max_tokens=1)
        again = wire.generate(case.name, asked.prompt, max_tokens=GREEDY)
        assert again.usage.cached_tokens == length - 1
        assert list(again.token_ids) == asked.output
