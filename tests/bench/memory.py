"""The daemon's memory against the project's promises; read from /proc, so only on Linux."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from daemon import Daemon

MB = 1_000_000
# Code, libraries, tokenizer, threads and buffers, for any model.
BASE = 150 * MB
LOADING, STEADY = 1.5, 1.15


class Memory:
    """Peak while loading, taken when this is made; steady, noted after work."""

    def __init__(self, daemon: Daemon, parameters: int) -> None:
        self.daemon = daemon
        self.weights = 4 * parameters
        self.loading = self._status("VmHWM")
        self.steady = self.kv = 0

    def _status(self, key: str) -> int:
        """A line of /proc/<pid>/status in bytes; 0 elsewhere."""
        if sys.platform != "linux":
            return 0
        assert self.daemon.process is not None
        for line in Path(f"/proc/{self.daemon.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {key}")

    def note_steady(self, stats: Any) -> None:
        """Reads the daemon's memory now; `stats` is its MemoryStats."""
        self.steady = self._status("VmRSS")
        self.kv = stats.kv_slab_bytes + stats.kv_idle_bytes

    def numbers(self) -> dict[str, int]:
        """Everything, in bytes."""
        return {
            "f32_weight_bytes": self.weights,
            "peak_loading_bytes": self.loading,
            "steady_bytes": self.steady,
            "kv_bytes": self.kv,
            "allowed_loading_bytes": self._allowed_loading(),
            "allowed_steady_bytes": self._allowed_steady(),
        }

    def _allowed_loading(self) -> int:
        return int(LOADING * self.weights) + BASE

    def _allowed_steady(self) -> int:
        return int(STEADY * self.weights) + self.kv + BASE

    def promises(self) -> list[tuple[str, float, float]]:
        """Returns both promises: name, megabytes measured, megabytes promised."""
        if not self.loading:
            return []
        weights, kv = self.weights / MB, self.kv / MB
        return [
            (
                f"peak while loading, {LOADING} x {weights:.0f} MB of weights + {BASE / MB:.0f}",
                self.loading / MB,
                round(self._allowed_loading() / MB),
            ),
            (
                f"steady, {STEADY} x weights + {kv:.0f} MB of KV caches + {BASE / MB:.0f}",
                self.steady / MB,
                round(self._allowed_steady() / MB),
            ),
        ]
