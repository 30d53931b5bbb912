"""Telling a call that its own caller closed from a task that is cancelled, for the asyncio client.

grpc.aio raises asyncio's CancelledError for both.
"""

from __future__ import annotations

import asyncio

import grpc

from mlxd.errors import CancelledCallError


def task_is_cancelled() -> bool:
    """Tells whether the running task is cancelled, and not only the call that it awaits.

    Before Python 3.11 a task does not say, and it is assumed: no cancellation may be missed.
    """
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0


def closed(what: str, request_id: str | None) -> CancelledCallError:
    """Makes the error for a call that ended because its caller closed the stream or the client."""
    text = f"the {what} is closed"
    return CancelledCallError(text, code=grpc.StatusCode.CANCELLED, request_id=request_id or "")
