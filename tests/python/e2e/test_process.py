"""The process: one daemon per socket, an orderly end, who may connect, what is logged."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from daemon import Daemon, free_port, wait_for
from mlxd.v1 import inference_pb2_grpc as inference_grpc
from mlxd.v1 import server_pb2 as server
from wire import CALL_S, Wire, failure, refused, request

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


def served(wire: Wire, model: str) -> bool:
    """Tells whether a generation succeeds."""
    try:
        return bool(wire.generate(model, [5], max_tokens=1).token_ids)
    except grpc.RpcError:
        return False


def token_file(folder: Path, mode: int = 0o600) -> Path:
    """Writes a token file."""
    file = folder / "token"
    file.write_text("correct-horse-battery-staple\n")
    file.chmod(mode)
    return file


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
    file = token_file(tmp_path, 0o644 if case == "open-file" else 0o600)
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
