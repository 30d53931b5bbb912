"""The time that a call has left, however many requests it sends. Clients and provider count it."""

from __future__ import annotations

import time


class Deadline:
    """The end of a call, `timeout` seconds after this object was made; None sets no end."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Returns the seconds left, at least 0; None without an end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
