"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
from fake import MODEL

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readmes_examples_run(address, monkeypatch, capsys):
    pytest.importorskip("abstractllm", reason="the abstractllm extra is not installed")
    monkeypatch.setenv("MLXD_ADDRESS", address)
    names = {}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
    assert len(examples) == 5
    assert names["MODEL"] == MODEL
    assert "MODEL_NOT_FOUND" in capsys.readouterr().out
