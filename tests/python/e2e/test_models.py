"""Loading: progress, unload, several models, the byte budget, and files that cannot be trusted."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, wait_for
from mlxd.v1 import model_pb2 as model
from wire import CALL_S, Wire, chat, refused

PROMPT = list(range(20, 40))


@pytest.fixture
def fresh(tiny_root: Path) -> Iterator[tuple[Daemon, Wire]]:
    """A daemon with nothing resident."""
    with Daemon([tiny_root]) as daemon, daemon.wire() as wire:
        yield daemon, wire


def test_a_load_tells_its_progress_and_ends_once(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    events = wire.load("tiny")
    assert [event.WhichOneof("event") for event in events[:-1]] == ["progress"] * (len(events) - 1)
    progress = [event.progress for event in events[:-1]]
    phases = [entry.phase for entry in progress]
    assert phases == sorted(phases), "resolving, loading, warming"
    assert model.LOAD_PHASE_LOADING in phases
    for entry in progress:
        assert entry.done_bytes <= entry.total_bytes or entry.total_bytes == 0
    info = events[-1].loaded.model
    assert (info.name, info.state) == ("tiny", model.MODEL_STATE_RESIDENT)
    assert (info.architecture, info.vocabulary_size, info.context_length) == ("llama", 384, 32768)
    assert info.weight_bytes >= 4 * info.parameter_count > 0
    assert info.computes_in
    again = wire.load("tiny")
    assert [event.WhichOneof("event") for event in again] == ["loaded"]


def test_unloading_frees_and_reloading_gives_the_same(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    wire.create_session("kept", "tiny")
    first = wire.generate("", PROMPT, max_tokens=8, session="kept")
    weights = wire.stats().memory.weight_bytes
    assert wire.unload("tiny") >= weights > 0
    after = wire.stats().memory
    assert (after.weight_bytes, after.kv_slab_bytes) == (0, 0)
    assert wire.resident() == []
    with refused("FAILED_PRECONDITION", "MODEL_NOT_LOADED"):
        wire.unload("tiny")
    # The session outlives the weights; its next turn prefills again, or reads a snapshot.
    second = wire.generate("", [9], max_tokens=8, session="kept")
    whole = wire.generate("tiny", [*PROMPT, *first.token_ids, 9], max_tokens=8)
    assert list(second.token_ids) == list(whole.token_ids)


def test_memory_does_not_grow_over_loads(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh

    def active() -> int:
        return wire.stats().memory.mlx_active_bytes

    wire.generate("tiny", PROMPT, max_tokens=4)
    weights = wire.stats().memory.weight_bytes
    wire.unload("tiny")
    # A thread frees what was unloaded.
    wait_for(lambda: active() < weights, "the weights are free")
    start = active()
    for _ in range(3):
        wire.generate("tiny", PROMPT, max_tokens=4)
        wire.unload("tiny")
        wait_for(lambda: active() <= start + 4096, "nothing is left")


def test_a_model_in_use_is_not_unloaded(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    running = wire.stream("tiny", PROMPT, max_tokens=20000)
    assert next(running).HasField("started")
    with refused("FAILED_PRECONDITION", "MODEL_BUSY"):
        wire.unload("tiny")
    running.cancel()


def test_two_models_serve_at_once(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    alone = {name: wire.generate(name, PROMPT, max_tokens=60) for name in ("tiny", "other")}
    assert wire.resident() == ["other", "tiny"]
    streams = {name: wire.stream(name, PROMPT, max_tokens=60) for name in alone}
    for name, stream in streams.items():
        ids = [id_ for event in stream for id_ in event.delta.token_ids]
        assert ids == list(alone[name].token_ids)


def test_a_load_does_not_stop_other_streams(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    alone = wire.generate("tiny", PROMPT, max_tokens=300)
    stream = wire.stream("tiny", PROMPT, max_tokens=300)
    assert next(stream).HasField("started")
    assert wire.load("other")[-1].HasField("loaded")
    assert [id_ for event in stream for id_ in event.delta.token_ids] == list(alone.token_ids)


def test_lists_show_resident_and_available_models(fresh: tuple[Daemon, Wire]) -> None:
    _, wire = fresh
    page = wire.models.ListModels(model.ListModelsRequest(page_size=1), timeout=CALL_S)
    assert [entry.name for entry in page.models] == ["other"]
    request = model.ListModelsRequest(page_size=1, page_token=page.next_page_token)
    page = wire.models.ListModels(request, timeout=CALL_S)
    assert [(entry.name, entry.state) for entry in page.models] == [
        ("tiny", model.MODEL_STATE_AVAILABLE)
    ]
    info = wire.models.GetModel(model.GetModelRequest(model="tiny"), timeout=CALL_S).model
    assert info.file_bytes > 0
    assert info.weight_bytes == 0


def validated(wire: Wire, name: str) -> Any:
    """Returns the answer to validate_only."""
    (event,) = wire.load(name, validate_only=True)[-1:]
    return event.validated


def test_the_budget_refuses_with_numbers(fresh: tuple[Daemon, Wire], tiny_root: Path) -> None:
    _, wire = fresh
    needed = {name: validated(wire, name).needed_bytes for name in ("tiny", "other")}
    assert wire.resident() == [], "validate_only loads nothing"
    too_small = min(needed.values()) // 2
    with (
        Daemon([tiny_root], {"memory_budget_bytes": too_small}) as daemon,
        daemon.wire() as small,
    ):
        assert not validated(small, "tiny").fits
        with refused("FAILED_PRECONDITION", "MODEL_TOO_LARGE") as refusal:
            small.load("tiny")
        assert int(refusal.failure.metadata["needed_bytes"]) == needed["tiny"]
        assert int(refusal.failure.metadata["available_bytes"]) <= too_small
    for_one = max(needed.values()) + min(needed.values()) // 2
    with Daemon([tiny_root], {"memory_budget_bytes": for_one}) as daemon, daemon.wire() as one:
        one.load("tiny", pin=True)
        with refused("RESOURCE_EXHAUSTED", "MEMORY_BUDGET") as refusal:
            one.load("other")
        assert int(refusal.failure.metadata["needed_bytes"]) > int(
            refusal.failure.metadata["available_bytes"]
        )
        assert refusal.failure.has_quota_failure
        one.unload("tiny")
        one.load("other")


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Reads a safetensors file's header and data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    """Writes a safetensors file, valid or not."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Returns a function that damages the header of the weights."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        header, data = header_of(file)
        change(header)
        write(file, header, data)

    return damage


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Returns a function that changes config.json; None removes a key."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def cut_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def set_bytes(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


