"""The demo's own logic, against a stand-in for the binary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake import MODEL, PARIS

pytest.importorskip("abstractllm", reason="the abstractllm extra is not installed")

TESTS = Path(__file__).resolve().parent
DEMO = TESTS.parents[2] / "tests" / "demo" / "demo.py"
if not DEMO.is_file():
    pytest.skip("outside the repository", allow_module_level=True)


def show(tmp_path, broken=""):
    binary = tmp_path / "mlxd"
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS / "fake_mlxd.py"}" "$@"\n')
    binary.chmod(0o755)
    (tmp_path / "models" / MODEL).mkdir(parents=True)
    command = [sys.executable, str(DEMO), "--mlxd", str(binary), "--model", MODEL]
    return subprocess.run(
        [*command, "--model-root", str(tmp_path / "models")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "FAKE_MLXD": broken},
        check=False,
    )


def test_the_demo_shows_all_parts_in_few_lines(tmp_path):
    shown = show(tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert PARIS in shown.stdout
    assert len(shown.stdout.splitlines()) < 25
    for claim in ("1. The Rust client", "2. Meanwhile", "3. A session", "TTFT", "status 0"):
        assert claim in shown.stdout


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("die", "failed at start: DemoError: the daemon ended with status 1"),
        ("wrong", "failed at the Rust client"),
        ("cold", "failed at the session"),
        ("unclean", "failed at stop: DemoError: the daemon ended with status 3"),
    ],
)
def test_a_part_that_fails_is_named(tmp_path, broken, part):
    shown = show(tmp_path, broken)
    assert shown.returncode == 1
    assert part in shown.stderr
    if broken == "die":
        assert "| error: the model root is on fire" in shown.stderr
