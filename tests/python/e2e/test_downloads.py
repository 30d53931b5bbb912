"""Downloads for calls: who may have which repo, who shares one, and when it stops; against a hub on
loopback."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from daemon import Daemon, free_port, token_file, wait_for
from faults import Fault, answers, listing
from loopback_hub import SIGNED, TOKEN, Handler, Held, LoopbackHub, Seen
from mlxd.v1 import inference_pb2, model_pb2
from wire import CALL_S, Wire, refused

NAME = "owner/tiny"
PROMPT = [5, 6, 7]
DENIED = ("PERMISSION_DENIED", "MODEL_NOT_ALLOWED")
UNKNOWN = ("NOT_FOUND", "MODEL_NOT_FOUND")
CALLERS = 8
SECRET = "correct-horse-battery-staple"
PHASES = model_pb2.LoadPhase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two shards."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from checkpoints import Checkpoint, build

    return build(Checkpoint("tiny", {}, shards=2), tmp_path_factory.mktemp("downloads"))


@pytest.fixture
def hub(folder: Path) -> Iterator[LoopbackHub]:
    """A hub with that model."""
    with LoopbackHub() as hub:
        hub.add_folder(NAME, folder)
        yield hub


def serving(hub: LoopbackHub, config: dict[str, Any] | None = None, **variables: str) -> Daemon:
    """Makes a daemon that uses the hub."""
    return Daemon([], config, environment={"HF_ENDPOINT": hub.endpoint, **variables})


def cached(daemon: Daemon) -> list[Path]:
    """Returns the snapshots in the daemon's cache."""
    return list((daemon.folder / "huggingface/hub").glob("models--*/snapshots/*"))


def test_the_owner_loads_a_repo_that_is_not_there(hub: LoopbackHub) -> None:
    total = sum(len(data) for name, data in hub.repos[NAME].files.items())
    with serving(hub) as daemon, daemon.wire() as wire:
        events = wire.load(NAME)
        assert events[-1].loaded.model.revision == hub.repos[NAME].commit
        steps = [event.progress for event in events[:-1]]
        phases = [step.phase for step in steps]
        order = [PHASES.LOAD_PHASE_RESOLVING, PHASES.LOAD_PHASE_DOWNLOADING]
        assert phases[:2] == order
        ends = len(phases) - phases[::-1].index(PHASES.LOAD_PHASE_DOWNLOADING)
        assert phases[ends] == PHASES.LOAD_PHASE_RESOLVING
        last = steps[ends - 1]
        assert 0 < last.done_bytes == last.total_bytes <= total
        assert wire.generate(NAME, PROMPT, max_tokens=2).usage.completion_tokens == 2
        # What is there is not asked for again.
        count = len(hub.seen)
        wire.unload(NAME)
        wire.load(NAME)
        assert len(hub.seen) == count


def test_a_request_downloads_only_what_the_owner_lists(hub: LoopbackHub, folder: Path) -> None:
    hub.add_folder("other/tiny", folder)
    with serving(hub, {"downloads_allowed": ["owner/*"]}) as daemon, daemon.wire() as wire:
        reply = wire.generate(NAME, PROMPT, max_tokens=2)
        assert len(reply.token_ids) == 2
        with refused(*DENIED) as refusal:
            wire.generate("other/tiny", PROMPT, max_tokens=2)
        assert refusal.failure.metadata == {"model": "other/tiny", "key": "downloads_allowed"}
        # Nobody asked the hub for it, and calls that never load know nothing of the hub.
        assert not hub.requests("other/tiny")
        with refused(*UNKNOWN):
            wire.models.GetModel(model_pb2.GetModelRequest(model="other/tiny"), timeout=CALL_S)
        with refused(*UNKNOWN):
            count = inference_pb2.CountTokensRequest(model="owner/other", prompt="a")
            wire.inference.CountTokens(count, timeout=CALL_S)
        with refused(*UNKNOWN):
            wire.generate("no-repo", PROMPT, max_tokens=2)
        with refused(*UNKNOWN) as refusal:
            wire.generate("owner/unknown", PROMPT, max_tokens=2)
        assert "the hub has no repo owner/unknown" in refusal.failure.message


