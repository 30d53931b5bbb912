"""Configs as transformers 5 saves them, whole and with each key alone null or removed.

The daemon gives the numbers of transformers' own reading of the config, or refuses it and names
file and key. The whole config is compared with mlx-lm on the same weights. A config that lacks a
key is read by transformers, which says what it means in full; the daemon must give what it gives
for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from transformers import CONFIG_MAPPING, PreTrainedConfig

from architecture_rows import ROWS
from daemon import Daemon
from oracle import TOLERANCE, Oracle
from tiny_models import Architecture, build
from tiny_tokenizer import EOS, VOCABULARY
from wire import Wire, failure

# Longer than every window.
TOKENS = 40
REFUSALS = ("MODEL_INVALID", "MODEL_UNSUPPORTED")
# Keys of training, of other parts, and of files that say them again, each with a value that no row
# has: no logit depends on them.
NO_EFFECT: dict[str, Any] = {
    "architectures": ["OtherForCausalLM"],
    "attention_dropout": 0.5,
    "bos_token_id": 3,
    "chunk_size": 16,
    "dtype": "bfloat16",
    "embd_pdrop": 0.5,
    "eos_token_id": 3,
    "expand": 3,
    "hidden_dropout": 0.5,
    "initializer_range": 0.5,
    "mamba_ssm_cache_dtype": "bfloat16",
    "moe_shared_expert_overlap": False,
    "mtp_layers_block_type": ["attention"],
    "num_logits_to_keep": 3,
    "num_nextn_predict_layers": 1,
    "output_router_logits": True,
    "pad_token_id": 3,
    "pretraining_tp": 2,
    "qk_head_dim": 7,
    "rescale_prenorm_residual": False,
    "resid_pdrop": 0.5,
    "residual_in_fp32": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "time_step_floor": 0.5,
    "time_step_max": 0.5,
    "time_step_min": 0.25,
    "transformers_version": "4.0.0",
    "use_cache": False,
    "use_mamba_kernels": False,
    "_sliding_window_pattern": 5,
}
# Keys that transformers does not let be null and that mean nothing in the architecture.
FOREIGN = ("num_key_value_heads",)
# Rows of text models that transformers reads as a part of a larger one only.
TEXT_ONLY = ("qwen3_5", "qwen3_5_moe")


def saved(row: Architecture) -> dict[str, Any]:
    """Returns a row's config as transformers saves it."""
    config = row.base()
    if row.model_type in TEXT_ONLY:
        inner = {**config, "model_type": f"{row.model_type}_text"}
        config = {"model_type": row.model_type, "text_config": inner, "eos_token_id": EOS}
    if "text_config" in config:
        # mlx-lm looks for it there, transformers does not.
        config.pop("vocab_size", None)
    return whole(config)


