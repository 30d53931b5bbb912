"""HTTP/2 as no gRPC library sends it: requests that stop half-way, and streams reset at once."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = 8
FRAME_MAX = 16_000


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Makes a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def open_connection(target: str) -> socket.socket:
    """Connects to gRPC's name of a unix socket, and sends what a connection begins with."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(target.removeprefix("unix:"))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b""))
    return connection


def headers(stream: int, path: str) -> bytes:
    """Makes the frame with which a gRPC call begins."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # HPACK: each a literal without indexing, under a new name.
    literals = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return frame(HEADERS, END_HEADERS, stream, literals)


def half_call(stream: int, path: str, announced: int, sent: int) -> bytes:
    """Makes a call that announces a message of some bytes, and sends the first `sent` of them."""
    data = b"\0" + struct.pack(">I", announced) + bytes(sent)
    pieces = [data[at : at + FRAME_MAX] for at in range(0, len(data), FRAME_MAX)]
    return headers(stream, path) + b"".join(frame(DATA, 0, stream, piece) for piece in pieces)


def cancelled_call(stream: int, path: str, message: bytes) -> bytes:
    """Makes a call that is cancelled in the same write."""
    data = b"\0" + struct.pack(">I", len(message)) + message
    reset = frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
    return headers(stream, path) + frame(DATA, END_STREAM, stream, data) + reset


class BlamedError(Exception):
    """The daemon ended the connection, and blames what was sent on it."""


def frames(connection: socket.socket) -> Iterator[tuple[int, int, int]]:
    """Reads frames until the daemon closes: kind, flags and stream of each. Answers settings."""
    buffered = b""
    while received := connection.recv(1 << 16):
        buffered += received
        while len(buffered) >= 9:
            end = 9 + int.from_bytes(buffered[:3], "big")
            if len(buffered) < end:
                break
            kind, flags, stream = buffered[3], buffered[4], int.from_bytes(buffered[5:9], "big")
            payload, buffered = buffered[9:end], buffered[end:]
            if kind == SETTINGS and not flags & ACK:
                connection.sendall(frame(SETTINGS, ACK, 0, b""))
            if kind == GOAWAY and any(payload[4:8]):
                raise BlamedError(f"GOAWAY {payload[4:]!r}")
            yield kind, flags, stream


def wait_until_open(connection: socket.socket) -> None:
    """Waits until the connection's window is that of the daemon, not HTTP/2's 64 KiB."""
    for kind, _, stream in frames(connection):
        if kind == WINDOW_UPDATE and stream == 0:
            return


def wait_until_taken(connection: socket.socket) -> None:
    """Waits until the daemon has taken all that was sent, or has closed the connection."""
    connection.sendall(frame(PING, 0, 0, b"answered"))
    for kind, flags, _ in frames(connection):
        if kind == PING and flags & ACK:
            return


def wait_until_ended(connection: socket.socket, calls: int) -> None:
    """Waits until the daemon has ended this number of calls, or closed the connection."""
    for kind, flags, _ in frames(connection):
        calls -= kind == RST_STREAM or (kind == HEADERS and bool(flags & END_STREAM))
        if calls == 0:
            return