def test_without_a_list_requests_download_nothing(hub: LoopbackHub) -> None:
    with serving(hub) as daemon, daemon.wire() as wire:
        with refused(*DENIED):
            wire.generate(NAME, PROMPT, max_tokens=1)
        with refused(*DENIED):
            wire.score(NAME, PROMPT)
        with refused(*UNKNOWN):
            wire.load(NAME, validate_only=True)
        assert not hub.seen


def test_a_token_holder_loads_and_downloads_what_the_owner_lists(
    hub: LoopbackHub, folder: Path, tmp_path: Path
) -> None:
    hub.add_folder("other/tiny", folder)
    hub.add_folder("owner/unlisted", folder)
    address = f"127.0.0.1:{free_port()}"
    config = {
        "listen": address,
        "token_file": str(token_file(tmp_path, SECRET)),
        "loads_allowed": ["owner/tiny"],
        "downloads_allowed": ["owner/*"],
    }
    with serving(hub, config) as daemon, daemon.wire(address, SECRET) as wire:
        with refused(*DENIED) as refusal:
            wire.load("other/tiny")
        assert refusal.failure.metadata["key"] == "downloads_allowed"
        assert wire.load(NAME)[-1].loaded.model.name == NAME
        with refused(*DENIED) as refusal:
            wire.load("owner/unlisted")
        assert refusal.failure.metadata["key"] == "loads_allowed"
        # The owner may, and then it is in memory for everybody.
        with daemon.wire() as owners:
            owners.load("other/tiny")
        assert wire.generate("other/tiny", PROMPT, max_tokens=1).usage.completion_tokens == 1
        with daemon.wire() as owners:
            owners.unload("other/tiny")
        with refused(*DENIED) as refusal:
            wire.generate("other/tiny", PROMPT, max_tokens=1)
        assert refusal.failure.metadata["key"] == "loads_allowed"


def test_a_folder_in_the_list_stands_for_its_models(folder: Path, tmp_path: Path) -> None:
    config = {"loads_allowed": [str(folder.parent)]}
    with Daemon([folder.parent], config) as daemon, daemon.wire() as wire:
        assert wire.generate(folder.name, PROMPT, max_tokens=1).usage.completion_tokens == 1
    config = {"loads_allowed": [str(tmp_path)]}
    with Daemon([folder.parent], config) as daemon, daemon.wire() as wire:
        with refused(*DENIED):
            wire.generate(folder.name, PROMPT, max_tokens=1)
        wire.load(folder.name)


def test_callers_share_one_download(hub: LoopbackHub) -> None:
    held = Held(hub)
    with serving(hub, {"downloads_allowed": ["*"]}) as daemon, daemon.wire() as wire:

        def call(at: int) -> str:
            if at % 2:
                return wire.load(NAME)[-1].WhichOneof("event") or ""
            return "loaded" if wire.generate(NAME, PROMPT, max_tokens=1).token_ids else ""

        with ThreadPoolExecutor(CALLERS) as pool:
            calls = [pool.submit(call, at) for at in range(CALLERS)]
            assert held.asked.wait(CALL_S)
            held.free.set()
            assert [call.result() for call in calls] == ["loaded"] * CALLERS
        info = hub.requests("/api/models/", server="hub")
        trees = [seen for seen in info if "/tree/" in seen.path]
        assert len(trees) == 1
        assert daemon.log.count("a download begins") == 1


def follow(wire: Wire) -> Any:
    """Begins a load of the repo and returns its stream, after the first event."""
    stream = wire.models.LoadModel(model_pb2.LoadModelRequest(model=NAME), timeout=CALL_S)
    next(stream)
    return stream


