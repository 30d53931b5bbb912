"""The records of templates are what transformers renders."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from template_fragments import GRAMMAR_RECORD, RECORD, dumps, grammar_record, record


def test_the_recorded_fragments_are_what_transformers_renders() -> None:
    assert RECORD.read_text(encoding="utf-8") == dumps(record())


def test_the_recorded_drawn_templates_are_what_transformers_renders() -> None:
    assert GRAMMAR_RECORD.read_text(encoding="utf-8") == dumps(grammar_record())
