import importlib.util
import sys
from pathlib import Path

import pytest

from mlxd.v1 import errors_pb2

PACKAGE = Path(__file__).resolve().parents[1]


def test_generated_code_is_what_the_proto_gives():
    pytest.importorskip("grpc_tools", reason="the dev extra is not installed")
    if not (PACKAGE.parents[1] / "proto").is_dir():
        pytest.skip("outside the repository")
    spec = importlib.util.spec_from_file_location("generate", PACKAGE / "scripts" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    assert module.differences() == [], "run scripts/generate.py"


def test_every_reason_of_the_proto_has_a_class():
    from test_errors import CLASSES

    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == CLASSES.keys()
