"""Writes a model folder again with all weights dense in float32, as the daemon computes on the CPU.

    dense.py SOURCE DESTINATION

For the peers: MLX's quantized matmul on the CPU would be another comparison. The end-of-text
token is one that the model cannot produce, so every answer has the requested length.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NEVER = "<|never|>"


def dense(source: Path, cache: Path) -> Path:
    """Returns the dense copy of a model folder; a separate process makes it if it is missing."""
    stat = (source / "model.safetensors").stat()
    target = cache / f"{source.name}-f32-{stat.st_size}-{int(stat.st_mtime)}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, str(source), str(target)], check=True)
    return target


def main() -> None:
    """Copies argv[1] to argv[2]."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import dequantize_model, load_model

    source, target = Path(sys.argv[1]), Path(sys.argv[2])

    def float32(parameter: mx.array) -> mx.array:
        floating = mx.issubdtype(parameter.dtype, mx.floating)
        return parameter.astype(mx.float32) if floating else parameter

    model, config = load_model(source)
    model.update(tree_map(float32, model.parameters()))
    model = dequantize_model(model)
    # Made beside the target and renamed, so that a half-written folder is never used.
    made = Path(tempfile.mkdtemp(dir=target.parent))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(made / "model.safetensors"), weights, {"format": "mlx"})
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    config["eos_token_id"] = never = config["vocab_size"]
    (made / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.glob("*token*.json"):
        shutil.copy(file, made)
    _add_never(made, never)
    os.rename(made, target)


def _add_never(folder: Path, token_id: int) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": token_id, "content": NEVER, **flags, "special": True})
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["eos_token"] = NEVER
    if decoder := config.get("added_tokens_decoder"):
        decoder[str(token_id)] = {"content": NEVER, **flags, "special": True}
    file.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
