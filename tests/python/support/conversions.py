"""Runs `mlxd convert`, and reads what a conversion wrote."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.convert import convert as convert_with_mlx_lm

from daemon import binary

RUN_S = 240
# Runs a command and prints its peak of resident memory. What a process had before its exec counts
# too, so it is the child of a small one.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(
    source: Path | str, out: Path, *options: str, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    command = [str(binary()), "convert", str(source), str(out), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_S, check=False, **kwargs
    )


def convert(source: Path | str, out: Path, *options: str) -> Path:
    """Converts with the program under test, which must succeed."""
    done = run(source, out, *options)
    assert done.returncode == 0, done.stderr
    return out


def peak_bytes(source: Path, out: Path, *options: str) -> int:
    """Converts with the program under test; returns the most memory that it held."""
    command = [str(binary()), "convert", str(source), str(out), *options]
    small = [sys.executable, "-I", "-S", "-c", PEAK, *command]
    done = subprocess.run(small, capture_output=True, text=True, timeout=RUN_S, check=True)
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def oracle(source: Path, out: Path, **options: Any) -> Path:
    """Converts with mlx-lm."""
    with contextlib.redirect_stdout(io.StringIO()):
        convert_with_mlx_lm(str(source), str(out), **options)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    """Returns a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors_of(folder: Path) -> dict[str, mx.array]:
    """Returns all tensors of a folder, as the index places them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: mx.load(str(folder / file)) for file in set(index["weight_map"].values())}
    found = {name: array for arrays in files.values() for name, array in arrays.items()}
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    return found


def bytes_of(array: mx.array) -> bytes:
    """Returns an array's elements as bytes."""
    flat = array.reshape(-1)
    return bytes(flat.view(mx.uint8)) if flat.size else b""


def same(ours: Path, theirs: Path) -> None:
    """Fails unless two folders hold the same tensors, byte for byte."""
    one, other = tensors_of(ours), tensors_of(theirs)
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        expected = other[name]
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), name
        assert bytes_of(array) == bytes_of(expected), name