def test_a_second_caller_sees_the_progress_of_the_shared_load(hub: LoopbackHub) -> None:
    held = Held(hub, "model-00002")
    with serving(hub) as daemon, daemon.wire() as wire:
        first = follow(wire)
        assert held.asked.wait(CALL_S)
        second = follow(wire)
        # The first shard and the small files are there before anybody goes on.
        half = next(
            event.progress
            for event in second
            if event.progress.phase == PHASES.LOAD_PHASE_DOWNLOADING and event.progress.done_bytes
        )
        assert 0 < half.done_bytes < half.total_bytes
        held.free.set()
        for stream in (first, second):
            events = list(stream)
            assert events[-1].loaded.model.name == NAME
            phases = {event.progress.phase for event in events[:-1]}
            assert {PHASES.LOAD_PHASE_LOADING, PHASES.LOAD_PHASE_WARMING} <= phases
        assert wire.stats().loads_total == 1
        assert daemon.log.count("a download begins") == 1


def test_a_download_stops_with_the_last_who_waits_and_goes_on_later(hub: LoopbackHub) -> None:
    held = Held(hub, "model-00002")
    with serving(hub) as daemon, daemon.wire() as wire:
        first, second = follow(wire), follow(wire)
        assert held.asked.wait(CALL_S)
        # The other file is there before they leave.
        shard = hub.repos[NAME].digest("model-00001-of-00002.safetensors")
        wait_for(lambda: list(daemon.folder.glob(f"**/blobs/{shard}")), "the first shard")
        first.cancel()
        assert "the download ended" not in daemon.log
        second.cancel()
        wait_for(lambda: "the download ended" in daemon.log, "the end of the download")
        assert not cached(daemon)
        held.free.set()
        assert wire.load(NAME)[-1].loaded.model.name == NAME
        assert len(hub.requests("model-00001", server="hub")) == 1


def test_who_waits_for_a_download_is_counted_and_keeps_nobody_out(
    hub: LoopbackHub, folder: Path
) -> None:
    held = Held(hub)
    # A connection's requests share a quarter of this, besides its first 128 KiB.
    config = {
        "downloads_allowed": ["owner/*"],
        "queue_length_per_client_max": 2,
        "receive_bytes_per_connection_max": 1 << 20,
    }
    long = inference_pb2.GenerateRequest(model=NAME, prompt="a " * (150 << 10))
    known = inference_pb2.GenerateRequest(model=folder.name, prompt=long.prompt)
    daemon = Daemon([folder.parent], config, environment={"HF_ENDPOINT": hub.endpoint})
    with daemon, daemon.wire() as wire:
        call = wire.inference.Generate
        waiting = [call.future(long, timeout=CALL_S) for _ in range(2)]
        assert held.asked.wait(CALL_S)
        with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL") as refusal:
            call(long, timeout=CALL_S)
        assert refusal.failure.metadata == {"limit": "queue_length_per_client_max", "value": "2"}
        assert refusal.failure.has_retry_info
        # It is read and refused while the others wait.
        with refused("INVALID_ARGUMENT", "CONTEXT_OVERFLOW"):
            call(known, timeout=CALL_S)
        assert not any(each.done() for each in waiting)
        held.free.set()
        for each in waiting:
            with refused("INVALID_ARGUMENT", "CONTEXT_OVERFLOW"):
                each.result()


def test_the_bytes_that_wait_for_downloads_are_limited(hub: LoopbackHub) -> None:
    held = Held(hub)
    config = {"downloads_allowed": ["owner/*"], "receive_bytes_per_connection_max": 1 << 20}
    request = inference_pb2.GenerateRequest(model=NAME, prompt="a " * (400 << 10))
    with serving(hub, config) as daemon, daemon.wire() as wire:
        first = wire.inference.Generate.future(request, timeout=CALL_S)
        assert held.asked.wait(CALL_S)
        calls = [wire.inference.Generate.future(request, timeout=CALL_S) for _ in range(5)]
        wait_for(lambda: any(call.done() for call in calls), "a refusal")
        with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL") as refusal:
            next(call for call in calls if call.done()).result()
        assert refusal.failure.metadata == {
            "limit": "receive_bytes_per_connection_max",
            "value": str(1 << 20),
        }
        assert not first.done()
        held.free.set()


