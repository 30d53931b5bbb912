"""A daemon under test: started on a private socket, waited for, and ended with the test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from wire import CHANNEL, Wire

REPOSITORY = Path(__file__).resolve().parents[3]
START_S = 60.0
STOP_S = 30.0


def binary() -> Path:
    """Returns the program under test: MLXD_BIN, or cargo's release build."""
    if given := os.environ.get("MLXD_BIN"):
        return Path(given)
    target = os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")
    return REPOSITORY / target / "release" / "mlxd"


def cache_folder() -> Path:
    """Returns the folder of what is downloaded, which clones share."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MLXD_CACHE") or Path(cache) / "mlxd")


def default_model() -> Path:
    """Returns the folder of the default model, as `make model` provides it."""
    given = os.environ.get("MLXD_MODEL_DIR")
    return Path(given or cache_folder() / "models" / "SmolLM2-135M-Instruct")


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Polls until the condition holds and returns its value; fails after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        # The pause between two polls, not an estimate of how long something takes.
        time.sleep(0.01)


def free_port() -> int:
    """Returns a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def token_file(
    folder: Path, token: str = "correct-horse-battery-staple", mode: int = 0o600
) -> Path:
    """Writes a token file."""
    file = folder / "token"
    file.write_text(f"{token}\n")
    file.chmod(mode)
    return file


class Daemon:
    """A running `mlxd serve`; a context manager."""

    def __init__(
        self,
        roots: Iterable[Path],
        config: Mapping[str, Any] | None = None,
        *,
        models: Iterable[str] = (),
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Iterable[str] = (),
    ) -> None:
        # Not pytest's folder: a socket's path may have 104 bytes on macOS.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mlxd-"))
        self._owns_folder = folder is None
        self.socket = self.folder / "s"
        self.log_path = self.folder / f"log-{time.monotonic_ns()}"
        command = [str(binary()), "serve", "--socket", str(self.socket)]
        for root in roots:
            command += ["--model-root", str(root)]
        for model in models:
            command += ["--model", model]
        if config:
            file = self.folder / "config.toml"
            # JSON's numbers, strings, booleans and lists are TOML's too.
            file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items()))
            command += ["--config", str(file)]
        self.command = [*command, *arguments]
        # Without the variables of the person's own set-up, with an empty Hugging Face cache.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MLXD_")}
        self.environment["HF_HOME"] = str(self.folder / "huggingface")
        # Sessions that another daemon on the same folder finds again.
        self.environment["MLXD_STATE_DIR"] = str(self.folder / "state")
        # No test reaches a real hub.
        self.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        self.environment.update(environment or {})
        # Where stdout and stderr go instead of the log's file.
        self.output: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """The address for gRPC."""
        return f"unix:{self.socket}"

    @property
    def log(self) -> str:
        """The log so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wire(self, target: str = "", token: str = "", options: Sequence[Any] = ()) -> Wire:
        """Makes a new connection to it."""
        return Wire(target or self.target, token, options)

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts the process and does not wait."""
        with self.log_path.open("ab") as log:
            output = log.fileno() if self.output is None else self.output
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
            )
        return self.process

    def start(self) -> Daemon:
        """Starts the process and waits until its health is SERVING."""
        process = self.launch()
        wait_for(lambda: process.poll() is not None or self.healthy(), "health SERVING", START_S)
        assert process.poll() is None, f"mlxd ended with {process.returncode}:\n{self.log}"
        return self

    def healthy(self, service: str = "") -> bool:
        """Tells whether grpc.health reports SERVING."""
        if not self.socket.exists():
            return False
        with grpc.insecure_channel(self.target, options=CHANNEL) as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service=service), timeout=5
                )
            except grpc.RpcError:
                return False
            return reply.status == health_pb2.HealthCheckResponse.SERVING

    def resident_bytes(self, *, peak: bool = False) -> int:
        """Returns the process's resident memory in bytes, now or at most so far; Linux only."""
        assert self.process is not None
        if peak:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: int) -> None:
        """Sends a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def exit_code(self, timeout_s: float = STOP_S) -> int:
        """Waits for the process to end and returns its exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Ends the process as a crash does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Ends the process as a supervisor does, and starts it again."""
        self.signal(signal.SIGTERM)
        assert self.exit_code() == 0, self.log
        self.start()

    def stop(self) -> None:
        """Ends the process, with SIGTERM first, and removes its folder."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.signal(signal.SIGTERM)
                try:
                    self.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait(STOP_S)
                    raise AssertionError(f"SIGTERM did not end it:\n{self.log[-4000:]}") from None
        finally:
            if self._owns_folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
