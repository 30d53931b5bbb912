"""Long conversations: what was computed once is not computed again, and every answer is the one of
a run that finds nothing cached."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, wait_for
from mlxd.v1 import inference_pb2 as pb
from thinking import set_template, thinking
from wire import Wire, message

TURNS = 40
ANSWER = 12
PLAIN = "plain"
# A short convolution, Mamba-2, a gated delta net.
HYBRIDS = ["lfm2", "nemotron_h", "qwen3_5"]
# Turns whose answer is computed again from nothing.
COLD = range(1, TURNS, 13)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model and hybrids, with templates that think and one that does not."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from architecture_rows import row_of
    from checkpoints import Checkpoint, build
    from tiny_models import build as build_row

    root = tmp_path_factory.mktemp("history")
    long = {"max_position_embeddings": 32768, "num_key_value_heads": 2}
    build(Checkpoint(PLAIN, long), root, seed=1)
    for name, keeps in (("thinks", False), ("keeps", True)):
        set_template(build(Checkpoint(name, long), root, seed=1), thinking(keeps=keeps))
    for label in HYBRIDS:
        row = row_of(label)
        folder = build_row(row, row.base(max_position_embeddings=8192), root / label)
        set_template(folder, thinking())
    return root


@pytest.fixture(scope="module")
def daemon(root: Path) -> Iterator[Daemon]:
    """A daemon that serves them."""
    with Daemon([root]) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def words() -> dict[int, float]:
    """A bias towards tokens of whole words, so that an answer's text becomes the same tokens."""
    from tiny_tokenizer import tokenizer

    vocabulary: dict[str, int] = tokenizer().get_vocab()
    whole = [token for text, token in vocabulary.items() if re.fullmatch("Ġ[a-z]{2,}", text)]
    assert len(whole) > 5
    return dict.fromkeys(whole, 200.0)


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A connection to the daemon."""
    with daemon.wire() as wire:
        yield wire


@dataclass
class Talk:
    """What became of a conversation's turns."""

    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    outcomes: list[int] = field(default_factory=list)

    def add(self, reply: Any) -> None:
        """Notes a turn."""
        self.prompt_tokens.append(reply.usage.prompt_tokens)
        self.cached_tokens.append(reply.usage.cached_tokens)
        self.outcomes.append(reply.history)

    def cached(self) -> float:
        """Returns the part of all prompt tokens after the second turn that were cached."""
        return sum(self.cached_tokens[2:]) / sum(self.prompt_tokens[2:])


def question(client: str, turn: int) -> str:
    """Returns what a client says in a turn."""
    return f"{client} counts {turn} boats in the harbour"


def cold(wire: Wire, model: str, ids: list[int], **fields: Any) -> list[int]:
    """Returns the answer of a run that finds nothing cached and leaves nothing."""
    off = pb.CacheOptions(off=True)
    reply = wire.generate(model, ids, max_tokens=ANSWER, cache=off, **fields)
    assert reply.usage.cached_tokens == 0
    return list(reply.token_ids)


def session_turn(wire: Wire, talk: Talk, model: str, name: str, turn: int, **fields: Any) -> str:
    """Runs a turn in a session, and some of them again from nothing."""
    new = pb.ChatInput(messages=[message("USER", question(name, turn))], **fields)
    reply = wire.generate("", session=name, chat=new, max_tokens=ANSWER)
    talk.add(reply)
    if turn in COLD:
        prompt = wire.session_ids(name)[: reply.usage.prompt_tokens]
        assert cold(wire, model, prompt) == list(reply.token_ids)
    return reply.text


def test_two_clients_in_sessions_prefill_only_what_is_new(daemon: Daemon) -> None:
    with daemon.wire() as a, daemon.wire() as b:
        talks = {"Ada": (a, Talk()), "Bob": (b, Talk())}
        for name, (wire, _) in talks.items():
            wire.create_session(name, PLAIN)
        for turn in range(TURNS):
            for name, (wire, talk) in talks.items():
                session_turn(wire, talk, PLAIN, name, turn)
        for name, (wire, talk) in talks.items():
            assert talk.cached() >= 0.95, talk
            assert set(talk.outcomes[1:]) == {pb.HISTORY_OUTCOME_CONTINUED}
            wire.delete_session(name)


def test_two_clients_that_resend_everything_prefill_only_what_is_new(
    daemon: Daemon, words: dict[int, float]
) -> None:
    with daemon.wire() as a, daemon.wire() as b:
        talks: dict[str, tuple[Wire, Talk, list[Any]]] = {
            "Carl": (a, Talk(), []),
            "Dora": (b, Talk(), []),
        }
        for turn in range(TURNS):
            for name, (wire, talk, messages) in talks.items():
                messages.append(message("USER", question(name, turn)))
                chat = pb.ChatInput(messages=messages)
                fields: dict[str, Any] = {"sampling": {"logit_bias": words}}
                reply = wire.generate(PLAIN, chat=chat, max_tokens=ANSWER, **fields)
                talk.add(reply)
                messages.append(message("ASSISTANT", reply.text))
                if turn in COLD:
                    off = pb.CacheOptions(off=True)
                    again = wire.generate(PLAIN, chat=chat, max_tokens=ANSWER, cache=off, **fields)
                    assert again.token_ids == reply.token_ids
                    assert again.usage.cached_tokens == 0
        for _, talk, _ in talks.values():
            assert talk.cached() >= 0.95, talk


