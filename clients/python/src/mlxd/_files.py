"""A session's file on its way to the daemon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from mlxd.v1 import session_pb2

CHUNK_BYTES = 1 << 16


class ImportParts:
    """The messages of an import: what to make of the file, then its bytes.

    `error` is what reading the file raised; gRPC only says that it could not go on.
    """

    error: Exception | None = None

    def __init__(
        self, start: session_pb2.ImportStart, file: bytes | BinaryIO | Iterable[bytes]
    ) -> None:
        self._start = start
        self._file = file

    def __iter__(self) -> Iterator[session_pb2.ImportSessionRequest]:
        yield session_pb2.ImportSessionRequest(start=self._start)
        try:
            for chunk in _chunks(self._file):
                yield session_pb2.ImportSessionRequest(chunk=chunk)
        except Exception as error:
            self.error = error
            raise


def _chunks(file: bytes | BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    """Returns the bytes of a file in pieces that are not empty."""
    if hasattr(file, "read"):
        source = cast(BinaryIO, file)
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
        return
    for part in [file] if isinstance(file, bytes) else file:
        for start in range(0, len(part), CHUNK_BYTES):
            yield bytes(part[start : start + CHUNK_BYTES])
