"""HTTP/2 as no gRPC library sends it: requests that stop half-way, and streams reset at once."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = 8
INITIAL_WINDOW_SIZE = 4
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
    for kind, flags, stream, _ in whole_frames(connection):
        yield kind, flags, stream


def whole_frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """Reads frames as `frames` does, with what is in them."""
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
            yield kind, flags, stream, payload


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


class HalfSent:
    """Calls on one connection that each announce a message and never send its last byte."""

    def __init__(self, connection: socket.socket, path: str, calls: int, announced: int) -> None:
        self.connection = connection
        self._received = whole_frames(connection)
        # What the daemon has room for: of all calls together, of a new one, and of each.
        self._room = self._first = 65_535
        self._rooms: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self.sent = 0
        self._hear()
        for stream in range(1, 2 * calls, 2):
            begun = b"\0" + struct.pack(">I", announced)
            connection.sendall(headers(stream, path) + frame(DATA, 0, stream, begun))
            self._room -= len(begun)
            self._rooms[stream], self._left[stream] = self._first - len(begun), announced - 1

    def send(self, quiet: int = 50) -> None:
        """Sends as much as the daemon has room for, until it makes no more in some answers."""
        left = quiet
        while left > 0:
            left = quiet if self._send_round() else left - 1
            self._hear()

    def _send_round(self) -> int:
        sent = 0
        for stream, left in self._left.items():
            count = min(self._room, self._rooms[stream], left, FRAME_MAX)
            if count > 0:
                self.connection.sendall(frame(DATA, 0, stream, bytes(count)))
                self._room -= count
                self._rooms[stream] -= count
                self._left[stream] -= count
                sent += count
        self.sent += sent
        return sent

    def _hear(self) -> None:
        """Takes what the daemon says of its room, up to its answer to a ping."""
        self.connection.sendall(frame(PING, 0, 0, b"answered"))
        for kind, flags, stream, payload in self._received:
            if kind == PING and flags & ACK:
                return
            if kind == SETTINGS:
                settings = (payload[at : at + 6] for at in range(0, len(payload), 6))
                first = dict(struct.unpack(">HI", setting) for setting in settings)
                self._first = first.get(INITIAL_WINDOW_SIZE, self._first)
            elif kind == WINDOW_UPDATE and stream == 0:
                self._room += int.from_bytes(payload, "big")
            elif kind == WINDOW_UPDATE:
                self._rooms[stream] += int.from_bytes(payload, "big")
            elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                self._left.pop(stream, None)