@pytest.mark.parametrize("thinks", [True, False], ids=["thinking", "not-thinking"])
@pytest.mark.parametrize("model", ["thinks", *HYBRIDS])
def test_reasoning_that_stays_is_not_prefilled_again(wire: Wire, model: str, thinks: bool) -> None:
    name = f"{model}-{thinks}"
    wire.create_session(name, model, history=pb.HISTORY_APPEND)
    talk, answers = Talk(), []
    for turn in range(TURNS):
        arguments = {"enable_thinking": thinks}
        answers.append(session_turn(wire, talk, model, name, turn, template_arguments=arguments))
    assert talk.cached() >= 0.95, talk
    assert set(talk.outcomes[1:]) == {pb.HISTORY_OUTCOME_APPENDED}
    held = wire.get_session(name, include_messages=True).messages
    assert [m.content[0].text for m in held[1::2]] == answers, "clients see what they saw"
    wire.delete_session(name)


def test_auto_keeps_reasoning_where_the_template_has_a_switch(wire: Wire) -> None:
    for model, expected in (
        ("keeps", pb.HISTORY_OUTCOME_APPENDED),
        ("thinks", pb.HISTORY_OUTCOME_RERENDERED),
    ):
        wire.create_session(model, model)
        talk = Talk()
        for turn in range(4):
            session_turn(
                wire, talk, model, model, turn, template_arguments={"enable_thinking": False}
            )
        assert talk.outcomes == [pb.HISTORY_OUTCOME_UNSPECIFIED, *[expected] * 3]
        wire.delete_session(model)


def test_a_session_that_appends_goes_on_after_a_restart(
    root: Path, words: dict[int, float]
) -> None:
    chat = pb.ChatInput(messages=[message("USER", "again")])
    fields: dict[str, Any] = {"max_tokens": ANSWER, "sampling": {"logit_bias": words}}
    with Daemon([root]) as daemon:
        with daemon.wire() as wire:
            wire.create_session("s", "thinks", history=pb.HISTORY_APPEND)
            wire.generate("", session="s", chat=chat, **fields)
            # Its tokens hold the stop string, its text does not. Reasoning is not searched.
            stated = pb.ChatInput(
                messages=chat.messages, template_arguments={"enable_thinking": False}
            )
            cut = wire.generate("", session="s", chat=stated, stop_strings=[" "], **fields)
            assert (cut.finish_reason, cut.text) == (pb.FINISH_REASON_STOP_STRING, "")
            before = wire.session_ids("s")
        daemon.signal(15)
        assert daemon.exit_code() == 0, daemon.log
        daemon.start()
        with daemon.wire() as wire:
            assert wire.get_session("s").session.history == pb.HISTORY_APPEND
            reply = wire.generate("", session="s", chat=chat, **fields)
            assert reply.history == pb.HISTORY_OUTCOME_APPENDED
            ids = wire.session_ids("s")
            assert ids[: len(before)] == before
            prompt = ids[: reply.usage.prompt_tokens]
            assert cold(wire, "thinks", prompt, sampling=fields["sampling"]) == list(
                reply.token_ids
            )


def common(a: list[int], b: list[int]) -> int:
    """Returns how many tokens both begin with."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_an_edited_message_is_prefilled_with_what_follows_it(wire: Wire) -> None:
    def tokens(messages: list[Any]) -> list[int]:
        chat = pb.ChatInput(messages=messages)
        request = pb.CountTokensRequest(model=PLAIN, chat=chat, return_token_ids=True)
        return list(wire.inference.CountTokens(request).token_ids)

    roles = ("USER", "ASSISTANT")
    old = [message(roles[n % 2], f"message {n} of an edited conversation") for n in range(19)]
    new = [*old]
    new[2] = message("USER", "message 2, edited")
    wire.generate(PLAIN, chat=pb.ChatInput(messages=old), max_tokens=4)
    reply = wire.generate(PLAIN, chat=pb.ChatInput(messages=new), max_tokens=ANSWER)
    before, after = tokens(old), tokens(new)
    assert reply.usage.cached_tokens == common(before, after)
    assert list(reply.token_ids) == cold(wire, PLAIN, after)


@pytest.mark.parametrize("model", [PLAIN, *HYBRIDS])
def test_a_cancelled_prefill_that_is_sent_again_starts_where_it_was(wire: Wire, model: str) -> None:
    prompt = [50 + n * n % 300 for n in range(3000)]
    running = wire.stream(model, prompt, max_tokens=2)
    done = 0
    for event in running:
        assert not event.HasField("delta"), "the prompt is long enough to be cancelled"
        if event.HasField("progress") and event.progress.done_tokens > 100:
            done = event.progress.done_tokens
            break
    running.cancel()
    wait_for(lambda: wire.stats().running_sequences == 0, "the prefill stopped")
    again = wire.generate(model, prompt, max_tokens=ANSWER)
    assert again.usage.cached_tokens >= done
    assert list(again.token_ids) == cold(wire, model, prompt)


@pytest.mark.parametrize("model", HYBRIDS)
def test_a_raw_prompt_of_a_hybrid_is_found_when_it_is_sent_again(wire: Wire, model: str) -> None:
    prompt = [40 + n * 7 % 300 for n in range(200)]
    first = wire.generate(model, prompt, max_tokens=ANSWER)
    again = wire.generate(model, prompt, max_tokens=ANSWER)
    assert again.usage.cached_tokens == len(prompt) - 1
    assert again.token_ids == first.token_ids
