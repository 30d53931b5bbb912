"""Who finds whose cached KV: salts, the switch that turns reuse off, and other principals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, free_port, token_file
from mlxd.v1 import inference_pb2 as pb
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, chat, refused

TOKEN = "correct-horse-battery-staple"
PROMPT = [60 + n * 11 % 300 for n in range(200)]


@pytest.fixture
def two(tiny_root: Path, tmp_path: Path) -> Iterator[tuple[Wire, Wire]]:
    """Connections of two principals to one daemon: a uid, and a token."""
    address = f"127.0.0.1:{free_port()}"
    config = {"listen": address, "token_file": str(token_file(tmp_path, TOKEN))}
    with (
        Daemon([tiny_root], config, models=["tiny"]) as daemon,
        daemon.wire() as uid,
        daemon.wire(address, TOKEN) as token,
    ):
        yield uid, token


def cached(wire: Wire, prompt: list[int], **cache: Any) -> int:
    """Returns how much of a prompt was found."""
    reply = wire.generate("tiny", prompt, max_tokens=2, cache=pb.CacheOptions(**cache))
    return reply.usage.cached_tokens


def test_a_request_without_reuse_finds_nothing_and_leaves_nothing(wire: Wire) -> None:
    prompt = [3, *PROMPT]
    assert cached(wire, prompt, off=True) == 0
    before = wire.stats().cached_tokens_total
    assert cached(wire, prompt, off=True) == 0
    assert cached(wire, prompt) <= 1, "others may begin with the first token"
    assert wire.stats().cached_tokens_total <= before + 1
    assert cached(wire, prompt) == len(prompt) - 1
    assert cached(wire, prompt, off=True) == 0


def test_only_the_same_salt_finds_a_prompt(wire: Wire) -> None:
    prompt = [4, *PROMPT]
    for salt in ("", "tenant-a", "tenant-b"):
        assert cached(wire, prompt, salt=salt) <= 1, salt
        assert cached(wire, prompt, salt=salt) == len(prompt) - 1, salt
    ids = pb.TokenIds(ids=prompt)
    score = pb.ScoreRequest(model="tiny", token_ids=ids, cache=pb.CacheOptions(salt="tenant-c"))
    assert wire.inference.Score(score, timeout=CALL_S).usage.cached_tokens == 0
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cache.salt"):
        cached(wire, prompt, salt="x" * 129)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "cache_salt"):
        wire.create_session("salty", "tiny", cache_salt="x" * 129)


def test_turns_and_forks_have_the_salt_of_their_session(wire: Wire) -> None:
    wire.create_session("salted", "tiny", cache_salt="tenant-d")
    first = wire.generate("", session="salted", chat=chat("in a session with a salt"), max_tokens=8)
    wire.fork_session("salted", "salted-fork")
    for name in ("salted", "salted-fork"):
        reply = wire.generate("", session=name, chat=chat("more"), max_tokens=8)
        assert reply.usage.cached_tokens >= first.session_token_count - 1
    ids = list(wire.get_session("salted", include_token_ids=True).token_ids)
    assert cached(wire, ids) <= 40, "what every chat begins with"
    assert cached(wire, ids, salt="tenant-d") >= len(ids) - 2
    own = pb.CacheOptions(salt="tenant-e")
    other = wire.generate("", session="salted", chat=chat("x"), max_tokens=2, cache=own)
    assert other.usage.cached_tokens == 0, "a request's own salt counts"
    for name in ("salted", "salted-fork"):
        wire.delete_session(name)


def test_another_principal_finds_neither_prefixes_nor_sessions(two: tuple[Wire, Wire]) -> None:
    uid, token = two
    uid.create_session("private", "tiny")
    uid.generate("", PROMPT, session="private", max_tokens=8)
    ids = list(uid.get_session("private", include_token_ids=True).token_ids)
    assert cached(token, ids) == 0
    assert cached(token, ids) == len(ids) - 1, "its own"
    assert cached(uid, ids) == len(ids) - 1

    asks = {
        "GetSession": session.GetSessionRequest(name="private"),
        "ForkSession": session.ForkSessionRequest(name="private", new_name="mine"),
        "TruncateSession": session.TruncateSessionRequest(name="private", turn_count=0),
        "DeleteSession": session.DeleteSessionRequest(name="private"),
    }
    for call, request in asks.items():
        with refused("NOT_FOUND", "SESSION_NOT_FOUND") as foreign:
            getattr(token.sessions, call)(request, timeout=CALL_S)
        request.name = "nobody"
        with refused("NOT_FOUND", "SESSION_NOT_FOUND") as missing:
            getattr(token.sessions, call)(request, timeout=CALL_S)
        assert foreign.failure.message == missing.failure.message.replace("nobody", "private")
    with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
        token.generate("", [5], session="private", max_tokens=1)
    with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
        token.score("", [5], session="private")
    listed = token.sessions.ListSessions(session.ListSessionsRequest(), timeout=CALL_S)
    assert not listed.sessions
    token.create_session("private", "tiny")
    assert list(uid.get_session("private", include_token_ids=True).token_ids) == ids
