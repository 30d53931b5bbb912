"""A model that says what it is told: the last token before an answer, its cue, chooses a script,
and each token of a script leads to the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer

from checkpoints import BASE, write
from thinking import set_template
from tiny_tokenizer import EOS, VOCABULARY

# The most tokens of all scripts; a multiple of 64 with the plain ones.
ROOM = 128


def build(folder: Path, template: str, scripts: Mapping[str, Sequence[str]]) -> None:
    """Writes a checkpoint with a script of pieces for each cue; each is one token."""
    size = VOCABULARY + ROOM
    config: dict[str, Any] = {
        **BASE,
        "vocab_size": size,
        "hidden_size": size,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 1,
        "max_position_embeddings": 8192,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    chains = [[cue, *script] for cue, script in scripts.items()]
    added = [piece for chain in chains for piece in chain]
    assert len(added) == len(set(added)) <= ROOM, "a piece leads to one other"
    ids = {piece: VOCABULARY + index for index, piece in enumerate(added)}
    head = mx.zeros((size, size))
    # What leads nowhere ends the answer.
    head[EOS] = 1.0
    for chain in chains:
        for before, after in pairwise(chain):
            head[ids[after], ids[before]] = 2.0

    def parameter(path: str, like: mx.array) -> mx.array:
        if "lm_head" in path:
            return head
        if "embed_tokens" in path:
            return mx.eye(size)
        return mx.ones(like.shape) if path.endswith("norm.weight") else mx.zeros(like.shape)

    model.update(tree_map_with_path(parameter, model.parameters()))
    write(folder, config, dict(tree_flatten(model.parameters())), shards=1)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(piece, normalized=False) for piece in added])
    made.save(str(folder / "tokenizer.json"))
    set_template(folder, template)


def ids_of(folder: Path, text: str) -> list[int]:
    """Returns the tokens of a text."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids
