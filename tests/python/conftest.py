"""Fixtures of the tests over the wire: checkpoints made once, and daemons that serve them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import Daemon, binary, default_model
from wire import Wire


@pytest.fixture(scope="session", autouse=True)
def _program() -> None:
    assert binary().exists(), f"no {binary()}: build it (cargo build --release) or set MLXD_BIN"


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with `tiny`, which has a long context, and `other`."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from checkpoints import Checkpoint, build

    root = tmp_path_factory.mktemp("tiny")
    long = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
    build(Checkpoint("tiny", long), root, seed=1)
    build(Checkpoint("other", {"num_hidden_layers": 3, "tie_word_embeddings": True}), root, seed=2)
    return root


@pytest.fixture(scope="session")
def shared_daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon with default settings that serves `tiny`; tests share it."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture
def wire(shared_daemon: Daemon) -> Iterator[Wire]:
    """A connection to the shared daemon."""
    with shared_daemon.wire() as wire:
        yield wire


@pytest.fixture(scope="session")
def real_daemon() -> Iterator[tuple[Daemon, str]]:
    """A daemon that serves the default model, and the model's name."""
    folder = default_model()
    if not (folder / "config.json").exists():
        pytest.skip(f"no default model in {folder}: run `make model` or set MLXD_MODEL_DIR")
    with Daemon([folder.parent], models=[folder.name]) as daemon:
        yield daemon, folder.name
