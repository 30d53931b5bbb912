"""`mlxd bench` against a real daemon: its counts are right; Ctrl-C shows the results so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from daemon import Daemon, binary, wait_for
from wire import Wire


def command(daemon: Daemon, *arguments: str) -> list[str]:
    return [str(binary()), "bench", "--address", str(daemon.socket), "-m", "tiny", *arguments]


def bench(daemon: Daemon, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Runs it to its end; returns the table and the JSON."""
    file = folder / "result.json"
    whole = command(daemon, "--json", str(file), *arguments)
    done = subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_a_sweep_counts_its_requests_and_tokens(shared_daemon: Daemon, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.svg"
    arguments = ["--concurrency", "1,3", "--requests", "6", "--prompt-tokens", "5..9"]
    arguments += ["--output-tokens", "7", "--warmup", "1", "--seed", "3", "--svg", str(picture)]
    table, result = bench(shared_daemon, tmp_path, *arguments)
    assert [row["concurrency"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert (row["requests"], row["errors"], row["output_tokens"]) == (6, {}, 42)
        assert 30 <= row["input_tokens"] <= 54
        for key in ("time_to_first_token_s", "inter_token_latency_s", "queue_time_s"):
            assert 0 <= row[key]["p50"] <= row[key]["p95"] <= row[key]["p99"] <= row["wall_s"]
        rate = row["output_tokens"] / row["wall_s"]
        assert abs(row["output_tokens_per_s"] - rate) < 1e-6 * rate
    machine = result["machine"]
    assert machine["model"]["name"] == "tiny"
    assert machine["model"]["computes_in"] == "float32"
    assert machine["mlx_version"]
    assert machine["device"]
    assert result["settings"]["seed"] == 3
    assert set(result["definitions"]) >= {"percentiles", "time_to_first_token_s"}
    assert len(table.splitlines()) > 5
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_shared_prefix_is_found_in_the_cache(shared_daemon: Daemon, tmp_path: Path) -> None:
    arguments = ["--concurrency", "1", "--requests", "5", "--prompt-tokens", "100"]
    # With this seed no two prompts happen to continue the prefix alike.
    arguments += ["--output-tokens", "1", "--shared-prefix", "0.8", "--seed", "5"]
    _, result = bench(shared_daemon, tmp_path, *arguments)
    assert result["rows"][0]["cached_tokens"] == 5 * 80


def test_long_prompts_and_arrivals_are_told_apart(shared_daemon: Daemon, tmp_path: Path) -> None:
    arguments = ["--concurrency", "3", "--requests", "8", "--long-prefill", "600"]
    _, result = bench(shared_daemon, tmp_path, *arguments, "--long-every", "4")
    row = result["rows"][0]
    assert row["long"]["requests"] == 2
    assert row["input_tokens"] == 2 * 600 + 6 * 64
    _, result = bench(shared_daemon, tmp_path, "--arrival-rate", "40", "--duration", "0.5")
    row = result["rows"][0]
    assert row["arrival_rate_per_s"] == 40
    assert row["requests"] > 0


def test_refusals_are_counted_by_reason(tiny_root: Path) -> None:
    with Daemon([tiny_root], {"running_sequences_max": 1, "queue_length_max": 1}) as small:
        whole = command(small, "--concurrency", "6", "--requests", "12", "--warmup", "0")
        done = subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)
    assert "QUEUE_FULL" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_shows_what_was_measured(shared_daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["--concurrency", "2", "--requests", "100000", "--output-tokens", "4"]
    whole = command(shared_daemon, *arguments, "--json", str(file))
    before = wire.stats().finished_total
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: wire.stats().finished_total > before + 20, "requests finish")
    os.kill(process.pid, signal.SIGINT)
    table, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "(interrupted)" in table
    row = json.loads(file.read_text())["rows"][0]
    assert row["interrupted"] is True
    assert row["requests"] > 0
    wait_for(lambda: wire.stats().running_sequences == 0, "its calls are cancelled")


def test_wrong_usage_says_what_is_wrong(shared_daemon: Daemon) -> None:
    for arguments in (
        ["--prompt-tokens", "9..3"],
        ["--concurrency", "0"],
        ["--shared-prefix", "2"],
        ["--arrival-rate", "1", "--concurrency", "2"],
        ["--long-every", "3"],
        ["--prompt-tokens", "40000"],
    ):
        whole = command(shared_daemon, *arguments)
        done = subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, arguments
