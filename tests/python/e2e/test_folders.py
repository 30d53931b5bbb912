"""Model folders as they are found: odd ones are used if possible, else named for what they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

import mlx.core as mx

from architecture_rows import ROWS
from daemon import Daemon, wait_for
from mlxd.v1 import model_pb2 as model
from oracle import TOLERANCE, Oracle
from tiny_models import build
from tiny_tokenizer import VOCABULARY
from wire import CALL_S, Wire, refused

TEXT = list(range(20, 60))
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
Tensors = dict[str, mx.array]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with checkpoints to change copies of."""
    made = tmp_path_factory.mktemp("folders")
    for row in ROWS:
        if row.label in ("llama", "gemma3_text", "deepseek_v3"):
            build(row, row.base(), made / row.label)
    return made


@pytest.fixture(scope="module")
def wire(root: Path) -> Iterator[Wire]:
    """A connection to the daemon that serves the root."""
    with Daemon([root]) as daemon, daemon.wire() as wire:
        yield wire


@pytest.fixture
def copied(root: Path) -> Iterator[Callable[[str, str], Path]]:
    """Copies a checkpoint under another name; the copies go with the test."""
    made: list[Path] = []

    def copy(name: str, copy: str) -> Path:
        made.append(root / copy)
        shutil.copytree(root / name, root / copy)
        return root / copy

    yield copy
    for folder in made:
        shutil.rmtree(folder)


def tensors(folder: Path) -> Tensors:
    """Returns a checkpoint's tensors, read."""
    found = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(found)
    return found


def save(folder: Path, found: Tensors, name: str = "model.safetensors") -> None:
    """Writes tensors into a file of a checkpoint."""
    mx.save_safetensors(str(folder / name), found, {"format": "mlx"})


