"""Repos for a hub on loopback, and `mlxd pull` of them beside Python's huggingface_hub."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from loopback_hub import COMMAND_S, LoopbackHub

NAME = "owner/tiny"
INDEX = "model.safetensors.index.json"
MIB = 1 << 20

SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# A model",
    "modeling_tiny.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
    "model.gguf": b"GGUF",
    ".gitattributes": b"*",
}
FETCHED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


def noise(seed: int, size: int) -> bytes:
    """Returns bytes that do not repeat."""
    return random.Random(seed).randbytes(size)


def sharded(size: int, shards: int = 4) -> dict[str, bytes]:
    """Returns the files of a model with shards of `size` bytes."""
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    index = {"weight_map": {f"tensor{n}": name for n, name in enumerate(names)}}
    weights = {name: noise(seed, size) for seed, name in enumerate(names)}
    return {"config.json": b"{}", INDEX: json.dumps(index).encode(), **weights}


def pull(
    hub: LoopbackHub, home: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs `mlxd pull` to its end."""
    return hub.mlxd(home, "pull", *(arguments or (NAME,)), **more)


def pulled(hub: LoopbackHub, home: Path, *arguments: str, **more: str) -> Path:
    """Runs `mlxd pull`, which succeeds, and returns the snapshot."""
    done = pull(hub, home, *arguments, **more)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def cache(home: Path, name: str = NAME) -> Path:
    """Returns a repo's folder in the cache."""
    return home / "huggingface/hub" / f"models--{name.replace('/', '--')}"


def contents(snapshot: Path) -> dict[str, bytes]:
    """Returns the files of a snapshot."""
    files = (file for file in snapshot.rglob("*") if file.is_file())
    return {str(file.relative_to(snapshot)): file.read_bytes() for file in files}


def python_process(hub: LoopbackHub, home: Path, code: str, **more: str) -> subprocess.Popen[str]:
    """Starts Python with huggingface_hub against the same hub and cache."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from huggingface_hub import *\n{code}"],
        env=hub.environment(home, HF_HUB_DISABLE_XET="1", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    """Waits for a process, which succeeds, and returns what it printed."""
    out, errors = process.communicate(timeout=COMMAND_S)
    assert process.returncode == 0, errors
    return out.strip()


def python(hub: LoopbackHub, home: Path, code: str, **more: str) -> str:
    """Runs Python with huggingface_hub to its end and returns what it printed."""
    return output(python_process(hub, home, code, **more))
