"""`mlxd run`, `list` and `rm`: the first five minutes on a bare machine, with a hub on loopback."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from checkpoints import Checkpoint, build
from daemon import Daemon, binary, default_model
from loopback_hub import COMMAND_S, LoopbackHub
from terminal import Terminal, at_a_terminal

NAME = "owner/tiny-chat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a model that chats."""
    root = tmp_path_factory.mktemp("hub")
    return build(Checkpoint("tiny-chat", {"num_key_value_heads": 2}, shards=2), root, seed=3)


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    """A hub that has the model."""
    with LoopbackHub() as hub:
        hub.add_folder(NAME, model)
        yield hub


def mlxd(hub: LoopbackHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return hub.mlxd(home, *arguments, **at_a_terminal(home))


def chat(hub: LoopbackHub, home: Path, name: str, say: str) -> str:
    """Runs `mlxd run NAME` in a terminal, says one thing, leaves, and returns the transcript."""
    terminal = Terminal(
        [str(binary()), "run", name, "--max-tokens", "24"],
        hub.environment(home, **at_a_terminal(home)),
    )
    terminal.read_until("/help lists commands")
    terminal.read_until("> ")
    terminal.type(f"{say}\r")
    terminal.read_until("\n")
    terminal.read_until("> ")
    terminal.type("/stats\r")
    terminal.read_until("s in total")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0, terminal.shown
    return terminal.transcript()


def processes(home: Path) -> list[str]:
    """Returns the command lines of processes whose environment names a home folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile, or be somebody else's.
        with suppress(OSError):
            if str(home).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


def test_run_goes_from_nothing_to_a_chat_with_one_command(hub: LoopbackHub, tmp_path: Path) -> None:
    transcript = chat(hub, tmp_path, NAME, "Hello")
    print(transcript)
    assert f"{NAME}, session" in transcript
    assert "no daemon answers; one runs for this chat only" in transcript
    assert "session " in transcript.rsplit("/stats", 1)[1]
    if Path("/proc").is_dir():
        assert not processes(tmp_path), "the daemon ended with the chat"
    before = len(hub.seen)
    chat(hub, tmp_path, NAME, "Again")
    assert len(hub.seen) == before, "the second run asks the hub nothing"


def test_run_with_the_default_model(tmp_path: Path) -> None:
    folder = default_model()
    if not (folder / "config.json").exists():
        pytest.skip("no default model")
    with LoopbackHub() as hub:
        hub.add_folder("mlx-community/SmolLM2-135M-Instruct", folder)
        transcript = chat(
            hub, tmp_path, "mlx-community/SmolLM2-135M-Instruct", "What is the capital of France?"
        )
    print(transcript)
    assert "mlx-community/SmolLM2-135M-Instruct, session" in transcript


def test_run_uses_the_daemon_that_answers(hub: LoopbackHub, tmp_path: Path) -> None:
    variables = {"HF_HOME": str(tmp_path / "huggingface"), "HF_ENDPOINT": hub.endpoint}
    with Daemon([], environment=variables) as daemon:
        hub.repos[NAME].refs["v1.0"] = hub.repos[NAME].commit
        pinned = f"{NAME}@v1.0"
        arguments = ["run", pinned, "--address", str(daemon.socket), "--max-tokens", "4"]
        command = [str(binary()), *arguments]
        done = subprocess.run(
            command,
            env=hub.environment(tmp_path, **at_a_terminal(tmp_path)),
            input="Hello\n",
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, done.stderr
        assert "no daemon answers" not in done.stderr
        listed = mlxd(hub, tmp_path, "list", "--json", "--address", str(daemon.socket))
        rows = json.loads(listed.stdout)["models"]
        assert {row["name"]: row["resident"] for row in rows} == {NAME: False, pinned: True}
        refused = mlxd(hub, tmp_path, "rm", NAME, "--address", str(daemon.socket))
        assert refused.returncode == 1
        assert f"`mlxd unload {pinned}` first" in refused.stderr


def test_run_of_an_unknown_repo_says_so_and_leaves_nothing(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    done = mlxd(hub, tmp_path, "run", "owner/unknown")
    assert done.returncode == 1
    assert "the hub has no repo owner/unknown" in done.stderr
    missing = mlxd(hub, tmp_path, "run", "unknown")
    assert "no model named" in missing.stderr


def test_list_and_rm_work_without_a_daemon(hub: LoopbackHub, tmp_path: Path) -> None:
    assert "no models" in mlxd(hub, tmp_path, "list").stdout
    assert mlxd(hub, tmp_path, "pull", NAME, "--quiet").returncode == 0
    table = mlxd(hub, tmp_path, "list").stdout
    assert re.search(rf"^{NAME} .* (KiB|MiB) .*float32.* ago$", table, re.M), table
    (row,) = json.loads(mlxd(hub, tmp_path, "list", "--json").stdout)["models"]
    assert (row["name"], row["revision"]) == (NAME, hub.repos[NAME].commit)
    assert not row["resident"]
    removed = mlxd(hub, tmp_path, "rm", NAME)
    assert removed.stdout.startswith(f"removed {NAME}, ")
    assert not (tmp_path / "huggingface/hub/models--owner--tiny-chat").exists()
    assert mlxd(hub, tmp_path, "rm", NAME).returncode == 1
    for path in ("../..", "owner/..", "/etc", "owner/tiny-chat@main"):
        assert mlxd(hub, tmp_path, "rm", path).returncode == 2
