"""Commands in a pseudo-terminal, as a person sees them."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 120.0
SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")
# Those that choose colours and other looks of characters.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """A command in a pseudo-terminal, and what it shows."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process, self.shown, self.heard = 0, "", 0
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.execve(command[0], command, environment)

    def read_until(self, text: str) -> None:
        """Reads until a text is shown, after the one that was waited for before."""
        self.read_while(lambda: text not in self.shown[self.heard :], text)
        self.heard = self.shown.index(text, self.heard) + len(text)

    def read_until_match(self, pattern: str) -> None:
        """Reads until something is shown that a pattern matches, wherever."""
        self.read_while(lambda: not re.search(pattern, self.shown), pattern)

    def read_while(self, lacks: Callable[[], bool], what: str) -> None:
        """Reads as long as something is lacking."""
        deadline = time.monotonic() + DEADLINE_S
        while lacks():
            ready, _, _ = select.select([self.descriptor], [], [], 0.2)
            assert time.monotonic() < deadline, f"{what!r} is not in {self.shown!r}"
            if ready:
                self.shown += self.read()

    def read(self) -> str:
        """Returns what is there; nothing once the command has ended."""
        try:
            return os.read(self.descriptor, 65536).decode(errors="replace")
        except OSError:
            return ""

    def type(self, text: str) -> None:
        """Types a text."""
        os.write(self.descriptor, text.encode())

    def end(self) -> int:
        """Reads to the end and returns the exit code."""
        while text := self.read():
            self.shown += text
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def transcript(self) -> str:
        """Returns what a person saw: the last state of each line."""
        lines = SEQUENCES.sub("", self.shown.replace("\r\n", "\n")).split("\n")
        return "\n".join(line.rstrip() for line in lines if line.strip())


def at_a_terminal(home: Path) -> dict[str, str]:
    """Returns variables of a person's terminal."""
    return {"TERM": "xterm", "XDG_RUNTIME_DIR": str(home), "TMPDIR": "/tmp"}