def test_a_deadline_ends_the_download_that_nobody_else_wants(hub: LoopbackHub) -> None:
    held = Held(hub)
    with serving(hub, {"downloads_allowed": ["*"]}) as daemon, daemon.wire() as wire:
        request = inference_pb2.GenerateRequest(model=NAME, prompt="a")
        call = wire.inference.Generate.future(request, timeout=CALL_S)
        assert held.asked.wait(CALL_S)
        call.cancel()
        wait_for(lambda: "the download ended" in daemon.log, "the end of the download")
        held.free.set()
        assert not cached(daemon)


def test_a_daemon_that_ends_does_not_wait_for_a_download(hub: LoopbackHub) -> None:
    held = Held(hub)
    with serving(hub, {"drain_s": 0}) as daemon, daemon.wire() as wire:
        stream = follow(wire)
        assert held.asked.wait(CALL_S)
        daemon.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            list(stream)
        assert daemon.exit_code() == 0
        held.free.set()


def test_a_snapshot_that_lacks_a_shard_is_completed(hub: LoopbackHub) -> None:
    with serving(hub) as daemon, daemon.wire() as wire:
        wire.load(NAME)
        wire.unload(NAME)
        (snapshot,) = cached(daemon)
        shard = snapshot / "model-00002-of-00002.safetensors"
        shard.resolve().unlink()
        shard.unlink()
        with refused("FAILED_PRECONDITION", "MODEL_INVALID"):
            wire.load(NAME, validate_only=True)
        with refused(*DENIED):
            wire.generate(NAME, PROMPT, max_tokens=1)
        assert wire.load(NAME)[-1].loaded.model.name == NAME
        assert shard.exists()


def sized(size: int) -> Fault:
    """Makes a fault: the weights are listed with another size."""

    def change(entries: list[dict[str, Any]]) -> None:
        for entry in filter(lambda entry: "lfs" in entry, entries):
            entry["lfs"]["size"] = size

    return listing(change)


@dataclass
class Row:
    """What a hub does, and what the caller of LoadModel gets."""

    fault: Fault
    code: str
    reason: str
    says: str
    retry_s: float = 0.0


def asked_to_wait_until_a_date(handler: Handler, _: Seen) -> bool:
    """A fault: come back in an hour of the hub's clock, which is years behind."""
    handler.date_time_string = lambda *_: "Sun, 06 Nov 1994 08:49:37 GMT"  # type: ignore[method-assign]
    handler.reply(429, b"", {"Retry-After": "Sun, 06 Nov 1994 09:49:37 GMT"})
    return True


FAILED = ("FAILED_PRECONDITION", "DOWNLOAD_FAILED")
HUB_DENIED = ("FAILED_PRECONDITION", "HUB_DENIED")
HUB_UNAVAILABLE = ("UNAVAILABLE", "HUB_UNAVAILABLE")
FULL = ("RESOURCE_EXHAUSTED", "DISK_FULL")

REFUSALS = {
    "busy": Row(answers(503), *HUB_UNAVAILABLE, "503 Service Unavailable", 10),
    "asked-too-often": Row(
        answers(429, Retry_After="3600"), *HUB_UNAVAILABLE, "try again in 3600 s", 3600
    ),
    "asked-to-wait-until-a-date": Row(
        asked_to_wait_until_a_date, *HUB_UNAVAILABLE, "try again in 3600 s", 3600
    ),
    "gated": Row(answers(403, X_Error_Code="GatedRepo"), *HUB_DENIED, "it is gated"),
    "token-refused": Row(answers(401, X_Error_Message="Bad token"), *HUB_DENIED, "Bad token"),
    "repo-not-shown": Row(answers(401, X_Error_Code="RepoNotFound"), *UNKNOWN, "or it is private"),
    "no-json": Row(answers(200), *FAILED, "JSON that is not what its API promises"),
    "no-such-range": Row(
        answers(416, "Signature"), *FAILED, "the hub has fewer bytes than it lists"
    ),
    "more-bytes-than-listed": Row(sized(1000), *FAILED, "bytes where it lists 1000"),
    "a-size-that-cannot-be": Row(sized(1 << 62), *FAILED, "says that it has"),
    "a-full-disk": Row(sized(1 << 48), *FULL, "the disk has"),
}


