"""Tiny random checkpoints of an architecture, written with mlx-lm's own model classes.

A row is an architecture with a small configuration that uses what sets it apart, and the choices
that a random sweep draws from; `architecture_rows` lists them. Same seed, same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import quantize_model

from checkpoints import write
from tiny_tokenizer import EOS, VOCABULARY

STORAGES = ("f32", "bf16", "q4", "q8", "mxfp4")
GROUP = 32
# Group size, bits and mode of the storages that are not affine; affine ones are q and their bits.
# The part after a hyphen names the quantized modules.
MODES = {"mxfp4": (32, 4, "mxfp4"), "mxfp8": (32, 8, "mxfp8"), "nvfp4": (16, 4, "nvfp4")}

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}

# Choices common to every architecture; "heads" stands for two keys.
CHOICES: dict[str, list[Any]] = {
    "heads": [(4, 4), (4, 2), (4, 1), (8, 2), (2, 1)],
    "intermediate_size": [32, 96, 160],
    "num_hidden_layers": [2, 3, 4],
    "rope_theta": [10000.0, 500000.0],
}


@dataclass(frozen=True)
class Architecture:
    """An architecture: its smallest interesting configuration, and choices of a sweep."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, list[Any]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    name: str = ""
    # model_type of the text model, in configurations of several parts.
    text: str = ""

    @property
    def label(self) -> str:
        """Its name in tables and folders."""
        return self.name or self.model_type

    def base(self, **changes: Any) -> dict[str, Any]:
        """Returns the configuration of the row itself, with changes."""
        return self._complete(changes)

    def draw(self, seed: int) -> dict[str, Any]:
        """Draws a configuration at random."""
        generator = np.random.default_rng((seed, *self.label.encode()))
        drawn: dict[str, Any] = {}
        for key, values in {**CHOICES, **self.choices}.items():
            value = values[generator.integers(len(values))]
            if key == "heads":
                drawn["num_attention_heads"], drawn["num_key_value_heads"] = value
            elif key == "groups":
                drawn["n_group"], drawn["topk_group"] = value
            elif key == "layers":
                drawn.update(value)
            else:
                drawn[key] = value
        return self._complete(drawn)

    def _complete(self, drawn: dict[str, Any]) -> dict[str, Any]:
        whole = {**COMMON, "model_type": self.model_type, **self.config, **drawn}
        whole = {key: value for key, value in whole.items() if key not in self.without}
        if not self.text:
            return whole
        inner = {**whole, "model_type": self.text}
        outer = {"model_type": self.model_type, "vocab_size": whole["vocab_size"]}
        return {**outer, "eos_token_id": EOS, "text_config": inner}


def build(row: Architecture, config: dict[str, Any], folder: Path, storage: str = "f32") -> Path:
    """Writes the checkpoint to `folder`."""
    module = importlib.import_module(f"mlx_lm.models.{_module(row.model_type)}")
    mx.random.seed(5)
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    less_one = row.model_type in ("gemma2", "gemma3", "gemma3_text")
    model.update(
        tree_map_with_path(lambda path, like: _random(path, like, less_one), model.parameters())
    )
    if storage == "bf16":
        model.set_dtype(mx.bfloat16)
    elif storage != "f32":
        kind, _, part = storage.partition("-")
        group, bits, mode = MODES.get(kind) or (GROUP, int(kind[1:]), "affine")
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(
                model,
                config,
                group,
                bits,
                mode=mode,
                quant_predicate=lambda path, module: part in path and _divides(group, module),
            )
    write(folder, config, dict(tree_flatten(model.parameters())), shards=1)
    return folder


def _module(model_type: str) -> str:
    return {"mistral": "llama"}.get(model_type, model_type)


def _divides(group: int, module: Any) -> bool:
    return hasattr(module, "weight") and module.weight.shape[-1] % group == 0


def _random(path: str, like: mx.array, less_one: bool) -> mx.array:
    """Draws values with which every part matters and the experts' scores are far apart."""
    if path.endswith("A_log"):
        return mx.random.uniform(0.0, 1.5, like.shape)
    if path.endswith("dt_bias"):
        return mx.random.uniform(-2.0, 1.0, like.shape)
    if path.endswith((".D", "layer_scalar", "per_expert_scale", "router.scale")):
        return mx.random.uniform(0.7, 1.3, like.shape)
    if path.endswith("e_score_correction_bias"):
        # Below zero, experts of groups that were dropped would count as much as each other.
        return mx.random.uniform(0.0, 0.3, like.shape)
    if path.endswith("sinks"):
        return mx.random.normal(like.shape)
    if "norm" in path.split(".")[-2]:
        low, high = (-0.4, 0.4) if less_one else (0.5, 1.5)
        return mx.random.uniform(low, high, like.shape)
    if path.endswith(".bias"):
        return mx.random.normal(like.shape) * 0.3
    if "embed" in path or "lm_head" in path or "conv" in path:
        return mx.random.normal(like.shape) * 0.5
    gain = 3.0 if path.endswith(("gate.weight", "router.weight", "router.proj.weight")) else 1.2
    return mx.random.normal(like.shape) * (gain / math.sqrt(like.shape[-1]))
