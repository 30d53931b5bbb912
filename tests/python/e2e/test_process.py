"""The process: one daemon per socket, an orderly end, who may connect, what is logged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from daemon import Daemon, free_port, token_file, wait_for
from mlxd.v1 import inference_pb2 as inference
from mlxd.v1 import inference_pb2_grpc as inference_grpc
from mlxd.v1 import server_pb2 as server
from raw_frames import HalfSent, open_connection
from wire import CALL_S, Wire, failure, refused, request

COUNT = "/mlxd.v1.InferenceService/CountTokens"
SERVICES = [
    "",
    "mlxd.v1.InferenceService",
    "mlxd.v1.ModelService",
    "mlxd.v1.SessionService",
    "mlxd.v1.ServerService",
]


def test_sigterm_drains_and_exits_0(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root], {"drain_s": 600}, models=["tiny"]).start()
    try:
        with daemon.wire() as wire:
            running = wire.stream("tiny", [5, 6, 7], max_tokens=1500)
            ids: list[int] = []
            while not ids:
                ids += next(running).delta.token_ids
            daemon.signal(signal.SIGTERM)
            wait_for(lambda: "drain" in daemon.log.lower(), "the drain is logged")
            # A new call is refused: with a reason on this connection, or because it is closed.
            with pytest.raises(grpc.RpcError) as raised:
                wire.inference.Generate(request("tiny", [5], max_tokens=1), timeout=CALL_S)
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
            for event in running:
                ids += event.delta.token_ids
            assert len(ids) == 1500, "the running stream ends as it would have"
        assert daemon.exit_code() == 0
        assert not daemon.socket.exists()
    finally:
        daemon.stop()


def test_sigterm_ends_an_idle_daemon_without_waiting_for_the_drain(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root], {"drain_s": 600}).start()
    try:
        daemon.signal(signal.SIGTERM)
        assert daemon.exit_code() == 0
    finally:
        daemon.stop()


def test_a_killed_daemons_socket_is_taken_over(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root]).start()
    try:
        daemon.signal(signal.SIGKILL)
        daemon.exit_code()
        assert daemon.socket.exists()
        daemon.start()
    finally:
        daemon.stop()


def test_a_live_daemons_socket_is_not_taken(tiny_root: Path) -> None:
    with Daemon([tiny_root]) as daemon:
        second = Daemon([tiny_root], folder=daemon.folder)
        second.launch()
        assert second.exit_code() not in (0, None)
        assert str(daemon.socket) in second.log
        assert daemon.healthy()


def test_a_file_that_is_not_a_socket_is_not_removed(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root])
    try:
        daemon.socket.write_text("mine")
        daemon.launch()
        assert daemon.exit_code() != 0
        assert daemon.socket.read_text() == "mine"
    finally:
        daemon.stop()


def test_only_the_owner_may_open_the_socket(shared_daemon: Daemon) -> None:
    assert stat.S_IMODE(shared_daemon.socket.stat().st_mode) == 0o600


def test_health_has_an_entry_for_every_service(shared_daemon: Daemon) -> None:
    for service in SERVICES:
        assert shared_daemon.healthy(service), service
    with shared_daemon.wire() as wire, pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(wire.channel).Check(
            health_pb2.HealthCheckRequest(service="nothing"), timeout=CALL_S
        )
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_request_ids_come_back_and_are_logged(shared_daemon: Daemon) -> None:
    with shared_daemon.wire() as wire:
        mine = f"test-{time.monotonic_ns()}"
        reply, call = wire.inference.Generate.with_call(
            request("tiny", [5], max_tokens=1), metadata=[("x-request-id", mine)], timeout=CALL_S
        )
        assert reply.request_id == mine
        assert dict(call.initial_metadata())["x-request-id"] == mine
        wait_for(lambda: mine in shared_daemon.log, "it is logged")
        chosen = wire.generate("tiny", [5], max_tokens=1).request_id
        assert chosen
        wait_for(lambda: chosen in shared_daemon.log, "the daemon's own is logged")


def test_a_failed_call_has_a_request_id_in_the_log(shared_daemon: Daemon) -> None:
    with shared_daemon.wire() as wire:
        mine = f"fails-{time.monotonic_ns()}"
        with pytest.raises(grpc.RpcError):
            wire.inference.Generate(
                request("nothing", [5]), metadata=[("x-request-id", mine)], timeout=CALL_S
            )
        wait_for(lambda: mine in shared_daemon.log, "it is logged")


@pytest.mark.parametrize(
    "fault", ["the disk is full", "the reader left", "the reader does not read"]
)
def test_a_log_that_cannot_be_written_harms_no_call(tiny_root: Path, fault: str) -> None:
    reader, output = os.pipe()
    if fault == "the disk is full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        os.close(output)
        output = os.open("/dev/full", os.O_WRONLY)
    if fault != "the reader does not read":
        os.close(reader)
    daemon = Daemon([tiny_root], {"log_filter": "trace"})
    daemon.output = output
    try:
        daemon.start()
        os.close(output)
        with daemon.wire() as wire:
            # At trace each call logs kilobytes, more in all than a pipe holds.
            for _ in range(20):
                assert len(wire.generate("tiny", [5, 6], max_tokens=4).token_ids) == 4
        daemon.signal(signal.SIGTERM)
        assert daemon.exit_code() == 0
    finally:
        daemon.stop()
        if fault == "the reader does not read":
            os.close(reader)


@pytest.mark.parametrize("scheme", ["unix://", "unix:"])
def test_a_channel_without_options_is_served_on_the_socket(
    shared_daemon: Daemon, scheme: str
) -> None:
    """gRPC's C core sends the socket's path as authority."""
    with grpc.insecure_channel(f"{scheme}{shared_daemon.socket}") as channel:
        stub = inference_grpc.InferenceServiceStub(channel)
        for _ in range(3):
            reply = stub.Generate(request("tiny", [5, 6], max_tokens=3), timeout=CALL_S)
            assert len(reply.token_ids) == 3
        events = list(stub.StreamGenerate(request("tiny", [5, 6], max_tokens=3), timeout=CALL_S))
        assert events[-1].HasField("finished")


def test_invented_names_do_not_shut_another_connection_out(tiny_root: Path) -> None:
    config = {
        "running_sequences_max": 1,
        "queue_length_max": 8,
        "queue_length_per_client_max": 4,
    }
    with (
        Daemon([tiny_root], config, models=["tiny"]) as daemon,
        daemon.wire() as first,
        daemon.wire() as second,
        daemon.wire() as honest,
    ):
        running = honest.stream("tiny", [5, 6], max_tokens=20000)
        next(running)
        flood = [
            wire.inference.Generate.future(
                request("tiny", [5, 6], max_tokens=2),
                metadata=[("x-mlxd-client", f"name-{number}")],
                timeout=CALL_S,
            )
            for wire in (first, second)
            for number in range(8)
        ]

        def limits() -> list[str]:
            ended = [call.exception() for call in flood if call.done()]
            return [failure(error).metadata["limit"] for error in ended]

        wait_for(lambda: len(limits()) == 8, "each connection has its share of the queue")
        assert set(limits()) == {"queue_length_per_client_max"}
        call = honest.inference.Generate.future(request("tiny", [7], max_tokens=2), timeout=CALL_S)
        wait_for(lambda: "queue_length_max" in limits(), "one makes room")
        running.cancel()
        assert len(call.result().token_ids) == 2
        assert sum(call.exception() is None for call in flood) == 7


def test_a_hangup_is_no_end(tiny_root: Path) -> None:
    with Daemon([tiny_root]) as daemon:
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: "SIGHUP" in daemon.log, "it is logged")
        assert daemon.healthy()


def test_the_soft_limit_of_open_files_is_raised(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root])
    daemon.command = ["sh", "-c", 'ulimit -S -n 100; exec "$@"', "sh", *daemon.command]
    try:
        daemon.start()
        assert daemon.process is not None
        limits = Path(f"/proc/{daemon.process.pid}/limits")
        if not limits.exists():
            pytest.skip("no /proc")
        soft, hard = limits.read_text().split("Max open files")[1].split()[:2]
        assert soft == hard
    finally:
        daemon.stop()


def test_too_many_open_files_are_named_and_not_a_missing_model(tiny_root: Path) -> None:
    daemon = Daemon([tiny_root], models=["tiny"])
    daemon.command = ["sh", "-c", 'ulimit -n 60; exec "$@"', "sh", *daemon.command]
    silent = []
    try:
        daemon.start()
        assert "ulimit" in daemon.log, "the daemon says that the limit may be reached"
        with daemon.wire() as wire:
            assert wire.generate("tiny", [5], max_tokens=1).token_ids
            for _ in range(60):
                silent.append(socket.socket(socket.AF_UNIX))
                silent[-1].connect(str(daemon.socket))
            wait_for(lambda: "no connection can be accepted" in daemon.log, "the files are used up")
            with refused("RESOURCE_EXHAUSTED", "QUEUE_FULL") as refusal:
                wire.generate("other", [5], max_tokens=1)
            assert "open files" in refusal.failure.metadata["limit"]
            assert refusal.failure.has_retry_info
            for end in silent:
                end.close()
            wait_for(lambda: served(wire, "other"), "it goes on when files are free")
    finally:
        daemon.stop()


def test_half_sent_messages_take_no_more_memory_than_their_connection_may(
    tiny_root: Path,
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    calls, announced, grown_max = 48, 15_000_000, 100_000_000
    with Daemon([tiny_root], {"receive_s": 600}, models=["tiny"]) as daemon, daemon.wire() as wire:
        wire.generate("tiny", [5], max_tokens=1)
        before = daemon.resident_bytes(peak=True)
        with open_connection(daemon.target) as connection:
            half = HalfSent(connection, COUNT, calls, announced)
            half.send()
            assert half.sent > announced, "one is read, and the others have begun"
            grown = daemon.resident_bytes(peak=True) - before
            assert grown < grown_max, f"{half.sent >> 20} MiB sent, {grown >> 20} MiB taken"
            # Others are served meanwhile, and have room for messages of their own.
            text = inference.CountTokensRequest(model="tiny", prompt="word " * 100_000)
            assert wire.inference.CountTokens(text, timeout=CALL_S).token_count


def larger(folder: Path, rows: int) -> Path:
    """Gives a model's embedding this number of rows, of zeros that take no room on the disk."""
    file, name = folder / "model.safetensors", "model.embed_tokens.weight"
    stored = file.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    tensors, data = json.loads(stored[8 : 8 + length]), b""
    embedding = tensors.pop(name)
    tensors.pop("__metadata__", None)
    for tensor in tensors.values():
        start, end = tensor["data_offsets"]
        tensor["data_offsets"] = [len(data), len(data) + end - start]
        data += stored[8 + length + start : 8 + length + end]
    columns = embedding["shape"][1]
    end = len(data) + 4 * rows * columns
    tensors[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [len(data), end]}
    header = json.dumps(tensors).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    os.truncate(file, 8 + len(header) + end)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))
    return folder


