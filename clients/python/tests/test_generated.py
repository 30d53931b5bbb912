"""Generated files are what their generators write."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mlxd.v1 import errors_pb2

PACKAGE = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_stubs_are_what_the_proto_gives():
    pytest.importorskip("grpc_tools", reason="the dev extra is not installed")
    if not (PACKAGE.parents[1] / "proto").is_dir():
        pytest.skip("outside the repository")
    assert script("generate_stubs").differences() == [], "run scripts/generate_stubs.py"


def test_the_sync_client_is_what_the_async_one_gives():
    pytest.importorskip("ruff", reason="the dev extra is not installed")
    assert script("generate_sync").differences() == [], "run scripts/generate_sync.py"


def test_a_marked_statement_is_left_out_of_the_sync_client():
    source = "class A:\n    async def a(self):  # async only\n        await b\n\n    x = 1\n"
    assert script("generate_sync").synchronous(source) == "class A:\n\n    x = 1\n"


def test_an_asynchronous_name_without_a_rule_is_refused():
    with pytest.raises(SystemExit, match="asyncio is left"):
        script("generate_sync").synchronous("import asyncio\n")


def test_every_reason_of_the_proto_has_a_class():
    from test_errors import CLASSES

    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == CLASSES.keys()
