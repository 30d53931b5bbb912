"""What one call may spend: its time, and its tries while the daemon's queue is full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from abstractllm.exceptions import InvalidParameterError

import mlxd
from mlxd._deadline import Deadline
from mlxd.abstractllm.errors import PROVIDER


class Budget(Deadline):
    """The time and the tries that a call has left, however many requests it sends."""

    def __init__(self, timeout: float | None, retries: int | None) -> None:
        super().__init__(timeout)
        self._retries = retries

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Budget:
        """Starts the budget that the parameters `timeout` and `max_retries` set; None sets none.

        Raises:
            InvalidParameterError: one of them is not a number of seconds, or of tries.
        """
        timeout, retries = given.get("timeout"), given.get("max_retries")
        if timeout is not None and not (_is_number(timeout) and timeout >= 0):
            raise _invalid("timeout", timeout, "a number of seconds")
        if retries is not None and not (_is_number(retries) and _is_count(retries)):
            raise _invalid("max_retries", retries, "a number of tries")
        return cls(timeout, retries)

    def pause(self, error: mlxd.CapacityError) -> float:
        """Returns the seconds to wait before the next try, as the daemon names them.

        Raises:
            CapacityError: `error`: it is not a full queue, which moves while the daemon works, or
                no time or try is left for it. Memory is freed only when others stop using it.
        """
        wait, left = error.retry_after, self.left()
        if error.reason != "QUEUE_FULL" or wait is None:
            raise error
        if self._retries == 0 or (left is not None and left <= wait):
            raise error
        if self._retries is not None:
            self._retries -= 1
        return wait


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: float) -> bool:
    return value == int(value) and 0 <= value < 2**31


def _invalid(name: str, value: Any, expected: str) -> InvalidParameterError:
    return InvalidParameterError(
        name, value, message=f"{name} is {expected}, not {value!r}", provider=PROVIDER
    )
