"""Watching sessions: what becomes of them, for their owner alone, until the daemon ends."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import duration_pb2

from daemon import Daemon, binary, free_port, token_file, wait_for
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, refused

KINDS = session.SessionChangeKind


@pytest.fixture
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon of its own."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


def watch(wire: Wire, **fields: Any) -> Any:
    """Begins to watch."""
    return wire.sessions.WatchSessions(session.WatchSessionsRequest(**fields), timeout=CALL_S)


def ready(events: Any) -> list[str]:
    """Reads until the changes begin; returns the names of what was there."""
    names = []
    for event in events:
        if event.HasField("ready"):
            return names
        assert event.change.kind == KINDS.SESSION_CHANGE_KIND_LISTED
        names.append(event.change.name)
    raise AssertionError("the watch ended")


def until(events: Any, name: str, kind: str) -> session.SessionChange:
    """Reads until a session is told with this kind."""
    wanted = (name, KINDS.Value(f"SESSION_CHANGE_KIND_{kind}"))
    return next(e.change for e in events if (e.change.name, e.change.kind) == wanted)


def test_a_dashboard_learns_what_becomes_of_sessions(daemon: Daemon) -> None:
    with daemon.wire() as wire, daemon.wire() as other:
        wire.create_session("there", "tiny")
        events = watch(other)
        assert ready(events) == ["there"]
        wire.create_session("new", "tiny", labels={"a": "b"})
        assert until(events, "new", "CREATED").session.labels["a"] == "b"
        running = wire.stream("", [5, 6, 7], session="new", max_tokens=20000)
        assert next(running).HasField("started")
        change = until(events, "new", "CHANGED")
        assert change.session.busy
        assert change.session.state == session.SESSION_STATE_RUNNING
        assert "busy" in change.changed_fields
        running.cancel()
        assert not until(events, "new", "CHANGED").session.busy
        wire.generate("", [5, 6, 7], session="new", max_tokens=4)
        while not (change := until(events, "new", "CHANGED")).session.turns:
            pass
        assert change.session.token_count == 7
        assert change.session.state == session.SESSION_STATE_HOT
        assert change.session.kv_bytes > 0
        wire.import_session(wire.export_session("new"), name="copy")
        assert until(events, "copy", "CREATED").session.token_count == 7
        wire.delete_session("new")
        assert not until(events, "new", "DELETED").HasField("session")
        brief = session.UpdateSessionRequest(name="copy", ttl=duration_pb2.Duration(nanos=1))
        wire.sessions.UpdateSession(brief, timeout=CALL_S)
        until(events, "copy", "EXPIRED")
        events.cancel()


def test_a_watch_ends_with_the_daemon_and_the_daemon_does_not_wait_for_it(daemon: Daemon) -> None:
    with daemon.wire() as wire:
        events = watch(wire, changes_only=True)
        assert ready(events) == []
        daemon.signal(signal.SIGTERM)
        with refused("UNAVAILABLE", "DRAINING"):
            list(events)
        assert daemon.exit_code() == 0


def test_nobody_watches_anothers_sessions(tiny_root: Path, tmp_path: Path) -> None:
    token, address = "t" * 40, f"127.0.0.1:{free_port()}"
    config = {"listen": address, "token_file": str(token_file(tmp_path, token))}
    with (
        Daemon([tiny_root], config, models=["tiny"]) as daemon,
        daemon.wire() as mine,
        daemon.wire(address, token) as other,
    ):
        mine.create_session("secret", "tiny")
        events = watch(other)
        assert ready(events) == []
        mine.generate("", [5, 6], session="secret", max_tokens=2)
        mine.delete_session("secret")
        other.create_session("own", "tiny")
        assert next(events).change.name == "own"
        events.cancel()


def test_one_that_never_reads_costs_nobody_anything(daemon: Daemon) -> None:
    with daemon.wire() as wire, daemon.wire() as silent:
        wire.create_session("s", "tiny")
        unread = [watch(silent) for _ in range(16)]
        for events in unread:
            events.initial_metadata()  # It has begun.
        with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT") as refusal:
            list(watch(silent))
        assert refusal.failure.metadata["limit"] == "session_watches_max"
        before = daemon.resident_bytes()
        for number in range(400):
            label = {"note": f"{number}".rjust(1000)}
            update = session.UpdateSessionRequest(name="s", labels=label)
            wire.sessions.UpdateSession(update, timeout=CALL_S)
        wire.generate("", [5, 6], session="s", max_tokens=2)
        assert daemon.resident_bytes() - before < 64 << 20
        wire.delete_session("s")
        # And each learns how it ended.
        until(unread[0], "s", "DELETED")
        for events in unread:
            events.cancel()
        wait_for(lambda: can_watch(wire), "places are free again")


def can_watch(wire: Wire) -> bool:
    """Tells whether there is a place for one more."""
    events = watch(wire)
    try:
        return ready(events) == []
    except Exception:
        return False
    finally:
        events.cancel()


def test_the_command_line_watches(daemon: Daemon) -> None:
    with daemon.wire() as wire:
        wire.create_session("there", "tiny")
        command = [str(binary()), "sessions", "watch", "--json"]
        process = subprocess.Popen(
            [*command, "--address", f"unix://{daemon.socket}"],
            stdout=subprocess.PIPE,
            text=True,
            env=daemon.environment,
        )
        try:
            assert process.stdout is not None
            lines = (json.loads(line) for line in process.stdout)
            assert [next(lines)["kind"] for _ in range(2)] == ["listed", "ready"]
            wire.create_session("new", "tiny")
            created = next(lines)
            assert (created["kind"], created["session"]["name"]) == ("created", "new")
            process.send_signal(signal.SIGINT)
            assert process.wait(CALL_S) == 130
        finally:
            process.kill()
            process.wait()
