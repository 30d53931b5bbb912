"""Sessions survive the daemon's end, whatever it is: each has exactly its acknowledged turns."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from daemon import Daemon, free_port, token_file, wait_for
from mlxd.v1 import inference_pb2 as inference
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, chat, refused

# Times that the daemon is killed; `make soak` kills it 25 times.
KILLS = int(os.environ.get("MLXD_KILLS", "5"))
# Says at which moments; random unless given.
SEED = int(os.environ.get("MLXD_SEED") or random.randrange(2**32))
SESSIONS = 20
TURN = [31, 32, 33]
OUTPUT_TOKENS = 3
# What a session says of its KV on disk, which is written when the daemon stops.
SNAPSHOT = ("snapshot_token_count", "snapshot_bytes")


@pytest.fixture
def daemon(tiny_root: Path) -> Iterator[Daemon]:
    """A daemon of its own, which a test ends and starts again."""
    with Daemon([tiny_root], models=["tiny"]) as daemon:
        yield daemon


def turn(wire: Wire, name: str, ids: list[int], **fields: Any) -> list[int]:
    """Runs one raw greedy turn; returns all that it added."""
    fields = {"session": name, "max_tokens": OUTPUT_TOKENS, **fields}
    return ids + list(wire.generate("", ids, **fields).token_ids)


class Talk:
    """One session's turns, as its client knows them."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.acknowledged: list[int] = []
        self.attempted: list[int] = []
        self.turns = 0

    def go_on(self, wire: Wire, stop: threading.Event) -> None:
        """Runs turn after turn until the daemon is gone."""
        while not stop.is_set():
            self.attempted = [*TURN, 100 + self.number, 200 + self.turns]
            try:
                added = turn(wire, self.name, self.attempted)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    return
                raise
            self.acknowledged += added
            self.turns += 1

    def found(self, ids: list[int], turns: int) -> None:
        """Compares what the session has with what was acknowledged; notes an unfinished turn."""
        known = len(self.acknowledged)
        assert ids[:known] == self.acknowledged, f"{self.name} lost an acknowledged turn"
        if ids[known:]:
            # Written, but killed before the client heard of it.
            assert ids[known : known + len(self.attempted)] == self.attempted, self.name
            assert len(ids) == known + len(self.attempted) + OUTPUT_TOKENS, "half a turn"
            self.turns += 1
        assert turns == self.turns
        self.acknowledged = ids


def test_killed_at_any_moment_every_session_has_its_acknowledged_turns(daemon: Daemon) -> None:
    # Shown where the test fails.
    print(f"MLXD_SEED={SEED} MLXD_KILLS={KILLS}")
    moments = random.Random(SEED)
    talks = [Talk(f"talk/{number}", number) for number in range(SESSIONS)]
    with daemon.wire() as wire:
        for talk in talks:
            wire.create_session(talk.name, "tiny")
    for _ in range(KILLS):
        stop = threading.Event()
        with daemon.wire() as wire, ThreadPoolExecutor(SESSIONS) as pool:
            running = [pool.submit(talk.go_on, wire, stop) for talk in talks]
            goal = sum(talk.turns for talk in talks) + moments.randrange(5, 60)
            wait_for(lambda goal=goal: sum(talk.turns for talk in talks) >= goal, "turns", CALL_S)
            daemon.kill()
            stop.set()
            for each in running:
                each.result()
        daemon.start()
        with daemon.wire() as wire:
            for talk in talks:
                held = wire.get_session(talk.name, include_token_ids=True)
                talk.found(list(held.token_ids), len(held.session.turns))
    # And the greedy continuation is that of a conversation that nothing interrupted.
    with daemon.wire() as wire:
        off = inference.CacheOptions(off=True)
        for talk in talks:
            context = talk.acknowledged
            added = turn(wire, talk.name, TURN, max_tokens=8)
            whole = wire.generate("tiny", context + TURN, max_tokens=8, cache=off)
            assert added[len(TURN) :] == list(whole.token_ids), talk.name


def test_a_conversation_goes_on_after_a_restart_as_if_there_had_been_none(daemon: Daemon) -> None:
    with daemon.wire() as wire:
        for name in ("stays", "restarts"):
            wire.create_session(name, "tiny")
            wire.generate("", session=name, chat=chat("one"), max_tokens=6)
        expected = wire.generate("", session="stays", chat=chat("two"), max_tokens=6)
        before = wire.get_session("restarts", include_messages=True, include_token_ids=True)
    daemon.restart()
    with daemon.wire() as wire:
        after = wire.get_session("restarts", include_messages=True, include_token_ids=True)
        for found in (before, after):
            # The cached KV is on disk, not in memory.
            for field in ("state", "kv_bytes", "cached_token_count", *SNAPSHOT):
                found.session.ClearField(field)
        assert after == before
        again = wire.generate("", session="restarts", chat=chat("two"), max_tokens=6)
        assert (again.text, again.usage.prompt_tokens) == (
            expected.text,
            expected.usage.prompt_tokens,
        )
        assert wire.stats().session_store.durable


def test_what_was_deleted_or_has_expired_does_not_come_back(daemon: Daemon) -> None:
    with daemon.wire() as wire:
        wire.create_session("deleted", "tiny")
        turn(wire, "deleted", TURN)
        wire.delete_session("deleted")
        wire.create_session("brief", "tiny", ttl=duration_pb2.Duration(nanos=1))
        wire.create_session("cut", "tiny")
        first = turn(wire, "cut", TURN)
        turn(wire, "cut", TURN)
        cut = session.TruncateSessionRequest(name="cut", turn_count=1)
        wire.sessions.TruncateSession(cut, timeout=CALL_S)
    daemon.kill()
    daemon.start()
    with daemon.wire() as wire:
        assert wire.session_names() == ["cut"]
        assert wire.session_ids("cut") == first
        for name in ("deleted", "brief"):
            with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
                wire.get_session(name)


def test_others_do_not_see_a_session_after_a_restart(tiny_root: Path, tmp_path: Path) -> None:
    token, port = "t" * 40, free_port()
    file = token_file(tmp_path, token)
    config = {"listen": f"127.0.0.1:{port}", "token_file": str(file)}
    with Daemon([tiny_root], config, models=["tiny"]) as daemon:
        with daemon.wire() as mine, daemon.wire(f"127.0.0.1:{port}", token) as other:
            mine.create_session("mine", "tiny")
            turn(mine, "mine", TURN)
            other.create_session("theirs", "tiny")
        daemon.restart()
        with daemon.wire() as mine, daemon.wire(f"127.0.0.1:{port}", token) as other:
            for wire, name, foreign in ((mine, "mine", "theirs"), (other, "theirs", "mine")):
                assert wire.session_names() == [name]
                with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
                    wire.get_session(foreign)


def test_a_second_daemon_on_the_folder_is_refused_with_the_key(
    daemon: Daemon, tiny_root: Path
) -> None:
    state = {"MLXD_STATE_DIR": daemon.environment["MLXD_STATE_DIR"]}
    second = Daemon([tiny_root], environment=state)
    try:
        second.launch()
        assert second.exit_code() != 0
        assert "`state_dir`: a daemon (pid" in second.log
    finally:
        second.stop()
    with daemon.wire() as wire:
        wire.create_session("still", "tiny")