def test_no_log_has_the_token_or_a_signed_address(hub: LoopbackHub) -> None:
    # The storage refuses an address once: what failed is logged too.
    left = [1]

    def expired(handler: Handler, seen: Seen) -> bool:
        if "Signature" not in seen.path or not left[0]:
            return False
        left[0] -= 1
        handler.reply(403)
        return True

    hub.faults.append(expired)
    with serving(hub, {"log_filter": "trace"}, HF_TOKEN=TOKEN) as daemon, daemon.wire() as wire:
        wire.load(NAME)
        hub.faults[:] = [answers(403, X_Error_Code="GatedRepo", X_Error_Message="Ask first.")]
        with refused("FAILED_PRECONDITION", "HUB_DENIED"):
            wire.load("owner/gated")
        assert TOKEN in "".join(seen.authorization or "" for seen in hub.requests(server="hub"))
        assert hub.requests(SIGNED, "storage")
        # The lines of the library that connects to the hub are there.
        assert re.search(rf" (TRACE|DEBUG) .*\b{hub.endpoint.rsplit(':')[-1]}\b", daemon.log)
        assert TOKEN not in daemon.log
        assert SIGNED not in daemon.log


@pytest.mark.parametrize("row", REFUSALS.values(), ids=REFUSALS)
def test_what_a_hub_refuses_has_a_reason(hub: LoopbackHub, row: Row) -> None:
    hub.faults.append(row.fault)
    with serving(hub, HF_TOKEN=TOKEN) as daemon, daemon.wire() as wire:
        with refused(row.code, row.reason) as refusal:
            wire.load(NAME)
        failure = refusal.failure
        assert row.says in failure.message
        assert (failure.has_retry_info, failure.retry_s) == (row.retry_s > 0, row.retry_s)
        assert failure.metadata["model"] == NAME
        assert failure.has_quota_failure == (row.reason == "DISK_FULL")
        assert TOKEN not in failure.message + daemon.log
        assert not cached(daemon)
        hub.faults.clear()
        wire.load(NAME)


def test_a_full_disk_is_refused_before_the_first_byte_with_what_is_needed(
    hub: LoopbackHub,
) -> None:
    hub.faults.append(sized(1 << 48))
    with serving(hub) as daemon, daemon.wire() as wire:
        with refused(*FULL) as refusal:
            wire.load(NAME)
        metadata = refusal.failure.metadata
        # Two shards of this size are missing, and small files.
        assert int(metadata["needed_bytes"]) > 2 << 48
        assert 0 < int(metadata["available_bytes"]) < 2 << 48
        assert not hub.requests(server="storage")
        assert wire.resident() == []


def test_offline_a_repo_that_is_not_there_is_not_found(hub: LoopbackHub) -> None:
    with serving(hub, HF_HUB_OFFLINE="1") as daemon, daemon.wire() as wire:
        with refused(*UNKNOWN):
            wire.load(NAME)
        assert not hub.seen


def test_a_pattern_that_can_name_no_repo_is_an_error() -> None:
    daemon = Daemon([], {"downloads_allowed": ["mlx-community"]})
    daemon.launch()
    assert daemon.exit_code() != 0
    assert "downloads_allowed" in daemon.log
    daemon.stop()


def test_sighup_changes_the_lists(hub: LoopbackHub) -> None:
    with serving(hub, {"downloads_allowed": []}) as daemon, daemon.wire() as wire:
        with refused(*DENIED):
            wire.generate(NAME, PROMPT, max_tokens=1)
        (daemon.folder / "config.toml").write_text('downloads_allowed = ["owner/*"]\n')
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: "downloads_allowed" in daemon.log, "the new configuration")
        # The line stands in the log before the change is made.
        wait_for(lambda: served(wire), "a request that downloads")


def served(wire: Wire) -> bool:
    """Tells whether a request for the repo is answered."""
    try:
        return bool(wire.generate(NAME, PROMPT, max_tokens=1).token_ids)
    except grpc.RpcError:
        return False
