"""Sessions as files: they go on in another daemon as if they had never left."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, binary, free_port, token_file
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, chat, refused

FILE_INVALID = ("INVALID_ARGUMENT", "SESSION_FILE_INVALID")


@pytest.fixture(scope="module")
def from_daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon with a conversation, `trip`, of two turns."""
    with Daemon([tiny_root], models=["tiny"]) as daemon, daemon.wire() as wire:
        wire.create_session("trip", "tiny", labels={"project": "trip"}, pinned=True)
        for text in ("one", "two"):
            wire.generate("", session="trip", chat=chat(text), max_tokens=6)
        yield daemon


@pytest.fixture(scope="module")
def to_daemon(tiny_root: Path) -> Iterator[Daemon]:
    """Another daemon."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


@pytest.fixture
def source(from_daemon: Daemon) -> Iterator[Wire]:
    """A connection to the first."""
    with from_daemon.wire() as wire:
        yield wire


@pytest.fixture
def target(to_daemon: Daemon) -> Iterator[Wire]:
    """A connection to the second, which has no session afterwards."""
    with to_daemon.wire() as wire:
        yield wire
        for name in wire.session_names():
            wire.delete_session(name)


def held(wire: Wire, name: str) -> Any:
    """Returns what of a session travels."""
    found = wire.get_session(name, include_messages=True, include_token_ids=True)
    for field in ("last_use_time", "state", "kv_bytes", "cached_token_count"):
        found.session.ClearField(field)
    return found


def test_a_session_goes_on_elsewhere_with_the_text_that_it_would_have_had(
    source: Wire, target: Wire
) -> None:
    target.import_session(source.export_session("trip"))
    assert held(target, "trip") == held(source, "trip")
    source.fork_session("trip", "stays")
    expected = source.generate("", session="stays", chat=chat("three"), max_tokens=8)
    first = target.generate("", session="trip", chat=chat("three"), max_tokens=8)
    assert (first.text, first.token_ids) == (expected.text, expected.token_ids)
    again = target.generate("", session="trip", chat=chat("four"), max_tokens=8)
    assert again.usage.cached_tokens >= first.usage.prompt_tokens
    source.delete_session("stays")


def test_the_command_line_exports_and_imports_and_a_chat_goes_on(
    from_daemon: Daemon, to_daemon: Daemon, target: Wire, tmp_path: Path
) -> None:
    def mlxd(daemon: Daemon, *words: str, said: str = "") -> str:
        done = subprocess.run(
            [str(binary()), *words, "--address", f"unix://{daemon.socket}"],
            input=said,
            capture_output=True,
            text=True,
            timeout=CALL_S,
            env=daemon.environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = tmp_path / "trip.mlxd"
    mlxd(from_daemon, "sessions", "export", "trip", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["trip.mlxd"]
    assert "copy: 2 turns" in mlxd(to_daemon, "sessions", "import", str(file), "--as", "copy")
    before = target.session_ids("copy")
    mlxd(to_daemon, "chat", "--session", "copy", "--max-tokens", "4", said="three\n")
    assert target.session_ids("copy")[: len(before)] == before
    assert len(target.get_session("copy").session.turns) == 3


def test_a_session_that_nobody_used_since_the_start_is_exported(tiny_root: Path) -> None:
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        with daemon.wire() as wire:
            wire.create_session("s", "tiny")
            wire.generate("", session="s", chat=chat("one"), max_tokens=4)
            before = wire.session_ids("s")
        daemon.kill()
        daemon.start()
        with daemon.wire() as wire:
            file = wire.export_session("s")
            wire.import_session(file, name="copy", piece=11)
        # What was acknowledged is on disk.
        daemon.kill()
        daemon.start()
        with daemon.wire() as wire:
            assert wire.session_names() == ["copy", "s"]
            assert wire.session_ids("copy") == before == wire.session_ids("s")


def test_a_damaged_file_makes_no_session_wherever_it_is_damaged(source: Wire, target: Wire) -> None:
    file = source.export_session("trip")
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    before = target.stats().session_bytes
    for _ in range(60):
        at = moments.randrange(16, len(file))
        flipped = file[:at] + bytes([file[at] ^ 1 << moments.randrange(8)]) + file[at + 1 :]
        for damaged in (flipped, file[:at], file[:at] + file[at + 1 :], file[:at] + file):
            with refused(*FILE_INVALID):
                target.import_session(damaged, name="new")
    with refused("FAILED_PRECONDITION", "SESSION_FILE_UNSUPPORTED"):
        target.import_session(file[:12] + b"\3" + file[13:], name="new")
    assert target.session_names() == [], f"seed {seed}"
    assert target.stats().session_bytes == before


def test_a_replaced_session_is_the_new_one_after_a_crash_and_says_nothing_of_the_old(
    source: Wire, tiny_root: Path
) -> None:
    file = source.export_session("trip")
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        with daemon.wire() as wire:
            wire.create_session("trip", "tiny")
            wire.generate("", session="trip", chat=chat("something else"), max_tokens=6)
            wire.save_session("trip")
            with refused("ALREADY_EXISTS", "SESSION_EXISTS"):
                wire.import_session(file)
            with refused("ABORTED", "SESSION_MOVED"):
                wire.import_session(file, replace=True, expected_token_count=1)
            wire.import_session(file, replace=True)
            assert wire.get_session("trip").session.snapshot_token_count == 0
        daemon.kill()
        daemon.start()
        with daemon.wire() as wire:
            assert held(wire, "trip") == held(source, "trip")
            source.fork_session("trip", "twin")
            expected = source.generate("", session="twin", chat=chat("three"), max_tokens=8)
            again = wire.generate("", session="trip", chat=chat("three"), max_tokens=8)
            assert (again.text, again.token_ids) == (expected.text, expected.token_ids)
            source.delete_session("twin")


def test_random_bytes_that_begin_as_a_file_are_refused(source: Wire, target: Wire) -> None:
    start = source.export_session("trip")[:16]
    generator = random.Random(7)
    for size in (0, 1, 67, 68, 4096, 1 << 20):
        with refused(*FILE_INVALID):
            target.import_session(start + generator.randbytes(size), name="new")
    # A frame of the largest size that there may be, of which little comes.
    sizes = (1 << 20).to_bytes(8, "little") * 2
    with refused(*FILE_INVALID):
        target.import_session(start + b"mlx1" + sizes + bytes(48 + 1000), name="new")


def test_an_import_that_does_not_end_is_ended(tiny_root: Path) -> None:
    config = {"receive_s": 1, "session_bytes_max": 1 << 20}
    with Daemon([tiny_root], config) as daemon, daemon.wire() as wire:
        wire.create_session("s", "tiny")
        start = wire.export_session("s")[:16]
        sizes = (8).to_bytes(8, "little") + (1 << 20).to_bytes(8, "little")
        header = start + b"mlx1" + sizes + bytes(48)

        def endless() -> Iterator[bytes]:
            yield header
            while True:
                yield bytes(1 << 16)

        with refused(*FILE_INVALID):
            wire.import_session(endless(), name="new")

        def stalling() -> Iterator[bytes]:
            yield header
            # Until the daemon has ended the call, which closes the channel's side of it.
            while wire.stats().requests_total >= 0:
                yield b"x"

        with refused("DEADLINE_EXCEEDED", "DEADLINE") as refusal:
            wire.import_session(stalling(), name="new")
        assert refusal.failure.metadata["limit"] == "receive_s"
        assert wire.session_names() == ["s"]
        assert daemon.resident_bytes() > 0


def test_what_an_importer_may_not_hold_is_refused(source: Wire, tiny_root: Path) -> None:
    file = source.export_session("trip")
    config = {"sessions_max": 1, "sessions_pinned_max": 0}
    with Daemon([tiny_root], config) as daemon, daemon.wire() as wire:
        with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT") as refusal:
            wire.import_session(file)
        assert refusal.failure.metadata["limit"] == "sessions_pinned_max"
        assert wire.import_session(file, pinned=False).token_count > 0
        with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT") as refusal:
            wire.import_session(file, name="second", pinned=False)
        assert refusal.failure.metadata["limit"] == "sessions_max"
        wire.delete_session("trip")
        with refused("NOT_FOUND", "MODEL_NOT_FOUND"):
            wire.import_session(file, model="absent", pinned=False)


def test_another_principal_can_import_a_file_and_export_nothing_foreign(
    tiny_root: Path, tmp_path: Path
) -> None:
    token, address = "t" * 40, f"127.0.0.1:{free_port()}"
    config = {"listen": address, "token_file": str(token_file(tmp_path, token))}
    with (
        Daemon([tiny_root], config, models=["tiny"]) as daemon,
        daemon.wire() as mine,
        daemon.wire(address, token) as other,
    ):
        mine.create_session("s", "tiny")
        mine.generate("", session="s", chat=chat("one"), max_tokens=4)
        with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            other.export_session("s")
        made = other.import_session(mine.export_session("s"))
        assert made.owner.startswith("token:")
        assert other.session_ids("s") == mine.session_ids("s")


def test_a_session_of_another_model_is_not_misread(source: Wire, tiny_root: Path) -> None:
    file = source.export_session("trip")
    with Daemon([tiny_root], models=["other"]) as daemon, daemon.wire() as wire:
        # The same tokenizer: its tokens are the same.
        wire.import_session(file, model="other")
        before = wire.session_ids("trip")
        wire.generate("", session="trip", chat=chat("three"), max_tokens=4)
        assert wire.session_ids("trip")[: len(before)] == before


def test_an_export_says_when_the_session_is_not_what_was_expected(source: Wire) -> None:
    request = session.ExportSessionRequest(name="trip", expected_token_count=1)
    with refused("ABORTED", "SESSION_MOVED"):
        list(source.sessions.ExportSession(request, timeout=CALL_S))
