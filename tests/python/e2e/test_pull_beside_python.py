"""One Hugging Face cache for `mlxd pull` and Python's huggingface_hub: in turn, at once, and after
either was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import binary, wait_for
from loopback_hub import COMMAND_S, Held, LoopbackHub
from pulls import (
    FETCHED,
    NAME,
    SMALL,
    cache,
    contents,
    noise,
    output,
    pull,
    pulled,
    python,
    python_process,
)

Command = subprocess.Popen[str]
WEIGHTS = "model.safetensors"
PATTERNS = "allow_patterns=['*.json', 'model*.safetensors', '*.jinja']"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one small repo."""
    with LoopbackHub() as hub:
        hub.add(NAME, {**SMALL, WEIGHTS: noise(1, 300_000)})
        yield hub


def fetched(hub: LoopbackHub) -> dict[str, bytes]:
    """Returns the files that a pull fetches."""
    return {name: hub.repos[NAME].files[name] for name in FETCHED}


def start_pull(hub: LoopbackHub, home: Path) -> Command:
    """Starts `mlxd pull`."""
    return subprocess.Popen(
        [str(binary()), "pull", NAME],
        env=hub.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_python_reads_what_we_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    ours = pulled(hub, tmp_path)
    before = len(hub.requests("/resolve/")) + len(hub.requests("/resolve/", method="HEAD"))
    offline = f"print(snapshot_download({NAME!r}, local_files_only=True))"
    assert python(hub, tmp_path, offline, HF_HUB_OFFLINE="1") == str(ours)
    assert python(hub, tmp_path, f"print(snapshot_download({NAME!r}, {PATTERNS}))") == str(ours)
    after = len(hub.requests("/resolve/")) + len(hub.requests("/resolve/", method="HEAD"))
    assert after == before, "Python found every file in the cache"
    scanned = "info = scan_cache_dir(); print(len(info.repos), info.warnings)"
    assert python(hub, tmp_path, scanned) == "1 []"


def test_we_use_what_python_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    theirs = Path(python(hub, tmp_path, f"print(snapshot_download({NAME!r}))"))
    assert (theirs / "modeling_tiny.py").exists()
    before = len(hub.requests("/resolve/"))
    assert pulled(hub, tmp_path) == theirs
    assert len(hub.requests("/resolve/")) == before


def test_python_waits_for_the_blob_that_a_pull_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    digest = hub.repos[NAME].digest(WEIGHTS)
    held = Held(hub, digest)
    ours = start_pull(hub, tmp_path)
    assert held.asked.wait(COMMAND_S)
    theirs = python_process(hub, tmp_path, f"print(snapshot_download({NAME!r}, {PATTERNS}))")
    # Python asks for the blob's hash, then for its lock.
    wait_for(lambda: hub.requests(WEIGHTS, method="HEAD"), "Python's question")
    both_end(hub, held, ours, theirs)


def test_a_pull_waits_for_the_blob_that_python_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    digest = hub.repos[NAME].digest(WEIGHTS)
    held = Held(hub, digest)
    only = f"allow_patterns={WEIGHTS!r}"
    theirs = python_process(hub, tmp_path, f"print(snapshot_download({NAME!r}, {only}))")
    assert held.asked.wait(COMMAND_S)
    ours = start_pull(hub, tmp_path)
    # Files are fetched at the same time: once the others are there, the lock was asked for.
    others = {hub.repos[NAME].digest(name) for name in FETCHED - {WEIGHTS}}
    blobs = cache(tmp_path) / "blobs"
    wait_for(lambda: others <= {blob.name for blob in blobs.glob("*")}, "the other blobs")
    both_end(hub, held, ours, theirs)


def both_end(hub: LoopbackHub, held: Held, ours: Command, theirs: Command) -> None:
    """Lets the storage answer the one who came first; the other finds the blob."""
    assert (ours.poll(), theirs.poll()) == (None, None), "both wait"
    held.free.set()
    snapshot = output(ours)
    assert output(theirs) == snapshot
    assert len(hub.requests(held.text, "storage")) == 1
    assert contents(Path(snapshot)) == fetched(hub)


def test_what_python_has_not_completed_is_neither_used_nor_in_the_way(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    digest = hub.repos[NAME].digest(WEIGHTS)
    begun, free = threading.Event(), threading.Event()
    # In the middle of the weights: the other files are small.
    hub.alarm = (150_000, lambda: begun.set() or free.wait(COMMAND_S))
    theirs = python_process(hub, tmp_path, f"snapshot_download({NAME!r})")
    assert begun.wait(COMMAND_S)
    blobs = cache(tmp_path) / "blobs"
    wait_for(lambda: [*blobs.glob(f"{digest}*.incomplete")], "a file that has begun")
    theirs.send_signal(signal.SIGKILL)
    theirs.communicate()
    free.set()
    offline = pull(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "is not whole in the Hugging Face cache" in offline.stderr
    snapshot = pulled(hub, tmp_path)
    assert contents(snapshot).items() >= fetched(hub).items()
    assert python(hub, tmp_path, f"print(snapshot_download({NAME!r}))") == str(snapshot)


def test_incomplete_blobs_beside_a_whole_snapshot_change_nothing(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    snapshot = pulled(hub, tmp_path)
    digest = hub.repos[NAME].digest(WEIGHTS)
    # As Python's older and present releases name them.
    for name in (f"{digest}.incomplete", f"{digest}.0a1b2c3d.incomplete", f"{'0' * 64}.incomplete"):
        (cache(tmp_path) / "blobs" / name).write_bytes(b"begun")
    before = len(hub.requests("/resolve/"))
    assert pulled(hub, tmp_path) == snapshot
    assert pulled(hub, tmp_path, HF_HUB_OFFLINE="1") == snapshot
    assert len(hub.requests("/resolve/")) == before
    (row,) = json.loads(hub.mlxd(tmp_path, "list", "--json").stdout)["models"]
    assert (row["name"], row["revision"]) == (NAME, hub.repos[NAME].commit)
    assert contents(snapshot) == fetched(hub)


def test_python_goes_on_where_a_pull_was_interrupted(hub: LoopbackHub, tmp_path: Path) -> None:
    digest = hub.repos[NAME].digest(WEIGHTS)
    held = Held(hub, digest)
    ours = start_pull(hub, tmp_path)
    assert held.asked.wait(COMMAND_S)
    ours.send_signal(signal.SIGKILL)
    ours.communicate()
    held.free.set()
    hub.faults.clear()
    theirs = Path(python(hub, tmp_path, f"print(snapshot_download({NAME!r}))"))
    assert contents(theirs) == hub.repos[NAME].files
    assert pulled(hub, tmp_path, HF_HUB_OFFLINE="1") == theirs
