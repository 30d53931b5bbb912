"""Fixtures: a home of its own for each run, and a fake daemon for each test."""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before anything imports abstractllm, which writes below the home folder.
_HOME = tempfile.TemporaryDirectory(prefix="mlxd-home-")
os.environ["HOME"] = _HOME.name
for _name in ("XDG_RUNTIME_DIR", "MLXD_ADDRESS", "MLXD_TOKEN_FILE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
from fake import MODEL, running  # noqa: E402

import mlxd  # noqa: E402


@pytest.fixture
def daemon():
    """A fake daemon and its address; the folder is short because socket paths must be."""
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder, running(Path(folder)) as pair:
        yield pair


@pytest.fixture
def fake(daemon):
    return daemon[0]


@pytest.fixture
def address(daemon):
    return daemon[1]


@pytest.fixture
def client(address):
    with mlxd.Client(address, timeout=10) as client:
        yield client


@pytest.fixture
def silent():
    """The address of a daemon that stands still: it listens and answers nothing."""
    with (
        tempfile.TemporaryDirectory(prefix="mlxd-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(f"{folder}/d.sock")
        listener.listen()
        yield f"unix://{folder}/d.sock"


@pytest.fixture
def mortal():
    """A daemon in a process of its own and its address: no stream ends, and it dies of Generate."""
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder:
        (Path(folder) / MODEL).mkdir()
        program = Path(__file__).with_name("fake_mlxd.py")
        command = [sys.executable, program, "serve", "--model", MODEL]
        process = subprocess.Popen(
            [*command, "--model-root", folder, "--socket", f"{folder}/d.sock"],
            env={**os.environ, "FAKE_MLXD": "mortal"},
        )
        address = f"unix://{folder}/d.sock"
        try:
            _answers(address)
            yield process, address
        finally:
            process.kill()
            process.wait()


def _answers(address):
    """Waits until a daemon answers."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with mlxd.Client(address, timeout=30) as client:
                client.stats()
            return
        except mlxd.ConnectionFailedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def llm(address):
    """The provider for AbstractLLM, on the fake daemon."""
    host = pytest.importorskip("abstractllm", reason="the abstractllm extra is not installed")
    importlib.import_module("mlxd.abstractllm")  # registers it

    llm = host.create_llm("mlxd", model=MODEL, base_url=address)
    yield llm
    llm.close()
