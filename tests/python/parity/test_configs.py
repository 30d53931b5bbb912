"""Configs as transformers 5 saves them, whole and with each key alone null or removed.

The daemon gives the numbers of transformers' own reading of the config, or refuses it and names
file and key. The whole config is compared with mlx-lm on the same weights. A config that lacks a
key is read by transformers, which says what it means in full; the daemon must give what it gives
for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
# Keys of training, of other parts, and of files that say them again: no logit depends on them.
NO_EFFECT = [
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "expand",
    "hidden_dropout",
    "initializer_range",
    "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap",
    "mtp_layers_block_type",
    "num_logits_to_keep",
    "num_nextn_predict_layers",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "rescale_prenorm_residual",
    "resid_pdrop",
    "residual_in_fp32",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "transformers_version",
    "use_cache",
    "use_mamba_kernels",
    "_sliding_window_pattern",
]
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
    wrong = []
    for path in paths(base):
        for null in (True, False):
            config = without(base, path, null)
            what = f"{'.'.join(path)} {'null' if null else 'removed'}"
            got = served.logprobs(config)
            if isinstance(got, str):
                if "config.json" not in got or path[-1] not in got:
                    wrong.append(f"{what}: refused without its name: {got}")
                continue
            try:
                full = whole(config)
            except Exception as error:
                if path[-1] not in FOREIGN:
                    wrong.append(f"{what}: transformers refuses it: {str(error)[:100]}")
                continue
            # Whatever the default is, transformers ties no head that is not the embedding.
            same = full == base or path[-1] == "tie_word_embeddings"
            meant = plain if same else served.logprobs(full)
            if isinstance(meant, str):
                wrong.append(f"{what}: taken, but not in full: {meant}")
            elif np.abs(got - meant).max() > bound:
                wrong.append(f"{what}: other numbers, by {np.abs(got - meant).max():.1e}")
    assert not wrong, "\n".join(wrong)
