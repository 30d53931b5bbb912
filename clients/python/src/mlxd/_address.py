"""Addresses of the daemon, the default one, and the token that TCP requires."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

# Bytes of sockaddr_un.sun_path, less its final zero.
SOCKET_PATH_BYTES_MAX = 103 if sys.platform == "darwin" else 107


@dataclass(frozen=True)
class Target:
    """A parsed address: gRPC's target, and the kind of connection."""

    target: str
    unix: bool
    tls: bool


def default_socket() -> Path:
    """Returns the path of the daemon's default socket, by the daemon's own rule.

    Raises:
        ValueError: neither XDG_RUNTIME_DIR nor HOME is an absolute path.
    """
    for variable, folder in (("XDG_RUNTIME_DIR", "mlxd"), ("HOME", ".mlxd")):
        base = Path(os.environ.get(variable, ""))
        if base.is_absolute():
            return base / folder / "mlxd.sock"
    raise ValueError(
        "address: none is given, MLXD_ADDRESS is unset, and neither XDG_RUNTIME_DIR nor HOME is "
        "an absolute path"
    )


def default_address() -> str:
    """Returns `MLXD_ADDRESS`, else the address of the daemon's default socket."""
    return os.environ.get("MLXD_ADDRESS") or f"unix://{default_socket()}"


def is_loopback(host: str) -> bool:
    """Tells whether only processes of this machine can listen at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse(address: str | os.PathLike[str], *, token: str | None = None) -> Target:
    """Parses `unix:///path`, `unix:path`, a path, `http://host:port` or `https://host:port`.

    Raises:
        ValueError: the address is malformed, a socket path is longer than the system allows, or
            a token would cross a network in the clear.
    """
    text = os.fspath(address)
    if "\0" in text:
        raise ValueError("address: contains a zero byte")
    if text.startswith(("/", "./", "~")) or not isinstance(address, str):
        text = f"unix:{text}"
    if text.startswith("unix:"):
        return _parse_unix(text)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"address {text!r}: expected unix:///path, http://127.0.0.1:port or https://host:port"
        )
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"address {text!r}: nothing may follow the port")
    tls = parts.scheme == "https"
    if not tls and token and not is_loopback(parts.hostname):
        raise ValueError(f"address {text!r}: a token is sent over https or to loopback only")
    port = parts.port or (443 if tls else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Target(f"{host}:{port}", unix=False, tls=tls)


def _parse_unix(text: str) -> Target:
    path = text.removeprefix("unix:")
    if path.startswith("//"):
        path = path[2:]
        if not path.startswith("/"):
            raise ValueError(f"address {text!r}: unix:// is followed by an absolute path")
    if not path:
        raise ValueError(f"address {text!r}: has no path")
    path = os.path.abspath(os.path.expanduser(path))
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ValueError(
            f"address {text!r}: a socket path has at most {SOCKET_PATH_BYTES_MAX} bytes, "
            f"this one {length}"
        )
    return Target(f"unix:{path}", unix=True, tls=False)


def find_token(token: str | None, token_file: str | os.PathLike[str] | None) -> str | None:
    """Returns the given token, else the one in the given file or in that of `MLXD_TOKEN_FILE`.

    White space around it, such as the last line end of a file, is not part of a token.
    """
    if token is not None:
        return token.strip() or None
    path = token_file or os.environ.get("MLXD_TOKEN_FILE")
    if not path:
        return None
    return Path(path).expanduser().read_text(encoding="utf-8").strip() or None
