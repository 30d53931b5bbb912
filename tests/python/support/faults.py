"""What a hub on loopback does wrong."""

from __future__ import annotations

from collections.abc import Callable

from loopback_hub import Handler, Repo, Seen
from pulls import NAME

Fault = Callable[[Handler, Seen], bool]


def answers(
    status: int, text: str = "", body: bytes = b"", times: int = 1 << 30, **headers: str
) -> Fault:
    """Makes a fault: requests whose path has a text are answered like this."""
    left = [times]

    def fault(handler: Handler, seen: Seen) -> bool:
        if text not in seen.path or left[0] == 0:
            return False
        left[0] -= 1
        handler.reply(
            status, body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        return True

    return fault


def listing(change: Callable[[list[dict[str, object]]], object]) -> Fault:
    """Makes a fault: the hub lists its files wrongly."""

    def fault(handler: Handler, seen: Seen) -> bool:
        if "/tree/" not in seen.path:
            return False
        repo: Repo = handler.hub.repos[NAME]
        entries = [repo.entry(name) for name in sorted(repo.files)]
        change(entries)
        handler.reply(200, entries)
        return True

    return fault
