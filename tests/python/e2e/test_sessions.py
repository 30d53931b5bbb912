"""Sessions: a turn prefills only its new tokens, and either succeeds or leaves no trace."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from daemon import Daemon, wait_for
from mlxd.v1 import session_pb2 as session
from wire import CALL_S, Wire, chat, refused

FIRST = list(range(20, 60))
SECOND = list(range(100, 110))


@pytest.fixture
def name(wire: Wire) -> Iterator[str]:
    """A fresh session of `tiny`, deleted afterwards."""
    made = f"test/{uuid.uuid4().hex}"
    wire.create_session(made, "tiny")
    yield made
    # The test may have deleted it.
    with contextlib.suppress(grpc.RpcError):
        wire.delete_session(made)


def turn(wire: Wire, name: str, ids: list[int], **fields: Any) -> Any:
    """Runs one raw turn of eight greedy tokens."""
    return wire.generate("", ids, session=name, **{"max_tokens": 8, **fields})


def test_a_second_turn_finds_the_first_one_cached(wire: Wire, name: str) -> None:
    # No other test starts with these tokens, but a random prompt of one may.
    own = list(range(300, 340))
    first = turn(wire, name, own)
    assert first.usage.cached_tokens <= 3
    assert first.session_token_count == len(own) + 8
    second = turn(wire, name, SECOND)
    assert second.usage.prompt_tokens == len(own) + 8 + len(SECOND)
    assert second.usage.cached_tokens >= len(own) + 8 - 1
    whole = wire.generate("tiny", own + list(first.token_ids) + SECOND, max_tokens=8)
    assert list(second.token_ids) == list(whole.token_ids)
    assert wire.session_ids(name) == [*own, *first.token_ids, *SECOND, *second.token_ids]


def test_a_turn_prefills_only_its_new_tokens(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    before = wire.stats()
    turn(wire, name, SECOND)
    after = wire.stats()
    assert after.prefill_tokens_total - before.prefill_tokens_total <= len(SECOND) + 1
    assert after.cached_tokens_total - before.cached_tokens_total >= len(FIRST) + 7


def test_a_chat_session_takes_only_new_messages(wire: Wire, name: str) -> None:
    first = wire.generate("", session=name, chat=chat("one"), max_tokens=6)
    second = wire.generate("", session=name, chat=chat("two"), max_tokens=6)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.cached_tokens > 0
    held = wire.get_session(name, include_messages=True)
    roles = [message.role for message in held.messages]
    assert roles == [2, 3, 2, 3], "user and assistant, twice"
    assert held.messages[1].content[0].text == first.text
    assert [turn.message_count for turn in held.session.turns] == [2, 4]


def test_a_chat_turn_after_a_raw_one_is_refused(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    with refused("FAILED_PRECONDITION", "SESSION_NOT_CHAT"):
        wire.generate("", session=name, chat=chat("one"), max_tokens=2)


def test_a_fork_shares_the_past_and_not_the_future(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    copy = f"{name}.fork"
    fork = session.ForkSessionRequest(name=name, new_name=copy)
    forked = wire.sessions.ForkSession(fork, timeout=CALL_S).session
    assert forked.token_count == len(FIRST) + 8
    with refused("ALREADY_EXISTS", "SESSION_EXISTS"):
        wire.sessions.ForkSession(fork, timeout=CALL_S)
    reply = turn(wire, copy, SECOND)
    assert reply.usage.cached_tokens >= len(FIRST) + 7
    same = turn(wire, name, SECOND)
    assert list(same.token_ids) == list(reply.token_ids)
    turn(wire, copy, [9])
    assert len(wire.session_ids(copy)) == len(wire.session_ids(name)) + 9
    wire.delete_session(copy)


def test_truncating_goes_back_to_the_end_of_a_turn(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    after_first = wire.session_ids(name)
    second = turn(wire, name, SECOND)
    cut = session.TruncateSessionRequest(name=name, turn_count=1)
    assert wire.sessions.TruncateSession(cut, timeout=CALL_S).session.token_count == len(
        after_first
    )
    assert wire.session_ids(name) == after_first
    again = turn(wire, name, SECOND)
    assert list(again.token_ids) == list(second.token_ids)
    assert again.usage.cached_tokens >= len(after_first) - 1
    by_tokens = session.TruncateSessionRequest(name=name, token_count=10)
    assert wire.sessions.TruncateSession(by_tokens, timeout=CALL_S).session.token_count == 10
    assert wire.session_ids(name) == FIRST[:10]


def cut(wire: Wire, name: str, **to: int) -> Any:
    """Truncates the session and returns it."""
    request = session.TruncateSessionRequest(name=name, **to)
    return wire.sessions.TruncateSession(request, timeout=CALL_S).session


def test_an_answer_is_cut_to_what_its_remaining_tokens_stand_for(wire: Wire, name: str) -> None:
    first = wire.generate("", session=name, chat=chat("one"), max_tokens=8)
    before = wire.session_ids(name)
    at = first.usage.prompt_tokens + 3
    assert cut(wire, name, token_count=at).token_count == at
    assert wire.session_ids(name) == before[:at]
    held = wire.get_session(name, include_messages=True)
    # What a shorter answer would have been.
    short = wire.generate("tiny", chat=chat("one"), max_tokens=3)
    assert list(short.token_ids) == before[first.usage.prompt_tokens : at]
    assert held.messages[1].content[0].text == short.text
    again = wire.generate("", session=name, chat=chat("two"), max_tokens=4)
    assert again.usage.cached_tokens >= at - 1
    assert wire.session_ids(name)[:at] == before[:at]
    whole = wire.generate("tiny", wire.session_ids(name)[: again.usage.prompt_tokens], max_tokens=4)
    assert list(again.token_ids) == list(whole.token_ids)


def test_a_chat_session_is_cut_before_an_answer_and_within_a_question(
    wire: Wire, name: str
) -> None:
    first = wire.generate("", session=name, chat=chat("one"), max_tokens=6)
    before = wire.session_ids(name)
    assert cut(wire, name, message_count=1).token_count == first.usage.prompt_tokens
    assert len(wire.get_session(name, include_messages=True).messages) == 1
    assert cut(wire, name, token_count=3).token_count == 3
    assert wire.session_ids(name) == before[:3]
    again = wire.generate("", session=name, chat=chat("one"), max_tokens=6)
    assert list(again.token_ids) == list(first.token_ids)
    assert wire.session_ids(name) == before
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "message_count"):
        cut(wire, name, message_count=3)


def test_a_fork_at_a_turn_goes_on_as_the_session_did(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    second = turn(wire, name, SECOND)
    copy = f"{name}.at"
    fork = session.ForkSessionRequest(name=name, new_name=copy, turn_count=1)
    assert wire.sessions.ForkSession(fork, timeout=CALL_S).session.token_count == len(FIRST) + 8
    again = turn(wire, copy, SECOND)
    assert list(again.token_ids) == list(second.token_ids)
    assert again.usage.cached_tokens >= len(FIRST) + 7
    wire.delete_session(copy)


def test_an_extended_session_prefills_only_what_a_turn_adds(wire: Wire, name: str) -> None:
    text = chat("a long text that a question is about " * 20)
    extend = session.ExtendSessionRequest(name=name, chat=text)
    extended = wire.sessions.ExtendSession(extend, timeout=CALL_S)
    tokens = extended.session.token_count
    assert extended.usage.prompt_tokens == tokens > 40
    assert extended.usage.completion_tokens == 0
    assert (extended.session.state, extended.session.cached_token_count) == (2, tokens)
    assert extended.session.kv_bytes > 0
    before = wire.stats()
    first = wire.generate("", session=name, chat=chat("one"), max_tokens=6)
    after = wire.stats()
    assert first.usage.cached_tokens == tokens
    added = first.usage.prompt_tokens - tokens
    assert after.prefill_tokens_total - before.prefill_tokens_total == added
    whole = wire.generate("tiny", wire.session_ids(name)[: first.usage.prompt_tokens], max_tokens=6)
    assert list(first.token_ids) == list(whole.token_ids)
    roles = [message.role for message in wire.get_session(name, include_messages=True).messages]
    assert roles == [2, 2, 3]


def test_an_unexpected_token_count_is_refused_with_both(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST, expected_token_count=0)
    with refused("ABORTED", "SESSION_MOVED") as refusal:
        turn(wire, name, SECOND, expected_token_count=0)
    assert refusal.failure.metadata["expected"] == "0"
    assert refusal.failure.metadata["actual"] == str(len(FIRST) + 8)
    turn(wire, name, SECOND, expected_token_count=len(FIRST) + 8)
    for request in (
        session.TruncateSessionRequest(name=name, turn_count=0, expected_token_count=1),
        session.ForkSessionRequest(name=name, new_name=f"{name}.x", expected_token_count=1),
    ):
        kind = type(request).__name__.removesuffix("Request")
        with refused("ABORTED", "SESSION_MOVED"):
            getattr(wire.sessions, kind)(request, timeout=CALL_S)


def test_a_second_turn_while_one_runs_is_refused(wire: Wire, name: str) -> None:
    running = wire.stream("", FIRST, session=name, max_tokens=20000)
    assert next(running).HasField("started")
    assert wire.get_session(name).session.busy
    with refused("FAILED_PRECONDITION", "SESSION_BUSY"):
        turn(wire, name, SECOND)
    with refused("FAILED_PRECONDITION", "SESSION_BUSY"):
        wire.sessions.TruncateSession(
            session.TruncateSessionRequest(name=name, turn_count=0), timeout=CALL_S
        )
    running.cancel()
    wait_for(lambda: not wire.get_session(name).session.busy, "the session is free again")


def test_a_cancelled_turn_rolls_back_and_the_session_goes_on(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    before = wire.session_ids(name)
    running = wire.stream("", SECOND, session=name, max_tokens=20000)
    for event in running:
        if event.delta.token_ids:
            break
    running.cancel()
    wait_for(lambda: not wire.get_session(name).session.busy, "the session is free again")
    assert wire.session_ids(name) == before
    reply = turn(wire, name, SECOND)
    assert reply.usage.cached_tokens >= len(before) - 1
    whole = wire.generate("tiny", before + SECOND, max_tokens=8)
    assert list(reply.token_ids) == list(whole.token_ids)


def test_a_refused_turn_leaves_the_session_as_it_was(wire: Wire, name: str) -> None:
    turn(wire, name, FIRST)
    before = wire.session_ids(name)
    with refused("INVALID_ARGUMENT", "CONTEXT_OVERFLOW"):
        turn(wire, name, [7] * 40000)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD"):
        turn(wire, name, [9999])
    assert wire.session_ids(name) == before


def test_deleting_a_session_cancels_its_turn(wire: Wire, name: str) -> None:
    running = wire.stream("", FIRST, session=name, max_tokens=20000)
    assert next(running).HasField("started")
    wire.delete_session(name)
    with refused("CANCELLED", "CANCELLED"):
        list(running)
    with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
        wire.get_session(name)
    wait_for(lambda: wire.stats().running_sequences == 0, "the turn stopped")


def test_names_are_unique_and_may_be_left_to_the_daemon(wire: Wire, name: str) -> None:
    with refused("ALREADY_EXISTS", "SESSION_EXISTS"):
        wire.create_session(name, "tiny")
    chosen = wire.create_session("", "tiny").name
    assert chosen
    assert chosen != name
    wire.delete_session(chosen)


def test_a_session_is_bound_to_its_model(wire: Wire, name: str) -> None:
    with refused("FAILED_PRECONDITION", "SESSION_WRONG_MODEL"):
        wire.generate("other", FIRST, session=name, max_tokens=2)


def test_lists_come_in_pages_by_name(wire: Wire) -> None:
    names = [f"page/{n:02}" for n in range(7)]
    for each in names:
        wire.create_session(each, "tiny")
    found, token = [], ""
    while True:
        page = wire.sessions.ListSessions(
            session.ListSessionsRequest(page_size=3, page_token=token), timeout=CALL_S
        )
        assert len(page.sessions) <= 3
        found += [entry.name for entry in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert [each for each in found if each.startswith("page/")] == names
    nothing = session.ListSessionsRequest(model="other")
    assert not wire.sessions.ListSessions(nothing, timeout=CALL_S).sessions
    for each in names:
        wire.delete_session(each)


def test_a_session_ends_when_its_ttl_has_passed(wire: Wire) -> None:
    made = wire.create_session("brief", "tiny", ttl=duration_pb2.Duration(nanos=300_000_000))
    lifetime = made.expire_time.ToNanoseconds() - made.create_time.ToNanoseconds()
    assert 0 < lifetime < 10_000_000_000, "far less than the default"

    def gone() -> bool:
        try:
            # Reading it must not extend its lifetime.
            wire.get_session("brief")
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.NOT_FOUND
        return False

    wait_for(gone, "the session ends")


def test_sessions_have_an_owner(wire: Wire, name: str) -> None:
    assert wire.get_session(name).session.owner == f"uid:{os.getuid()}"


def test_there_is_a_limit_of_sessions(tiny_root: Any) -> None:
    with Daemon([tiny_root], {"sessions_max": 2}) as daemon, daemon.wire() as wire:
        wire.create_session("a", "tiny")
        wire.create_session("b", "tiny")
        with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT") as refusal:
            wire.create_session("c", "tiny")
        assert refusal.failure.metadata["limit"] == "sessions_max"
        assert refusal.failure.metadata["value"] == "2"
        wire.delete_session("a")
        wire.create_session("c", "tiny")


def test_idle_sessions_are_evicted_and_restored(tiny_root: Any) -> None:
    # More sessions than may run at once: the oldest lose their KV, never their tokens.
    with Daemon([tiny_root], {"running_sequences_max": 4}) as daemon, daemon.wire() as wire:
        names = [f"s{n}" for n in range(12)]
        outputs = {}
        for each in names:
            wire.create_session(each, "tiny")
            outputs[each] = list(turn(wire, each, [*FIRST, ord(each[-1])]).token_ids)
        for each in names:
            again = turn(wire, each, SECOND)
            whole = [*FIRST, ord(each[-1]), *outputs[each], *SECOND]
            alone = wire.generate("tiny", whole, max_tokens=8)
            assert list(again.token_ids) == list(alone.token_ids)
