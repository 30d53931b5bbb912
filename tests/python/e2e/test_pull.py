"""`mlxd pull` against a hub on loopback: what it fetches, continues after an interruption, and
refuses."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from daemon import binary, wait_for
from faults import answers, listing
from loopback_hub import SIGNED, TOKEN, Handler, LoopbackHub, Seen
from pulls import FETCHED, INDEX, MIB, NAME, SMALL, cache, contents, noise, pull, pulled, sharded


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one small repo."""
    with LoopbackHub() as hub:
        hub.add(NAME, {**SMALL, "model.safetensors": noise(1, 300_000)})
        yield hub


def refused(hub: LoopbackHub, home: Path, *arguments: str, **more: str) -> str:
    """Runs `mlxd pull`, which fails and shows nothing half-done; returns what it says."""
    done = pull(hub, home, *arguments, **more)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error:") == 1
    assert TOKEN not in done.stderr
    assert SIGNED not in done.stderr
    assert not list(home.glob("huggingface/hub/models--*/snapshots/*"))
    return done.stderr.split("error: ", 1)[1].strip()


def test_only_what_a_loader_reads_is_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = pulled(hub, tmp_path)
    repo = hub.repos[NAME]
    assert snapshot == cache(tmp_path) / "snapshots" / repo.commit
    assert contents(snapshot) == {name: repo.files[name] for name in FETCHED}
    assert (cache(tmp_path) / "refs/main").read_text() == repo.commit
    blobs = {blob.name for blob in (cache(tmp_path) / "blobs").iterdir()}
    assert blobs == {repo.digest(name) for name in FETCHED}
    link = os.readlink(snapshot / "model.safetensors")
    assert link == f"../../blobs/{repo.digest('model.safetensors')}"


def test_the_second_pull_fetches_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    first = pulled(hub, tmp_path)
    before = len(hub.requests("/resolve/"))
    assert pulled(hub, tmp_path) == first
    assert len(hub.requests("/resolve/")) == before


