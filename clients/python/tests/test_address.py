import json
from pathlib import Path

import pytest

from mlxd._address import (
    SOCKET_PATH_BYTES_MAX,
    default_address,
    default_socket,
    find_token,
    parse,
)

DEFAULT_SOCKETS = Path(__file__).resolve().parents[3] / "tests" / "default_socket.json"


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/mlxd.sock", "unix:/run/mlxd.sock"),
        ("unix:/run/mlxd.sock", "unix:/run/mlxd.sock"),
        ("/run/mlxd.sock", "unix:/run/mlxd.sock"),
        ("http://127.0.0.1:7070", "127.0.0.1:7070"),
        ("http://[::1]:7070/", "[::1]:7070"),
        ("https://box:7070", "box:7070"),
    ],
)
def test_addresses_become_grpc_targets(address, target):
    assert parse(address).target == target


@pytest.mark.parametrize(
    "address",
    ["", "box:7070", "ftp://box", "http://", "unix:", "unix://run/x", "http://box:1/path", "a\0b"],
)
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ValueError, match="address"):
        parse(address)


def test_a_socket_path_over_the_systems_limit_is_refused_with_the_limit():
    path = "/" + "x" * SOCKET_PATH_BYTES_MAX
    with pytest.raises(ValueError, match=str(SOCKET_PATH_BYTES_MAX)):
        parse(f"unix://{path}")


def test_a_token_never_crosses_a_network_in_the_clear():
    with pytest.raises(ValueError, match="https or to loopback"):
        parse("http://10.0.0.1:7070", token="t")
    assert parse("http://localhost:7070", token="t").target == "localhost:7070"
    assert parse("https://10.0.0.1:7070", token="t").tls


def test_the_default_address_is_the_environments_then_the_daemons(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    assert default_address() == "unix:///home/a/.mlxd/mlxd.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert default_address() == "unix:///run/user/1/mlxd/mlxd.sock"
    monkeypatch.setenv("MLXD_ADDRESS", "http://127.0.0.1:1")
    assert default_address() == "http://127.0.0.1:1"


@pytest.mark.parametrize("row", json.loads(DEFAULT_SOCKETS.read_text()), ids=str)
def test_the_default_socket_is_the_daemons(monkeypatch, row):
    for variable in ("XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in row["environment"].items():
        monkeypatch.setenv(variable, value)
    if row["socket"] is None:
        with pytest.raises(ValueError, match="XDG_RUNTIME_DIR"):
            default_socket()
    else:
        assert str(default_socket()) == row["socket"]


def test_a_token_comes_from_argument_file_or_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert find_token(None, None) is None
    assert find_token("given", file) == "given"
    assert find_token(None, file) == "secret"
    assert find_token("given\n", None) == "given", "as read from a file by the caller"
    monkeypatch.setenv("MLXD_TOKEN_FILE", str(file))
    assert find_token(None, None) == "secret"
