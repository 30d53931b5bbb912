"""`mlxd pull` at a terminal: bars by file and for all, Ctrl-C, and NO_COLOR."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import binary
from loopback_hub import COMMAND_S, Held, LoopbackHub
from pulls import MIB, NAME, cache, contents, sharded
from terminal import COLOURS, Terminal, at_a_terminal

FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
INTERRUPTED = 130


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with a repo of two large files."""
    with LoopbackHub() as hub:
        hub.add(NAME, sharded(3 * MIB, shards=2))
        yield hub


def pull(hub: LoopbackHub, home: Path, name: str = NAME, **more: str) -> Terminal:
    """Starts `mlxd pull` in a terminal."""
    environment = hub.environment(home, **at_a_terminal(home), **more)
    return Terminal([str(binary()), "pull", name], environment)


def test_ctrl_c_leaves_what_is_there_and_the_next_pull_goes_on(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    repo = hub.repos[NAME]
    held = Held(hub, repo.digest(SECOND))
    terminal = pull(hub, tmp_path)
    assert held.asked.wait(COMMAND_S)
    # A bar for all files, and one for each large one; names are cut.
    for done, total in (("3.00 MiB", "6.00 MiB"), ("3.00 MiB", "3.00 MiB"), ("0 B", "3.00 MiB")):
        terminal.read_until(f" {done} of {total} ")
    for name in (NAME, FIRST[:28], SECOND[:28]):
        terminal.read_until_match(rf"{re.escape(name)} +[█░]+ +[0-9.]+ (MiB|B) of ")
    terminal.type("\x03")
    assert terminal.end() == INTERRUPTED, terminal.shown
    assert (cache(tmp_path) / "blobs" / repo.digest(FIRST)).exists()
    assert not list(cache(tmp_path).glob("snapshots/*"))
    held.free.set()
    hub.faults.clear()
    before = len(hub.seen)
    terminal = pull(hub, tmp_path)
    assert terminal.end() == 0, terminal.shown
    assert contents(next(cache(tmp_path).glob("snapshots/*"))) == repo.files
    asked = [seen.path for seen in hub.seen[before:]]
    assert any(repo.digest(SECOND) in path for path in asked)
    assert not any(FIRST in path or repo.digest(FIRST) in path for path in asked)
    assert "4 files, 6.00 MiB; 3.00 MiB downloaded" in terminal.shown


def test_bars_are_gone_before_the_last_line(hub: LoopbackHub, tmp_path: Path) -> None:
    terminal = pull(hub, tmp_path)
    assert terminal.end() == 0, terminal.shown
    _, last = terminal.shown.split("4 files, 6.00 MiB; 6.00 MiB downloaded\r\n")
    (snapshot,) = cache(tmp_path).glob("snapshots/*")
    assert last == f"{snapshot}\r\n"


def test_no_color_leaves_out_colours(hub: LoopbackHub, tmp_path: Path) -> None:
    for name, code, says in ((NAME, 0, "4 files"), ("owner/none", 1, "the hub has no repo")):
        terminal = pull(hub, tmp_path, name, NO_COLOR="1")
        assert terminal.end() == code, terminal.shown
        assert says in terminal.shown
        assert not COLOURS.search(terminal.shown)
