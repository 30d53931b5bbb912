"""Text out: stop strings, whole characters, log-probabilities, the order of events, endings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxd.v1 import inference_pb2 as inference
from wire import CALL_S, Wire, chat, request, token_ids

pytest.importorskip("mlx_lm", reason="the tiny checkpoints are written by mlx-lm")

from tiny_tokenizer import EOS, VOCABULARY, decode, tokenizer

PROMPT = list(range(60, 90))
TOKENS = 60
FIRST_TEXT_TOKEN = 4


def banned(keep: Any) -> dict[int, float]:
    """Returns a logit bias that allows only the tokens for which `keep` is true."""
    return {id_: -1000.0 for id_ in range(VOCABULARY) if not keep(id_)}


def is_plain(id_: int) -> bool:
    """Tells whether a token is printable ASCII."""
    return id_ >= FIRST_TEXT_TOKEN and decode([id_]).isascii() and decode([id_]).isprintable()


PLAIN = banned(is_plain)
NO_SPECIAL = banned(lambda id_: id_ >= FIRST_TEXT_TOKEN)


def plain(wire: Wire, **fields: Any) -> tuple[list[str], inference.GenerateFinished]:
    """Returns the deltas of a greedy stream of printable text, and its last event."""
    options = {"max_tokens": TOKENS, "sampling": {"logit_bias": PLAIN}}
    events = list(wire.stream("tiny", PROMPT, **options, **fields))
    texts = [event.delta.text for event in events if event.HasField("delta")]
    assert events[-1].HasField("finished")
    return texts, events[-1].finished


def token_texts(wire: Wire) -> list[str]:
    """Returns the output without stop strings, token by token."""
    reply = wire.generate("tiny", PROMPT, max_tokens=TOKENS, sampling={"logit_bias": PLAIN})
    texts = [decode([id_]) for id_ in reply.token_ids]
    assert "".join(texts) == reply.text
    return texts


def test_a_stop_string_across_tokens_ends_the_output_before_it(wire: Wire) -> None:
    tokens = token_texts(wire)
    whole = "".join(tokens)
    tried = 0
    for last in range(5, TOKENS, 7):
        # From inside one token into the next ones.
        stop = (tokens[last - 2] + tokens[last - 1] + tokens[last])[1:]
        texts, finished = plain(wire, stop_strings=["never in it", stop])
        assert "".join(texts) == whole[: whole.index(stop)]
        assert finished.finish_reason == inference.FINISH_REASON_STOP_STRING
        assert finished.stop_string == stop
        tried += len(stop) >= 2
    assert tried > 3


def test_a_partial_stop_string_is_not_lost(wire: Wire) -> None:
    whole = "".join(token_texts(wire))
    stops = [whole[at : at + 4] + "\x01" for at in range(0, len(whole) - 4, 3)]
    texts, finished = plain(wire, stop_strings=stops[:16])
    assert "".join(texts) == whole
    assert finished.finish_reason == inference.FINISH_REASON_LENGTH
    # The end is held back until nothing can follow.
    texts, _ = plain(wire, stop_strings=[whole[-3:] + "\x01"])
    assert "".join(texts) == whole


def test_the_first_stop_string_to_appear_wins(wire: Wire) -> None:
    whole = "".join(token_texts(wire))
    early, late = whole[10:13], whole[20:25]
    texts, finished = plain(wire, stop_strings=[late, early])
    assert "".join(texts) == whole[: whole.index(early)]
    assert finished.stop_string == early


@pytest.mark.parametrize("seed", range(6))
def test_deltas_are_whole_characters_and_add_up(wire: Wire, seed: int) -> None:
    # Random bytes: mostly invalid sequences, and some valid ones.
    sampling = {"temperature": 3.0, "seed": seed, "logit_bias": NO_SPECIAL}
    options = {"max_tokens": 120, "sampling": sampling}
    events = list(wire.stream("tiny", PROMPT, **options))
    ids = [id_ for event in events for id_ in event.delta.token_ids]
    text = "".join(event.delta.text for event in events)
    assert len(ids) == 120
    assert text == decode(ids)
    assert wire.generate("tiny", PROMPT, **options).text == text


def test_a_character_of_several_tokens_arrives_in_one_piece(wire: Wire) -> None:
    # Only the two bytes of one character may be chosen, in any order.
    halves = tokenizer().encode("é").ids
    assert len(halves) == 2
    sampling = {"temperature": 5.0, "seed": 5, "logit_bias": banned(lambda id_: id_ in halves)}
    events = list(wire.stream("tiny", PROMPT, max_tokens=100, sampling=sampling))
    ids = [id_ for event in events for id_ in event.delta.token_ids]
    text = "".join(event.delta.text for event in events)
    assert text == decode(ids)
    assert text.count("é") > 5


def test_events_come_in_order_and_end_once(wire: Wire) -> None:
    events = [event.WhichOneof("event") for event in wire.stream("tiny", PROMPT, max_tokens=20)]
    assert events[0] == "started"
    assert events[-1] == "finished"
    middle = events[1:-1]
    assert set(middle) <= {"progress", "delta"}
    assert middle == sorted(middle, key=["progress", "delta"].index)


def test_unary_and_streamed_answers_are_the_same(wire: Wire) -> None:
    # Without a given seed each request draws its own.
    asked = request("tiny", PROMPT, max_tokens=20, logprobs=3, sampling={"seed": 11})
    # Run once before, so that both find the same tokens cached.
    wire.inference.Generate(asked, timeout=CALL_S)
    unary = wire.inference.Generate(asked, timeout=CALL_S)
    events = list(wire.inference.StreamGenerate(asked, timeout=CALL_S))
    deltas = [event.delta for event in events]
    assert [id_ for delta in deltas for id_ in delta.token_ids] == list(unary.token_ids)
    assert "".join(delta.text for delta in deltas) == unary.text
    assert [entry for delta in deltas for entry in delta.logprobs] == list(unary.logprobs)
    assert events[-1].finished.usage == unary.usage
    assert events[0].started.sampling == unary.sampling
    assert unary.usage.completion_tokens == 20
    assert unary.usage.prompt_tokens == len(PROMPT)


def test_logprobs_are_of_the_raw_distribution(wire: Wire) -> None:
    sampling = {"temperature": 1.7, "top_k": 40, "seed": 4, "repetition_penalty": 1.5}
    reply = wire.generate("tiny", PROMPT, max_tokens=12, logprobs=5, sampling=sampling)
    assert len(reply.logprobs) == len(reply.token_ids) == 12
    scores = wire.score("tiny", [*PROMPT, *reply.token_ids], top=5).tokens[len(PROMPT) :]
    for entry, id_, score in zip(reply.logprobs, reply.token_ids, scores, strict=True):
        assert entry.chosen.token_id == id_
        assert entry.chosen.token_bytes.decode("latin-1") or id_ < FIRST_TEXT_TOKEN
        np.testing.assert_allclose(entry.chosen.logprob, score.token.logprob, atol=2e-3)
        top = [item.logprob for item in entry.top]
        assert top == sorted(top, reverse=True)
        np.testing.assert_allclose(top, [item.logprob for item in score.top], atol=2e-3)


def test_logprobs_of_the_chosen_only(wire: Wire) -> None:
    reply = wire.generate("tiny", PROMPT, max_tokens=3, logprobs=0)
    assert [len(entry.top) for entry in reply.logprobs] == [0, 0, 0]
    assert not wire.generate("tiny", PROMPT, max_tokens=3).logprobs


def test_ids_are_returned_only_when_asked_for(wire: Wire) -> None:
    asked = inference.GenerateRequest(
        model="tiny",
        token_ids=token_ids(PROMPT),
        stopping=inference.StoppingOptions(max_tokens=3),
    )
    assert not wire.inference.Generate(asked, timeout=CALL_S).token_ids


def test_stop_tokens_and_the_models_own_end_the_output(wire: Wire) -> None:
    whole = list(wire.generate("tiny", PROMPT, max_tokens=40).token_ids)
    stop = whole[10]
    asked = request("tiny", PROMPT, max_tokens=40)
    asked.stopping.stop_token_ids.append(stop)
    reply = wire.inference.Generate(asked, timeout=CALL_S)
    assert reply.finish_reason == inference.FINISH_REASON_STOP
    assert list(reply.token_ids) == whole[: whole.index(stop) + 1]
    assert reply.usage.completion_tokens == len(reply.token_ids), "the ending token included"
    certain = {"logit_bias": {EOS: 1000.0}}
    ended = wire.generate("tiny", PROMPT, max_tokens=40, ignore_eos=False, sampling=certain)
    assert ended.finish_reason == inference.FINISH_REASON_STOP
    assert (ended.usage.completion_tokens, ended.text) == (1, "")
    on = wire.generate("tiny", PROMPT, max_tokens=5, sampling=certain)
    assert on.finish_reason == inference.FINISH_REASON_LENGTH
    assert on.usage.completion_tokens == 5


def test_prompts_are_counted_as_they_are_prefilled(wire: Wire) -> None:
    text = "The harbour master counted the boats."
    ids = tokenizer().encode(text).ids
    count = wire.inference.CountTokens(
        inference.CountTokensRequest(model="tiny", prompt=text, return_token_ids=True),
        timeout=CALL_S,
    )
    assert list(count.token_ids) == ids
    assert count.token_count == len(ids)
    assert wire.generate("tiny", prompt=text, max_tokens=1).usage.prompt_tokens == len(ids)
    talk = chat("hello", "yes?", "the boats")
    counted = wire.inference.CountTokens(
        inference.CountTokensRequest(model="tiny", chat=talk, return_token_ids=True),
        timeout=CALL_S,
    )
    rendered = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in [("user", "hello"), ("assistant", "yes?"), ("user", "the boats")]
    )
    expected = tokenizer().encode(rendered + "<|im_start|>assistant\n").ids
    assert list(counted.token_ids) == expected
    assert wire.generate("tiny", chat=talk, max_tokens=1).usage.prompt_tokens == len(expected)