def test_two_processes_fetch_a_repo_once(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add(NAME, sharded(2 * MIB))
    command = [str(binary()), "pull", NAME]
    environment = hub.environment(tmp_path)
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    digests = [seen.path.split("?")[0] for seen in hub.requests(server="storage")]
    assert len(digests) == len(set(digests)) == 4
    small = [seen.path for seen in hub.requests("resolve-cache")]
    assert len(small) == len(set(small)) == 2


def test_a_download_interrupted_at_random_moments_ends_with_the_same_bytes(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add(NAME, sharded(12 * MIB))
    repo, rng = hub.repos[NAME], random.Random(12)
    blobs = cache(tmp_path) / "blobs"

    def finished() -> set[str]:
        return {b.name for b in blobs.glob("*") if "." not in b.name} if blobs.exists() else set()

    interrupted, before = 0, finished()
    for moment in range(20):
        start = len(hub.seen)
        command = [str(binary()), "pull", NAME, "--quiet"]
        process = subprocess.Popen(command, env=hub.environment(tmp_path), stderr=subprocess.PIPE)
        how = signal.SIGKILL if moment % 2 else signal.SIGINT
        # Connections of the process before may still be written to.
        wait_for(lambda start=start: len(hub.seen) > start, "a request")
        at = hub.served_bytes + rng.randrange(64 << 10, 3 * MIB)
        hub.alarm = (at, lambda process=process, how=how: process.send_signal(how))
        code = process.wait(120)
        hub.alarm = None
        interrupted += code != 0
        assert code in (0, 130, -signal.SIGKILL)
        asked = {seen.path.split("?")[0].rsplit("/")[-1] for seen in hub.seen[start:]}
        assert not asked & before, "a finished file is not fetched again"
        before = finished()
    assert interrupted >= 15
    snapshot = pulled(hub, tmp_path)
    assert contents(snapshot) == repo.files
    assert {blob.name for blob in blobs.iterdir()} == {repo.digest(name) for name in repo.files}


def test_large_files_come_in_parts_over_several_connections(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": noise(3, 10 * MIB + 17)})
    assert contents(pulled(hub, tmp_path)) == hub.repos[NAME].files
    ranges = {seen.range for seen in hub.requests(server="storage")}
    step = 4 * MIB
    ends = [step, 2 * step, 10 * MIB + 17]
    assert ranges == {f"bytes={start * step}-{end - 1}" for start, end in enumerate(ends)}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_hub_that_closes_after_each_megabyte(
    hub: LoopbackHub, tmp_path: Path, ranges: bool
) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": noise(3, 6 * MIB)})
    hub.close_after_bytes, hub.ranges = MIB, ranges
    if ranges:
        assert contents(pulled(hub, tmp_path)) == hub.repos[NAME].files
    else:
        assert "ends early, and cannot be continued" in refused(hub, tmp_path)


def test_a_hub_without_ranges_is_read_from_the_start(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": noise(3, 9 * MIB)})
    hub.ranges = False
    assert contents(pulled(hub, tmp_path)) == hub.repos[NAME].files


def test_the_token_is_sent_to_the_hub_only(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/token").write_text(TOKEN)
    done = pull(hub, tmp_path)
    assert done.returncode == 0
    assert TOKEN not in done.stdout + done.stderr
    at_hub = {seen.authorization for seen in hub.requests(server="hub")}
    assert at_hub == {f"Bearer {TOKEN}"}
    assert hub.requests(server="storage")
    assert {seen.authorization for seen in hub.requests(server="storage")} == {None}


def test_a_redirect_of_the_api_elsewhere_does_not_see_the_token(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    def elsewhere(handler: Handler, seen: Seen) -> bool:
        if seen.server == "hub":
            handler.reply(302, headers={"Location": f"{hub.storage}/stolen"})
        return seen.server == "hub"

    hub.faults.append(elsewhere)
    assert "the hub has no repo owner/tiny" in refused(hub, tmp_path, HF_TOKEN=TOKEN)
    stolen = hub.requests("/stolen", "storage")
    assert stolen
    assert all(seen.authorization is None for seen in stolen)


def test_revisions_are_pinned_to_their_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.repos[NAME].commit
    pulled(hub, tmp_path)
    repo = hub.add(NAME, {**SMALL, "model.safetensors": noise(2, 1000)}, **{"v2.0": ""})
    repo.refs["v2.0"] = repo.commit
    snapshot = pulled(hub, tmp_path, f"{NAME}@v2.0")
    assert snapshot.name == repo.commit != old
    assert (cache(tmp_path) / "refs/v2.0").read_text() == repo.commit
    assert (cache(tmp_path) / "refs/main").read_text() == old
    assert pulled(hub, tmp_path, f"{NAME}@{repo.commit}") == snapshot
    assert not hub.requests(f"/revision/{repo.commit}")
    assert "the hub has no repo owner/tiny@v3" in pull(hub, tmp_path, f"{NAME}@v3").stderr


def test_the_list_of_files_may_have_pages(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.page_entries = 3
    assert set(contents(pulled(hub, tmp_path))) == FETCHED
    assert len(hub.requests("/tree/")) == 4


def test_a_list_that_goes_on_at_another_server_is_not_taken_for_whole(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    def mirror(handler: Handler, seen: Seen) -> bool:
        if "/tree/" in seen.path:
            repo = hub.repos[NAME]
            entries = [repo.entry(name) for name in ("config.json", "model.safetensors")]
            link = f'<{hub.storage}{seen.path}&cursor=2>; rel="next"'
            handler.reply(200, entries, {"Link": link})
        return "/tree/" in seen.path

    hub.faults.append(mirror)
    assert "continues it at the address of another server" in refused(hub, tmp_path)
    assert not hub.requests("cursor", "storage")


def test_a_list_of_folders_without_end_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    def endless(handler: Handler, seen: Seen) -> bool:
        if "/tree/" in seen.path:
            folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "x"}
            link = f'<{seen.path.split("&")[0]}&cursor={len(hub.seen)}>; rel="next"'
            handler.reply(200, [folder], {"Link": link})
        return "/tree/" in seen.path

    hub.faults.append(endless)
    assert "lists more than 200 pages of files" in refused(hub, tmp_path)


def test_a_repo_that_lacks_a_file_of_its_index_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    files = sharded(1000)
    del files["model-00003-of-00004.safetensors"]
    hub.add(NAME, files)
    said = refused(hub, tmp_path)
    assert "has no model-00003-of-00004.safetensors, which its index names among 4 files" in said
    assert not hub.requests("/resolve/", "storage")


def test_what_a_hub_refuses_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    for fault, said in [
        (
            answers(403, "/resolve/", X_Error_Code="GatedRepo", X_Error_Message="Ask."),
            "it is gated",
        ),
        (answers(401, "/api/", X_Error_Code="RepoNotFound"), "or it is private"),
        (answers(401, X_Error_Message="Invalid credentials"), "refuses owner/tiny: Invalid cred"),
        (answers(404, "/api/"), "the hub has no repo owner/tiny"),
        (answers(404, "/resolve/"), "the hub has no file "),
        (answers(416, "resolve-cache"), "has fewer bytes than it lists"),
        (answers(200, "/revision/", b"<!DOCTYPE html><p>Log in"), "a web page instead of JSON"),
        (answers(200, "/tree/", b'{"error": 1}'), "JSON that is not what its API promises"),
        (answers(200, "/revision/", b'{"sha": "../../x"}'), "names no commit"),
        (answers(200, "/tree/", b"[" + b" " * (5 << 20)), "answers with more than 4194304 bytes"),
        (answers(200, "resolve-cache", b"<html>"), "bytes where it lists"),
        (
            answers(302, "/api/", Location="file:///etc/passwd"),
            "to what is not an address",
        ),
        (answers(302, "/api/", Location="/api/x"), "redirects without end"),
        (
            answers(429, "/api/", Retry_After="3600"),
            "the hub is unavailable: 429 Too Many Requests; try again in 3600 s",
        ),
    ]:
        hub.faults[:] = [fault]
        assert said in refused(hub, tmp_path), said


def weights(entries: list[dict[str, object]]) -> dict[str, object]:
    """Returns the weights' entry of a list."""
    (found,) = (entry for entry in entries if entry["path"] == "model.safetensors")
    return found


def test_a_hub_that_lies_is_found_out(hub: LoopbackHub, tmp_path: Path) -> None:
    digest = hub.repos[NAME].digest("model.safetensors")
    lfs = {"oid": digest, "size": 300_000, "pointerSize": 1}
    for change, said in [
        (lambda e: weights(e).update(lfs={**lfs, "size": 299_999}), "bytes where it lists 299999"),
        (lambda e: weights(e).update(lfs={**lfs, "size": 300_001}), "bytes where it lists 300001"),
        (lambda e: weights(e).update(lfs={**lfs, "size": 1 << 62}), "says that it has"),
        (lambda e: weights(e).update(lfs={**lfs, "size": 1 << 50}), "says that it has"),
        (
            lambda e: weights(e).update(lfs={**lfs, "size": 1 << 49}),
            "bytes, of which 67108864 stay free; the disk has",
        ),
        (lambda e: weights(e).update(path="../../../x.safetensors"), "leads elsewhere"),
        (lambda e: weights(e).update(lfs={**lfs, "oid": "../" * 21 + "x"}), "lists no hash of it"),
        (lambda e: weights(e).update(lfs=None, oid="1" * 40), "hash is not the one that it lists"),
    ]:
        before = len(hub.requests(server="storage"))
        hub.faults[:] = [listing(change)]
        assert said in refused(hub, tmp_path), said
        asked = len(hub.requests(server="storage")) - before
        # What can be told from the list is told before the first byte.
        assert (asked > 0) == (said.startswith(("bytes where", "hash"))), said
    assert not list(tmp_path.rglob("x.safetensors"))


def test_bytes_that_were_changed_are_refused_and_fetched_again(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    digest = hub.repos[NAME].digest("model.safetensors")
    hub.faults.append(answers(200, digest, bytes(300_000), times=1))
    assert "hash is not the one that it lists" in refused(hub, tmp_path)
    assert contents(pulled(hub, tmp_path)) == {n: hub.repos[NAME].files[n] for n in FETCHED}


def test_a_busy_hub_is_asked_again_when_it_says(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults += [
        answers(429, "/revision/", times=2, Retry_After="0"),
        answers(503, "/tree/", times=1, Retry_After="0"),
        answers(503, "resolve-cache", times=2, Retry_After="0"),
        answers(403, "Signature", times=1),
    ]
    assert set(contents(pulled(hub, tmp_path))) == FETCHED


def test_a_repo_without_safetensors_is_refused_before_anything_is_downloaded(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    for more in ({}, {INDEX: b"{}"}):
        hub.add("owner/gguf", {"config.json": b"{}", "model.Q4.gguf": b"GGUF", **more})
        said = refused(hub, tmp_path, "owner/gguf")
        assert "model.Q4.gguf is in a format that is not loaded" in said
        assert not hub.requests("/resolve/")
        assert not cache(tmp_path, "owner/gguf").exists()


def test_offline_nothing_is_asked(hub: LoopbackHub, tmp_path: Path) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        said = refused(hub, tmp_path, **{variable: "1"})
        assert said == f"offline mode is set, and {NAME} is not whole in the Hugging Face cache"
    assert not hub.seen
    snapshot = pulled(hub, tmp_path)
    before = len(hub.seen)
    assert pulled(hub, tmp_path, HF_HUB_OFFLINE="1") == snapshot
    assert len(hub.seen) == before


def test_offline_a_part_of_a_model_is_not_taken_for_the_model(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add(NAME, sharded(1000))
    snapshot = pulled(hub, tmp_path)
    (snapshot / "model-00003-of-00004.safetensors").unlink()
    done = pull(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "is not whole in the Hugging Face cache" in done.stderr
    assert pulled(hub, tmp_path) == snapshot
    assert pulled(hub, tmp_path, HF_HUB_OFFLINE="1") == snapshot


def test_a_name_that_cannot_be_a_repos_is_a_usage_error(hub: LoopbackHub, tmp_path: Path) -> None:
    for name in ("../x", "a/b/c", "a/b@../x", "http://x", "a--b"):
        done = pull(hub, tmp_path, name)
        assert done.returncode == 2, done.stderr
        assert "cannot name a repo" in done.stderr
    assert not hub.seen


def test_without_a_terminal_each_file_is_a_line(hub: LoopbackHub, tmp_path: Path) -> None:
    lines = pull(hub, tmp_path).stderr.splitlines()
    assert lines[0] == f"downloading {NAME}"
    assert {line.split(":")[0] for line in lines[1:-1]} == FETCHED
    assert re.fullmatch(r"4 files, 293 KiB; 293 KiB downloaded", lines[-1])
    assert "\x1b" not in "".join(lines)
    assert pull(hub, tmp_path, NAME, "--quiet").stderr == ""


def test_a_hub_that_is_not_there_is_said_at_once(hub: LoopbackHub, tmp_path: Path) -> None:
    gone: Mapping[str, str] = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub is unavailable" in refused(hub, tmp_path, **gone)