def set_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a config; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write_index(folder: Path, places: dict[str, str]) -> None:
    """Writes an index of shards."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def scores(wire: Wire, name: str) -> np.ndarray:
    """Returns the log-probabilities of the text."""
    entries = wire.score(name, TEXT, 0).tokens
    wire.unload(name)
    return np.array([entry.token.logprob for entry in entries[1:]])


def why(wire: Wire, name: str, **fields: bool) -> str:
    """Returns why a model cannot be used."""
    with refused("FAILED_PRECONDITION", "MODEL_INVALID") as refusal:
        wire.load(name, **fields)
    return refusal.failure.message


def listed(wire: Wire) -> dict[str, str]:
    """Returns what is wrong with each model on disk."""
    found = wire.models.ListModels(model.ListModelsRequest(), timeout=CALL_S).models
    return {entry.name: entry.problem for entry in found}


def assert_same(wire: Wire, name: str, other: str) -> None:
    """Checks that two models give the same numbers."""
    np.testing.assert_allclose(scores(wire, name), scores(wire, other), rtol=0, atol=1e-5)


def test_an_untied_head_counts_where_the_config_is_silent_on_tying(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("gemma3_text", "silent")
    set_config(folder, tie_word_embeddings=None)
    expected, scale = Oracle(folder).logprobs(TEXT)
    expected = [expected[i][token] for i, token in enumerate(TEXT[1:])]
    np.testing.assert_allclose(scores(wire, "silent"), expected, rtol=0, atol=TOLERANCE * scale)
    set_config(folder, tie_word_embeddings=True)
    assert "tie_word_embeddings is true, but lm_head.weight is not" in why(wire, "silent")
    found = tensors(folder)
    del found["lm_head.weight"]
    save(folder, found)
    tied = scores(wire, "silent")
    save(folder, {**found, "lm_head.weight": found["model.embed_tokens.weight"]})
    np.testing.assert_array_equal(scores(wire, "silent"), tied)
    set_config(folder, tie_word_embeddings=False)
    save(folder, found)
    assert "tie_word_embeddings is false, but lm_head.weight is missing" in why(wire, "silent")


def test_stored_rotations_must_be_those_of_the_config(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("llama", "rotations")
    found = tensors(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(folder, {**found, name: 1e4 ** (mx.arange(8) / -8)})
    assert_same(wire, "rotations", "llama")
    save(folder, {**found, name: 5e5 ** (mx.arange(8) / -8)})
    assert name in why(wire, "rotations")


def test_layers_past_the_last_are_dropped_only_if_they_predict_further_tokens(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("deepseek_v3", "deeper")
    found = tensors(folder)
    last = {k.replace(".2.", ".3."): v for k, v in found.items() if ".layers.2." in k}
    save(folder, {**found, **last, "model.layers.3.eh_proj.weight": mx.ones((64, 128))})
    assert_same(wire, "deeper", "deepseek_v3")
    save(folder, {**found, **last})
    assert "unknown tensors: model.layers.3." in why(wire, "deeper")


def test_a_stale_index_beside_a_whole_file_is_not_used(
    root: Path, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("llama", "stale")
    write_index(folder, {"model.norm.weight": "model-00001-of-00002.safetensors"})
    with Daemon([root]) as daemon, daemon.wire() as wire:
        assert_same(wire, "stale", "llama")
        assert "model-00001-of-00002.safetensors" in daemon.log
        assert listed(wire)["stale"] == ""


def test_the_index_decides_and_a_stray_file_helps_out(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("llama", "stray")
    found = tensors(folder)
    names = sorted(found)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save(folder, {name: found[name] for name in part}, shard)
    places = {name: shard for shard, part in shards.items() for name in part}
    write_index(folder, places)
    # What lies in model.safetensors is another model now.
    save(folder, {name: array + 1 for name, array in found.items()})
    assert_same(wire, "stray", "llama")
    # The head is in neither shard, and the index does not promise it.
    head = "lm_head.weight"
    shards[places.pop(head)].remove(head)
    for shard, part in shards.items():
        save(folder, {name: found[name] for name in part}, shard)
    write_index(folder, places)
    save(folder, {head: found[head]})
    assert_same(wire, "stray", "llama")
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in why(wire, "stray")


def test_rows_beyond_the_tokenizer_are_no_tokens(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("llama", "padded")
    found = tensors(folder)
    plain = wire.generate("llama", TEXT, max_tokens=12, logprobs=20)
    # Were they tokens, they would be the most likely ones.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        best = found["lm_head.weight"][mx.array(list(plain.token_ids))] * 50
        found[name] = mx.concatenate([found[name], best, -best])
    save(folder, found)
    size = found["lm_head.weight"].shape[0]
    set_config(folder, vocab_size=size)
    for options in ({}, {"temperature": 1.5, "top_k": 40}, {"temperature": 1.5, "top_p": 0.9}):
        reply = wire.generate("padded", TEXT, max_tokens=12, logprobs=20, sampling=options)
        assert max(reply.token_ids) < VOCABULARY
        for entry in reply.logprobs:
            assert max(other.token_id for other in entry.top) < VOCABULARY
    reply = wire.generate("padded", TEXT, max_tokens=12)
    assert list(reply.token_ids) == list(plain.token_ids)
    entries = wire.score("padded", TEXT, 20).tokens
    assert max(other.token_id for entry in entries for other in entry.top) < VOCABULARY
    for id_ in (VOCABULARY, size - 1):
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", "token_ids.ids[1]"):
            wire.generate("padded", [5, id_], max_tokens=1)
        with refused("INVALID_ARGUMENT", "INVALID_FIELD", f"sampling.logit_bias[{id_}]"):
            wire.generate("padded", [5], max_tokens=1, sampling={"logit_bias": {id_: 1.0}})
    wire.unload("padded")
    wire.unload("llama")


def test_odd_files_are_named_for_what_they_are(
    root: Path, copied: Callable[[str, str], Path]
) -> None:
    for name in ("pipe", "tokenizer-pointer", "weights-pointer", "config-pointer"):
        copied("llama", name)
    (root / "pipe" / "tokenizer.json").unlink()
    os.mkfifo(root / "pipe" / "tokenizer.json")
    (root / "tokenizer-pointer" / "tokenizer.json").write_text(POINTER)
    (root / "weights-pointer" / "model.safetensors").write_text(POINTER)
    (root / "config-pointer" / "config.json").write_text(POINTER)
    words = {
        "pipe": "tokenizer.json: is not a regular file",
        "tokenizer-pointer": "tokenizer.json: is a Git LFS pointer",
        "weights-pointer": "model.safetensors: is a Git LFS pointer",
        "config-pointer": "config.json: is a Git LFS pointer",
    }
    with Daemon([root]) as daemon, daemon.wire() as wire:
        found = listed(wire)
        for name, word in words.items():
            assert word in why(wire, name)
            assert word in found[name]
            wait_for(lambda word=word: word in daemon.log, "the log names it")
        assert found["llama"] == ""


def test_a_byte_order_mark_before_json_changes_nothing(
    wire: Wire, copied: Callable[[str, str], Path]
) -> None:
    folder = copied("llama", "marked")
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_same(wire, "marked", "llama")


def test_links_out_of_a_root_are_the_owners_choice(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk" / "llama"
    shutil.copytree(root / "llama", elsewhere)
    linked = tmp_path / "linked"
    (linked / "weights").mkdir(parents=True)
    (linked / "folder").symlink_to(elsewhere)
    for file in elsewhere.iterdir():
        (linked / "weights" / file.name).symlink_to(file)
    (linked / "dangling").symlink_to(tmp_path / "nowhere")
    with Daemon([linked]) as daemon, daemon.wire() as wire:
        for name in ("folder", "weights"):
            assert "model_links_anywhere" in why(wire, name)
            assert "model_links_anywhere" in listed(wire)[name]
        assert "leads nowhere" in why(wire, "dangling")
        wait_for(lambda: "dangling: is a link that leads nowhere" in daemon.log, "it is logged")
    with Daemon([linked], {"model_links_anywhere": True}) as daemon, daemon.wire() as wire:
        assert_same(wire, "folder", "weights")


def root_problems(wire: Wire, *, resident_only: bool = False) -> list[str]:
    """Returns what is wrong with the model roots."""
    request = model.ListModelsRequest(resident_only=resident_only)
    return list(wire.models.ListModels(request, timeout=CALL_S).problems)


def test_a_root_that_does_not_exist_is_named_and_one_that_is_a_model_serves_it(
    root: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "unplugged"
    with Daemon([missing, root / "llama"]) as daemon, daemon.wire() as wire:
        with refused("NOT_FOUND", "MODEL_NOT_FOUND") as refusal:
            wire.load("other")
        assert 'the model root "unplugged" does not exist' in refusal.failure.message
        wait_for(lambda: 'the model root "unplugged" does not exist' in daemon.log, "it is logged")
        assert listed(wire) == {"llama": ""}
        problems = ['the model root "unplugged" does not exist']
        assert root_problems(wire) == root_problems(wire, resident_only=True) == problems
        wire.load("llama")
        missing.mkdir()
        assert not root_problems(wire)


def test_the_cache_gives_its_only_whole_snapshot_and_names_half_ones(
    root: Path, tmp_path: Path
) -> None:
    def snapshot(repo: str, commit: str) -> Path:
        folder = tmp_path / f"models--owner--{repo}" / "snapshots" / commit
        shutil.copytree(root / "llama", folder)
        return folder

    snapshot("whole", "a1")
    half = snapshot("half", "b2")
    (half / "model.safetensors").unlink()
    (half / "model.safetensors").symlink_to("../../blobs/gone")
    environment = {"MLXD_HF_CACHE": str(tmp_path)}
    with Daemon([], environment=environment) as daemon, daemon.wire() as wire:
        assert wire.load("owner/whole")[-1].loaded.model.revision == "a1"
        # A load would complete it from the hub.
        half_is = why(wire, "owner/half", validate_only=True)
        assert "b2 is incomplete: model.safetensors is a link" in half_is
        assert "is incomplete" in listed(wire)["owner/half"]