NORM = "model.norm.weight"
INVALID = "MODEL_INVALID"
UNSUPPORTED = "MODEL_UNSUPPORTED"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "data-cut": (cut_file, INVALID),
    "header-cut": (set_bytes("model.safetensors", struct.pack("<Q", 5000) + b"{"), INVALID),
    "header-huge": (set_bytes("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), INVALID),
    "not-even-a-length": (set_bytes("model.safetensors", b"abc"), INVALID),
    "header-not-json": (
        set_bytes("model.safetensors", struct.pack("<Q", 4) + b"\xff\xfe{}"),
        INVALID,
    ),
    "offsets-beyond-the-end": (
        edit_header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 256])),
        INVALID,
    ),
    "offsets-backwards": (edit_header(lambda h: h[NORM].update(data_offsets=[256, 0])), INVALID),
    "offsets-too-short": (edit_header(lambda h: h[NORM].update(shape=[1 << 40])), INVALID),
    "shape-overflows": (
        edit_header(lambda h: h[NORM].update(shape=[1 << 62, 1 << 62])),
        INVALID,
    ),
    "wrong-dtype": (edit_header(lambda h: h[NORM].update(dtype="I32")), INVALID),
    "unknown-dtype": (edit_header(lambda h: h[NORM].update(dtype="F4096")), INVALID),
    "wrong-shape": (edit_header(lambda h: h[NORM].update(shape=[8, 8])), INVALID),
    "missing-tensor": (edit_header(lambda h: h.pop(NORM)), INVALID),
    "extra-tensor": (edit_header(lambda h: h.update({"more.weight": h[NORM]})), INVALID),
    "no-weights": (remove("model.safetensors"), INVALID),
    "no-tokenizer": (remove("tokenizer.json"), INVALID),
    "tokenizer-not-json": (set_bytes("tokenizer.json", b"{"), INVALID),
    "config-not-json": (set_bytes("config.json", b"{"), INVALID),
    "config-not-utf-8": (set_bytes("config.json", b'{"model_type": "\xff"}'), INVALID),
    "config-without-sizes": (edit_config(hidden_size=None), INVALID),
    "config-negative": (edit_config(num_hidden_layers=-1), INVALID),
    "config-zero-heads": (edit_config(num_attention_heads=0), INVALID),
    "config-other-vocabulary": (edit_config(vocab_size=400), INVALID),
    "heads-not-divisible": (edit_config(num_key_value_heads=3), INVALID),
    "unknown-rope": (edit_config(rope_scaling={"rope_type": "spiral", "factor": 2}), UNSUPPORTED),
    "unknown-architecture": (edit_config(model_type="cobra"), UNSUPPORTED),
    "unknown-activation": (edit_config(hidden_act="gelu"), UNSUPPORTED),
    "unknown-quantization": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        UNSUPPORTED,
    ),
}


@pytest.fixture(scope="module")
def damaged(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    """A daemon whose root holds a good `tiny` and one damaged copy per entry above."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_root / "tiny", root / "tiny")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(tiny_root / "tiny", root / name)
        damage(root / name)
    with Daemon([root], models=["tiny"]) as daemon, daemon.wire() as wire:
        yield wire


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_and_others_are_served(damaged: Wire, name: str) -> None:
    before = damaged.stats().memory.weight_bytes
    for _ in range(2):
        with refused("FAILED_PRECONDITION", DAMAGES[name][1]):
            damaged.load(name)
    with refused("FAILED_PRECONDITION", DAMAGES[name][1]):
        damaged.generate(name, PROMPT, max_tokens=1)
    assert damaged.stats().memory.weight_bytes == before
    assert len(damaged.generate("tiny", PROMPT, max_tokens=4).token_ids) == 4


def test_a_damaged_model_does_not_spoil_the_list(damaged: Wire) -> None:
    page = damaged.models.ListModels(model.ListModelsRequest(), timeout=CALL_S)
    assert "tiny" in [entry.name for entry in page.models]


def test_a_file_truncated_while_served_disturbs_no_client(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    with Daemon([root], models=["tiny"]) as daemon, daemon.wire() as wire:
        first = wire.generate("tiny", PROMPT, max_tokens=8)
        # mmap of a shortened file would end the process with SIGBUS.
        with (root / "tiny" / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        second = wire.generate("tiny", PROMPT, max_tokens=8)
        assert list(second.token_ids) == list(first.token_ids)


def test_a_model_without_template_takes_prompts_only(tiny_root: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_root / "tiny", tmp_path / "plain")
    file = tmp_path / "plain" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    with Daemon([tmp_path]) as daemon, daemon.wire() as wire:
        assert wire.generate("plain", prompt="The harbour", max_tokens=2).usage.prompt_tokens > 0
        with refused("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE"):
            wire.generate("plain", chat=chat("hello"), max_tokens=2)