def test_weights_that_the_system_would_not_give_are_refused_and_harm_nobody(
    tiny_root: Path, tmp_path: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("the system does not hold to ulimit -v")
    shutil.copytree(tiny_root / "tiny", tmp_path / "large")
    limit_bytes = 4 << 30
    larger(tmp_path / "large", rows=1 << 24)
    # Within the budget of one who does not know of the limit.
    config = {"memory_budget_bytes": 4 * limit_bytes}
    daemon = Daemon([tiny_root, tmp_path], config, models=["tiny"])
    limit = f'ulimit -v {limit_bytes >> 10}; exec "$@"'
    daemon.command = ["sh", "-c", limit, "sh", *daemon.command]
    try:
        daemon.start()
        with daemon.wire() as wire:
            expected = wire.generate("tiny", [5, 6], max_tokens=4).token_ids
            for _ in range(2):
                with refused("RESOURCE_EXHAUSTED", "MEMORY_BUDGET") as refusal:
                    wire.load("large")
                numbers = refusal.failure.metadata
                needed, available = int(numbers["needed_bytes"]), int(numbers["available_bytes"])
                assert available < limit_bytes < needed
            assert wire.generate("tiny", [5, 6], max_tokens=4).token_ids == expected
            assert wire.generate("other", [5, 6], max_tokens=4).token_ids
        assert daemon.healthy()
    finally:
        daemon.stop()


def pool_threads(daemon: Daemon) -> int:
    """Returns the number of threads that share the daemon's products, its own included."""
    assert daemon.process is not None
    names = Path(f"/proc/{daemon.process.pid}/task").glob("*/comm")
    return 1 + [name.read_text().strip() for name in names].count("mlxd-blas")


# Where control groups are, a group of a quota of one processor, as both versions of them say it.
ONE_PROCESSOR = """
set -e
groups=$(cut -d: -f3 /proc/self/cgroup)
mount -t tmpfs none /sys/fs/cgroup
for group in $groups; do
  mkdir -p "/sys/fs/cgroup/$group" "/sys/fs/cgroup/cpu/$group"
  touch "/sys/fs/cgroup/$group/cgroup.controllers" "/sys/fs/cgroup/cpu/$group/cgroup.procs"
  echo "100000 100000" > "/sys/fs/cgroup/$group/cpu.max"
  echo 100000 > "/sys/fs/cgroup/cpu/$group/cpu.cfs_quota_us"
  echo 100000 > "/sys/fs/cgroup/cpu/$group/cpu.cfs_period_us"
done
exec "$@"
"""
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.mark.parametrize("by", ["nothing", "affinity", "quota"])
def test_products_have_as_many_threads_as_the_process_has_processors(
    tiny_root: Path, by: str
) -> None:
    if not Path("/proc/self/task").exists() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("no /proc, or a single processor")
    limit = {
        "nothing": [],
        "affinity": ["taskset", "-c", str(min(os.sched_getaffinity(0)))],
        "quota": [*NAMESPACE, "sh", "-c", ONE_PROCESSOR, "sh"],
    }[by]
    if limit and (not shutil.which(limit[0]) or subprocess.run([*limit, "true"]).returncode):
        pytest.skip(f"no {limit[0]} here")
    daemon = Daemon([tiny_root], models=["tiny"])
    daemon.command = [*limit, *daemon.command]
    daemon.environment.pop("OPENBLAS_NUM_THREADS", None)
    try:
        daemon.start()
        with daemon.wire() as wire:
            # Many rows: a product that is worth all threads.
            wire.generate("tiny", [5, 6] * 500, max_tokens=4)
        threads = pool_threads(daemon)
        assert threads > 1 if by == "nothing" else threads == 1
    finally:
        daemon.stop()


def served(wire: Wire, model: str) -> bool:
    """Tells whether a generation succeeds."""
    try:
        return bool(wire.generate(model, [5], max_tokens=1).token_ids)
    except grpc.RpcError:
        return False


def test_tcp_on_loopback_needs_the_token(tiny_root: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    config = {"listen": address, "token_file": str(token_file(tmp_path))}
    with Daemon([tiny_root], config) as daemon:
        for token in ("", "wrong", "correct-horse-battery"):
            with daemon.wire(address) as wire, refused("UNAUTHENTICATED", "UNAUTHENTICATED"):
                metadata = [("authorization", f"Bearer {token}")] if token else []
                wire.server.Capabilities(
                    server.CapabilitiesRequest(), metadata=metadata, timeout=CALL_S
                )
        with daemon.wire(address) as wire:
            metadata = [("authorization", "Bearer correct-horse-battery-staple")]
            reply = wire.server.Capabilities(
                server.CapabilitiesRequest(), metadata=metadata, timeout=CALL_S
            )
            assert reply.server.version
        assert "correct-horse" not in daemon.log


# Unsafe settings, and the word that the message must contain.
UNSAFE_TCP = {
    "no-token": "token_file",
    "any-address": "TLS",
    "public-address": "TLS",
    "open-file": "600",
    "empty-file": "token_file",
}


@pytest.mark.parametrize("case", UNSAFE_TCP)
def test_unsafe_tcp_is_refused_at_the_start(tiny_root: Path, tmp_path: Path, case: str) -> None:
    port = free_port()
    file = token_file(tmp_path, mode=0o644 if case == "open-file" else 0o600)
    if case == "empty-file":
        file.write_text("")
    host = {"any-address": "0.0.0.0", "public-address": "192.0.2.1"}.get(case, "127.0.0.1")
    config = {"listen": f"{host}:{port}"}
    if case != "no-token":
        config["token_file"] = str(file)
    daemon = Daemon([tiny_root], config)
    try:
        daemon.launch()
        assert daemon.exit_code() != 0
        assert UNSAFE_TCP[case] in daemon.log
        assert "panicked" not in daemon.log
        assert not daemon.socket.exists()
    finally:
        daemon.stop()


@pytest.mark.parametrize("line", ["no_such_key = 1", "prefill_chunk_tokens = 0", "= nonsense"])
def test_a_wrong_config_is_refused_at_the_start(tiny_root: Path, tmp_path: Path, line: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(line + "\n")
    daemon = Daemon([tiny_root], arguments=["--config", str(file)])
    try:
        daemon.launch()
        assert daemon.exit_code() != 0
        assert line.split(" ")[0] in daemon.log
    finally:
        daemon.stop()


def test_the_environment_sets_what_the_file_sets(tiny_root: Path) -> None:
    with (
        Daemon([tiny_root], environment={"MLXD_SESSIONS_MAX": "7"}) as daemon,
        daemon.wire() as wire,
    ):
        reply = wire.server.Capabilities(server.CapabilitiesRequest(), timeout=CALL_S)
        assert reply.server.limits.sessions_max == 7
