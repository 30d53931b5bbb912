"""The contestants: the daemon over gRPC, mlx_lm.server over HTTP, BatchGenerator in-process.

Each is a contestant with `together(asks)`; the two servers also `hear` single requests. All have
the same float32 weights and BLAS threads. Only the one whose `awake` block runs is not stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from daemon import Daemon, wait_for
from mlxd.v1 import inference_pb2, inference_pb2_grpc
from streams import Ask, Heard, together
from wire import CHANNEL, UNLIMITED

HERE = Path(__file__).resolve().parent
THREADS = "2"
OURS, SERVER, BATCH = "mlxd", "mlx_lm.server", "BatchGenerator"


class Contestant:
    """A process that generates; stopped except in its rounds."""

    name: str
    process: subprocess.Popen[Any]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the process run in this block."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    async def together(self, asks: Sequence[Ask]) -> tuple[float, list[Heard]]:
        """Runs all requests at once."""
        return await together(self.hear, asks)

    async def hear(self, ask: Ask, heard: Heard) -> None:
        """Runs one request; adds each piece to `heard` as it arrives."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends the process."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait()


class Mlxd(Contestant):
    """The daemon; all requests go over one connection."""

    name = OURS

    def __init__(
        self, folder: Path, config: Mapping[str, Any] | None = None, more: Iterable[str] = ()
    ) -> None:
        threads = {"OPENBLAS_NUM_THREADS": THREADS}
        self.model = folder.name
        models = [folder.name, *more]
        self.daemon = Daemon([folder.parent], config, models=models, environment=threads)
        self.daemon.start()
        assert self.daemon.process is not None
        self.process = self.daemon.process
        self.channel = grpc.aio.insecure_channel(self.daemon.target, options=UNLIMITED + CHANNEL)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def hear(self, ask: Ask, heard: Heard) -> None:
        """Streams one request."""
        await self.stream(self.request(ask), ask.client, heard)

    def request(self, ask: Ask) -> inference_pb2.GenerateRequest:
        """The request as a message."""
        return inference_pb2.GenerateRequest(
            model=self.model,
            prompt=ask.prompt,
            sampling=inference_pb2.SamplingOptions(temperature=0.0),
            stopping=inference_pb2.StoppingOptions(max_tokens=ask.tokens, ignore_eos=True),
            output=inference_pb2.OutputOptions(return_token_ids=True),
        )

    async def stream(
        self, request: inference_pb2.GenerateRequest, client: str, heard: Heard, **call: Any
    ) -> None:
        """Streams a request to its end, or until the task is cancelled."""
        now = asyncio.get_running_loop().time
        metadata = (("x-mlxd-client", client),) if client else ()
        stream = self.stub.StreamGenerate(request, metadata=metadata, **call)
        try:
            async for event in stream:
                delta = event.delta
                if delta.token_ids:
                    heard.times.append(now())
                    heard.counts.append(len(delta.token_ids))
                    heard.ids += delta.token_ids
                heard.text += delta.text
                if event.HasField("finished"):
                    heard.queue_s = event.finished.timings.queue_time.ToNanoseconds() / 1e9
        finally:
            stream.cancel()

    def stop(self) -> None:
        """Ends the daemon."""
        self.process.send_signal(signal.SIGCONT)
        self.daemon.stop()


class Server(Contestant):
    """mlx_lm.server; every request has a connection of its own, as it closes each."""

    name = SERVER

    def __init__(self, folder: Path, blas: str, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "WARNING"]
        command += options
        self.process = subprocess.Popen(command, env=environment(blas), stderr=subprocess.DEVNULL)
        wait_for(self._listens, "mlx_lm.server listens", 60.0)

    def _listens(self) -> bool:
        assert self.process.poll() is None, "mlx_lm.server ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def hear(self, ask: Ask, heard: Heard) -> None:
        """Streams one request of the OpenAI API."""
        now = asyncio.get_running_loop().time
        body = {
            "prompt": ask.prompt,
            "max_tokens": ask.tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            payload = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(payload)}\r\n\r\n"
            writer.write(head.encode() + payload)
            status = await reader.readline()
            assert b" 200 " in status, status
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                text = "".join(choice["text"] for choice in event["choices"])
                if text:
                    heard.times.append(now())
                    heard.counts.append(1)
                    heard.text += text
                if usage := event.get("usage"):
                    # A token without text has no piece of its own; the count is corrected here.
                    if not heard.counts:  # tokens without a text of their own
                        heard.times.append(now())
                        heard.counts.append(0)
                    heard.counts[-1] += usage["completion_tokens"] - sum(heard.counts)
        finally:
            writer.close()


class Batch(Contestant):
    """BatchGenerator."""

    name = BATCH

    def __init__(self, folder: Path, blas: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "batch.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(blas),
            text=True,
        )

    async def together(self, asks: Sequence[Ask]) -> tuple[float, list[Heard]]:
        """All requests at once, timed inside its own process."""
        command = {"prompts": [ask.ids for ask in asks], "tokens": asks[0].tokens}
        done = await asyncio.to_thread(self._call, command)
        return done["seconds"], [
            Heard(0.0, times, [1] * len(times), ids=ids)
            for times, ids in zip(done["times"], done["outputs"], strict=True)
        ]

    def _call(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def environment(blas: str) -> dict[str, str]:
    """The environment of a peer, with a BLAS under it."""
    plain = {**os.environ, "OPENBLAS_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    return {**plain, "LD_PRELOAD": blas} if blas else plain


def blas_library(name: str = "MLXD_BLAS_PLAIN") -> str:
    """Returns the BLAS library for mlx-lm; on macOS MLX uses Accelerate, for every contestant."""
    if platform.system() != "Linux":
        return ""
    return os.environ.get(name) or sys.exit(f"{name} is not set: use tests/bench/run.sh")


def bench_cache() -> Path:
    """Returns the folder of dense copies of models."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MLXD_CACHE") or Path(cache) / "mlxd") / "bench"