def whole(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config as transformers reads it, in full."""
    config = PreTrainedConfig._decode_special_floats(json.loads(json.dumps(config)))
    read = CONFIG_MAPPING[config.pop("model_type")](**config)
    return json.loads(read.to_json_string(use_diff=True))


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that describes the text model."""
    return config.get("text_config") or config


def paths(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the keys to take away, those of rotations by themselves too."""
    part = text_of(config)
    outer = () if part is config else ("text_config",)
    if outer:
        yield from ((key,) for key in config if key not in NO_EFFECT)
    for key, value in part.items():
        if key in NO_EFFECT:
            continue
        yield (*outer, key)
        if key == "rope_parameters":
            for inner, of in value.items():
                yield (*outer, key, inner)
                if isinstance(of, dict):
                    yield from ((*outer, key, inner, name) for name in of)


def without(config: dict[str, Any], path: tuple[str, ...], null: bool) -> dict[str, Any]:
    """Returns a copy of a config in which one key is null or gone."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if null:
        place[path[-1]] = None
    else:
        del place[path[-1]]
    return copy


# What may become of a key without effect.
FATES = ("present", "null", "removed")


def changed(config: dict[str, Any], keys: Iterable[str], fate: str) -> dict[str, Any]:
    """Returns a copy of a config in which all places have keys without effect, or null, or none."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for part in (copy, text_of(copy)):
        for key in keys:
            part.pop(key, None)
            if fate != "removed":
                part[key] = NO_EFFECT[key] if fate == "present" else None
    return copy


class Served:
    """A checkpoint in the daemon, under one config after another."""

    def __init__(self, folder: Path, wire: Wire) -> None:
        self.folder, self.wire = folder, wire
        self.text = np.random.default_rng(7).integers(0, VOCABULARY, TOKENS).tolist()

    def logprobs(self, config: dict[str, Any]) -> np.ndarray | str:
        """Returns the log-probability of each token but the first, or why the config is refused."""
        (self.folder / "config.json").write_text(json.dumps(config))
        try:
            self.wire.load(self.folder.name)
        except grpc.RpcError as error:
            found = failure(error)
            assert found.reason in REFUSALS, (found, config)
            return found.message
        scores = self.wire.score(self.folder.name, self.text, 0).tokens
        self.wire.unload(self.folder.name)
        return np.array([entry.token.logprob for entry in scores[1:]])


def effects(
    served: Served, base: dict[str, Any], plain: np.ndarray, bound: float
) -> Iterator[tuple[str, str]]:
    """Yields what the keys without effect change: all at once, and if so each by itself."""

    def effect(keys: Iterable[str], fate: str) -> str:
        got = served.logprobs(changed(base, keys, fate))
        if isinstance(got, str):
            return f"refused: {got}"
        off = np.abs(got - plain).max()
        return f"other numbers, by {off:.1e}" if off > bound else ""

    for fate in FATES:
        if not effect(NO_EFFECT, fate):
            continue
        for key in NO_EFFECT:
            said = effect([key], fate)
            named = "config.json" in said and key in said
            if said and not named:
                yield f"{key} {fate}", said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root."""
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def wire(root: Path) -> Iterator[Wire]:
    """A connection to the daemon that serves the root."""
    with Daemon([root]) as daemon, daemon.wire() as wire:
        yield wire


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_config_gives_the_numbers_of_transformers_reading_or_is_refused_by_its_key(
    root: Path, wire: Wire, row: Architecture
) -> None:
    folder = build(row, row.base(), root / row.label)
    served = Served(folder, wire)
    logits, scale = Oracle(folder).logprobs(served.text)
    bound = TOLERANCE * scale
    base = saved(row)
    plain = served.logprobs(base)
    assert not isinstance(plain, str), plain
    expected = np.array([logits[i][token] for i, token in enumerate(served.text[1:])])
    np.testing.assert_allclose(plain, expected, rtol=0, atol=bound)
    wrong = [f"{what}: {said}" for what, said in effects(served, base, plain, bound)]
    for path in paths(base):
        for null in (True, False):
            config = without(base, path, null)
            what = f"{'.'.join(path)} {'null' if null else 'removed'}"
            got = served.logprobs(config)
            if isinstance(got, str):
                # Without a part for the text, the whole is taken for it, and what it lacks named.
                names = text_of(base) if path == ("text_config",) else path[-1:]
                if "config.json" not in got or not any(name in got for name in names):
                    wrong.append(f"{what}: refused without its name: {got}")
                continue
            try:
                full = whole(config)
            except Exception as error:
                # Beside the text's part: a key of images, say, or one that the part says again.
                is_outer = text_of(base) is not base and len(path) == 1
                if path[-1] not in FOREIGN and not is_outer:
                    wrong.append(f"{what}: transformers refuses it: {str(error)[:100]}")
                elif np.abs(got - plain).max() > bound:
                    wrong.append(f"{what}: other numbers, by {np.abs(got - plain).max():.1e}")
                continue
            # Whatever the default is, transformers ties no head that is not the embedding.
            same = full == base or path[-1] == "tie_word_embeddings"
            meant = plain if same else served.logprobs(full)
            if isinstance(meant, str):
                wrong.append(f"{what}: taken, but not in full: {meant}")
            elif np.abs(got - meant).max() > bound:
                wrong.append(f"{what}: other numbers, by {np.abs(got - meant).max():.1e}")
    assert not wrong, "\n".join(wrong)
