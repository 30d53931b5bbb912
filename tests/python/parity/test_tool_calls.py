"""The record of outputs with calls is what mlx-lm, and SGLang where it is installed, read."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from tool_calls import RECORD, record, recorded, text


def test_the_recorded_calls_are_what_other_implementations_read() -> None:
    assert RECORD.read_text(encoding="utf-8") == text(record(recorded()))


def test_the_others_agree_with_what_was_written_but_for_known_cases() -> None:
    entries = recorded().values()
    compared = [entry for entry in entries for judge in JUDGES if entry[judge] is not None]
    differing = {
        (judge, entry["format"], entry["case"])
        for entry in entries
        for judge in JUDGES
        if entry[judge] is not None and entry[judge] != entry["written"]
    }
    assert differing == KNOWN
    assert len(compared) > 250


JUDGES = ("mlx_lm", "sglang")
# Where one of them reads something else than was written, in its release of the record.
KNOWN = {
    # A hyphen in a name is not Python.
    ("mlx_lm", "pythonic", "pythonic: several"),
    ("sglang", "pythonic", "pythonic: several"),
    # null comes back as text.
    ("sglang", "gemma4", "gemma4: nested"),
    # An empty object is not read to its end.
    ("mlx_lm", "function_gemma", "function_gemma: falsy"),
    # References in a schema are not followed, or only some.
    ("sglang", "qwen3_coder", "qwen3_coder: references"),
    ("mlx_lm", "minimax_m2", "minimax: references"),
    ("sglang", "minimax_m2", "minimax: references"),
    ("mlx_lm", "function_gemma", "function_gemma: references"),
    # It wants a space behind the marker.
    ("sglang", "mistral", "odd: no space"),
    ("sglang", "qwen3_coder", "odd: no outer tag"),
}
