"""`mlxd convert` with sources and destinations that cannot be: what was there stays as it was."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

from checkpoints import Checkpoint, build
from conversions import convert, peak_bytes, run, same
from daemon import binary, wait_for
from loopback_hub import LoopbackHub

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder alone in its own."""
    return build(Checkpoint("source", {"num_hidden_layers": 4}), tmp_path / "work")


def refused(source: Path, out: Path, *options: str) -> str:
    """Converts, which must fail and leave no trace; returns the message."""
    before = listing(source.parent)
    done = run(source, out, *options)
    assert done.returncode == FAILED, done.stderr
    assert listing(source.parent) == before
    return done.stderr


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Lists every file below a folder, hidden ones too, with size and time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    folders = sorted(str(path) for path in folder.rglob("*") if path.is_dir())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [*stats, *((folder, 0, 0) for folder in folders)]


def test_the_source_is_never_the_destination(source: Path) -> None:
    link = source.parent / "link"
    link.symlink_to(source)
    for out in (source, link, source / "inner", source.parent):
        for options in ((), ("--overwrite",)):
            assert "is the source, or in it, or around it" in refused(source, out, *options)


def test_a_full_disk_leaves_everything_as_it_was(source: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out = convert(source, source.parent / "out")
    before = listing(source.parent)
    for options in ((), ("--overwrite",)):
        done = run(source, out, *options, preexec_fn=limit)
        assert done.returncode == FAILED
        assert listing(source.parent) == before
    assert "File too large" in done.stderr


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, signalled: int) -> None:
    config = {"num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 2048}
    source = build(Checkpoint("source", config), tmp_path / "work")
    out = source.parent / "out"
    command = [str(binary()), "convert", str(source), str(out), "--quantize", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        wait_for(lambda: list(source.parent.glob(".out.partial-*/model.safetensors")), "a file")
        process.send_signal(signalled)
        process.wait(timeout=60)
    assert process.returncode == INTERRUPTED
    assert os.listdir(source.parent) == ["source"]


def test_damaged_weights_are_refused_by_name(source: Path) -> None:
    file, out = source / "model.safetensors", source.parent / "out"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")

    def write(changed: dict[str, object]) -> None:
        text = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    file.write_bytes(struct.pack("<Q", 2 << 30) + whole[8:])
    assert "says its header has 2147483648 bytes" in refused(source, out)
    write({**header, "more.weight": header[names[0]]})
    assert "overlaps another" in refused(source, out)
    renamed = header.pop(names[0])
    write({**header, "more.weight": renamed})
    assert f"{names[0]} is missing" in refused(source, out)
    file.write_bytes(whole[:-1000])
    assert "cut short" in refused(source, out)


def test_a_config_of_100_megabytes_is_refused(source: Path) -> None:
    (source / "config.json").write_bytes(b" " * (100 << 20))
    assert "is larger than" in refused(source, source.parent / "out")


def test_what_is_not_a_model_is_told_so(source: Path) -> None:
    out = source.parent / "out"
    empty = source.parent / "empty"
    empty.mkdir()
    assert "config.json: is missing" in refused(empty, out)
    message = refused(source.parent / "nothing", out)
    assert "cannot name a model" in message or "no model named" in message
    (source / "config.json").write_text(json.dumps({"model_type": "cobra", "vocab_size": 8}))
    assert "cobra" in refused(source, out)


def test_a_repo_of_the_cache_is_converted_by_its_name(source: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add_folder("owner/name", source)
        out, environment = tmp_path / "out", hub.environment(tmp_path)
        done = run("owner/name", out, env=environment)
        assert done.returncode == FAILED
        assert 'no model named "owner/name"' in done.stderr
        assert "`mlxd pull owner/name` downloads it" in done.stderr
        assert not hub.seen, "a conversion downloads nothing"
        assert not out.exists()
        assert hub.mlxd(tmp_path, "pull", "owner/name").returncode == 0
        before = len(hub.seen)
        for options in ((), ("--quantize", "4", "--group-size", "32")):
            done = run("owner/name", out, *options, "--overwrite", env=environment)
            assert done.returncode == 0, done.stderr
            same(out, convert(source, tmp_path / "expected", *options, "--overwrite"))
        assert len(hub.seen) == before


def test_options_that_contradict_each_other_are_usage_errors(source: Path) -> None:
    for options, why in [
        (("--quantize", "7"), "2, 3, 4, 5, 6 or 8"),
        (("--quantize", "4", "--group-size", "48"), "32, 64 or 128"),
        (("--mode", "mxfp4", "--group-size", "64"), "groups of 32"),
        (("--recipe", "mixed_2_6", "--quantize", "4"), "cannot be used with"),
        (("--group-size", "64"), "--group-size needs"),
    ]:
        done = run(source, source.parent / "out", *options)
        assert done.returncode == USAGE, done.stderr
        assert why in done.stderr
    assert os.listdir(source.parent) == ["source"]


def test_an_existing_folder_is_replaced_only_when_asked(source: Path) -> None:
    out = convert(source, source.parent / "out", "--quantize", "4")
    assert "exists and has files in it" in refused(source, out)
    convert(source, out, "--overwrite", "--dtype", "float16")
    assert "quantization" not in json.loads((out / "config.json").read_text())
    shutil.copy(source / "tokenizer.json", source.parent / "note.json")
    assert sorted(os.listdir(source.parent)) == ["note.json", "out", "source"]


def test_a_conversion_holds_about_one_tensor_at_a_time(tmp_path: Path) -> None:
    mib = 1 << 20
    config = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    source = build(Checkpoint("source", config, shards=3), tmp_path)
    largest = 4 * config["hidden_size"] * config["intermediate_size"]
    files = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert files > 12 * largest
    tiny = build(Checkpoint("tiny"), tmp_path)
    for name, options in {"cast": ("--dtype", "bfloat16"), "packed": ("--quantize", "4")}.items():
        without = peak_bytes(tiny, tmp_path / f"tiny-{name}", *options)
        peak = peak_bytes(source, tmp_path / name, *options)
        print(f"{name}: {peak / mib:.0f} MiB, {without / mib:.0f} for a tiny model")
        assert peak <= without + 2 * largest + 16 * mib


def test_files_that_cannot_be_copied_are_told_before_the_weights_are_converted(
    source: Path,
) -> None:
    # Of two faults the first that is found is told.
    file, out = source / "model.safetensors", source.parent / "out"
    file.write_bytes(file.read_bytes().replace(b"layers.3.mlp.up_proj", b"layers.3.mlp.up_prox", 1))
    assert "up_pro" in refused(source, out)
    (source / "notes.json").symlink_to("nowhere")
    assert "notes.json: is a link that leads nowhere" in refused(source, out)


def test_folders_beside_the_files_are_left_out(source: Path) -> None:
    (source / "LICENSES").mkdir()
    (source / "LICENSES/MIT.txt").write_text("free")
    out = convert(source, source.parent / "out")
    assert not (out / "LICENSES").exists()
