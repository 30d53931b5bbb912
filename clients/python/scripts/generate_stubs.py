"""Regenerates src/mlxd/v1 from the repository's proto folder; `--check` only compares.

The generator is pinned (the `dev` extra), so that the same proto gives the same bytes on every
machine. It needs grpcio-tools and no protoc.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PROTO = PACKAGE.parents[1] / "proto"
GENERATOR = "1.76.0"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes the generated modules of every proto file under `out`/mlxd/v1."""
    import grpc_tools
    from grpc_tools import protoc

    found = version("grpcio-tools")
    if found != GENERATOR:
        raise SystemExit(f"generate_stubs.py: needs grpcio-tools {GENERATOR}, found {found}")
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("mlxd/v1/*.proto"))
    if not protos:
        raise SystemExit(f"generate_stubs.py: no proto files under {PROTO}")
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main([*arguments, *protos]) != 0:
        raise SystemExit("generate_stubs.py: protoc failed")


def generated(root: Path) -> dict[str, bytes]:
    """The generated files under `root`/mlxd/v1, by name."""
    folder = root / "mlxd" / "v1"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(SUFFIXES)}


def differences() -> list[str]:
    """Names of committed files that the generator would write differently, add or remove."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        new = generated(Path(folder))
    old = generated(PACKAGE / "src")
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def main() -> None:
    """Regenerates, or with `--check` exits 1 when the committed files are stale."""
    if sys.argv[1:] == ["--check"]:
        stale = differences()
        if stale:
            raise SystemExit(f"stale, run scripts/generate_stubs.py: {', '.join(stale)}")
        return
    for name in generated(PACKAGE / "src"):
        (PACKAGE / "src" / "mlxd" / "v1" / name).unlink()
    generate(PACKAGE / "src")


if __name__ == "__main__":
    main()
