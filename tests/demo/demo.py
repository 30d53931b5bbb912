"""The show of `make demo`: two clients share one model, a session keeps what it has read.

    demo.py --mlxd target/release/mlxd --model-root DIR --model NAME

Needs the package of clients/python with its abstractllm extra. Starts a daemon of its own on a
private unix socket. Exits 0 when every part did what it claims, else 1 and says which part did not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc

import mlxd
from mlxd.types import GenerateDelta, GenerateFinished, GenerateStarted

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
OTHER_QUESTION = "Explain in two sentences what a lighthouse is for."
TURNS = ("My name is Ada. What is a good name for a ship?", "And what was my name?")
START_SECONDS_MAX = 180.0
CALL_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 30.0
STATS = re.compile(
    r"prompt (?P<prompt>\d+) tokens \((?P<cached>\d+) cached\), "
    r"first token after (?P<ttft>\d+) ms, "
    r"(?P<output>\d+) tokens(?: at (?P<speed>[\d.]+) tokens/s)?"
)
LOG_LINES = 25
PS_LINES_MAX = 2  # The header and the one model.


class DemoError(Exception):
    """A part did not do what it should."""


def require(condition: bool, text: str) -> None:
    """Fails the part that runs unless `condition` holds."""
    if not condition:
        raise DemoError(text)


@dataclass
class Row:
    """A line of the table; None is unknown."""

    name: str
    ttft: float | None
    speed: float | None
    prompt: int | None
    cached: int | None
    output: int | None

    @classmethod
    def of(cls, name: str, done: mlxd.Completion) -> Row:
        """The numbers that the daemon gives of a completion."""
        counts = (done.prompt_tokens, done.cached_tokens, done.completion_tokens)
        return cls(name, done.time_to_first_token, done.tokens_per_second, *counts)

    def __str__(self) -> str:
        ttft = "-" if self.ttft is None else f"{self.ttft * 1000:.0f} ms"
        speed = "-" if self.speed is None else f"{self.speed:.1f}"
        counts = ["-" if n is None else str(n) for n in (self.prompt, self.cached, self.output)]
        return f"   {self.name:<26}{ttft:>9}{speed:>10}" + "".join(f"{n:>9}" for n in counts)


@dataclass
class Demo:
    """The daemon that was started, and what the parts found."""

    binary: Path
    model_root: Path
    model: str
    folder: Path
    environment: dict[str, str]
    part: str = "start"
    rows: list[Row] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The daemon's address."""
        return f"unix://{self.folder / 'd.sock'}"

    @property
    def log(self) -> Path:
        """The daemon's log file."""
        return self.folder / "mlxd.log"

    def command(self, *arguments: str) -> list[str]:
        """A command line of the binary."""
        return [str(self.binary), *arguments]

    def client(self) -> mlxd.Client:
        """A Python client of the daemon."""
        return mlxd.Client(self.address, timeout=CALL_SECONDS_MAX)


@contextmanager
def daemon(demo: Demo) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the daemon, and ends it whatever happens."""
    command = demo.command(
        "serve",
        *("--socket", str(demo.folder / "d.sock")),
        *("--model-root", str(demo.model_root)),
        *("--model", demo.model),
    )
    with demo.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=demo.environment | {"MLXD_STATE_DIR": str(demo.folder / "state")},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def serving(channel: grpc.Channel) -> bool:
    """Tells whether grpc.health.v1 reports SERVING; in bytes, field 1 of its answer is 1."""
    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    try:
        return bool(check(b"", timeout=0.5, wait_for_ready=True) == b"\x08\x01")
    except grpc.RpcError:
        return False


def wait_until_serving(demo: Demo, process: subprocess.Popen[bytes]) -> float:
    """Waits for the daemon and its model; returns the time in seconds."""
    begin = time.monotonic()
    options = [(f"grpc.{kind}_reconnect_backoff_ms", 100) for kind in ("initial", "max")]
    with grpc.insecure_channel(f"unix:{demo.folder / 'd.sock'}", options) as channel:
        while not serving(channel):
            status = process.poll()
            require(status is None, f"the daemon ended with status {status}")
            waited = time.monotonic() - begin
            require(waited < START_SECONDS_MAX, f"not serving after {waited:.0f} s")
            time.sleep(0.05)
    with demo.client() as client:
        client.load_model(demo.model, timeout=START_SECONDS_MAX)
    return time.monotonic() - begin


class PythonClient(threading.Thread):
    """Asks through AbstractLLM's create_llm, as a program of its own would."""

    def __init__(self, demo: Demo) -> None:
        super().__init__(name="abstractllm", daemon=True)
        self.demo = demo
        self.answering = threading.Event()
        self.ended = 0.0
        self.text = ""
        self.done: mlxd.Completion | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Streams one answer."""
        try:
            self._ask()
        except Exception as error:  # Shown by the main thread.
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.answering.set()

    def _ask(self) -> None:
        from abstractllm import create_llm

        import mlxd.abstractllm  # Registers the provider.

        llm = create_llm("mlxd", model=self.demo.model, base_url=self.demo.address)
        options = {"temperature": 0.0, "max_tokens": 48, "timeout": CALL_SECONDS_MAX}
        for chunk in llm.generate(OTHER_QUESTION, stream=True, **options):
            self.text += chunk.content
            self.answering.set()
            if isinstance(chunk.raw_response, mlxd.Completion):
                self.done = chunk.raw_response
        llm.close()


def rust_row(stats: str) -> Row:
    """The numbers that `mlxd generate --stats` prints."""
    name = "1 Rust"
    found = STATS.search(stats)
    if found is None:
        return Row(name, None, None, None, None, None)
    speed = float(found["speed"]) if found["speed"] else None
    prompt, cached, output = (int(found[count]) for count in ("prompt", "cached", "output"))
    return Row(name, int(found["ttft"]) / 1000, speed, prompt, cached, output)


def relay(pipe: IO[bytes] | None) -> str:
    """Shows the output of a process as it arrives."""
    if pipe is None:
        raise DemoError("no pipe")
    output = b""
    print("   ", end="", flush=True)
    while piece := os.read(pipe.fileno(), 4096):
        output += piece
        shown = piece.decode("utf-8", "replace").replace("\n", "\n   ")
        print(shown.rstrip() if shown.endswith("   ") else shown, end="", flush=True)
    print()
    return output.decode("utf-8", "replace").strip()


def two_clients(demo: Demo) -> None:
    """The Rust client answers while the Python one is answering, on the same weights."""
    demo.part = "the Python AbstractLLM client"
    python = PythonClient(demo)
    python.start()
    require(python.answering.wait(CALL_SECONDS_MAX), "no text in time")
    if python.error:
        raise python.error
    demo.part = "the Rust client"
    print(f"1. The Rust client asks: {QUESTION}")
    begin = time.monotonic()
    options = ["-m", demo.model, "--address", demo.address, "--temperature", "0", "--stats"]
    with subprocess.Popen(
        demo.command("generate", *options, QUESTION),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=demo.environment,
    ) as process:
        timer = threading.Timer(CALL_SECONDS_MAX, process.kill)
        timer.daemon = True
        timer.start()
        text = relay(process.stdout)
        errors = process.stderr.read().decode("utf-8", "replace") if process.stderr else ""
        status = process.wait()
        timer.cancel()
    require(status == 0, f"mlxd generate ended with status {status}: {errors.strip()}")
    require(text == ANSWER, f"the answer is {text!r}, not {ANSWER!r}")
    demo.rows.append(rust_row(errors))
    demo.part = "the Python AbstractLLM client"
    python.join(CALL_SECONDS_MAX)
    require(not python.is_alive(), "did not end in time")
    if python.error:
        raise python.error
    if python.done is None or not python.text.strip():
        raise DemoError("the answer is empty")
    require(begin < python.ended, "it had ended before the Rust client began")
    print(f'2. Meanwhile AbstractLLM asked, through create_llm("mlxd"): {OTHER_QUESTION}')
    print(f"   {' '.join(python.text.split())}")
    demo.rows.append(Row.of("2 AbstractLLM, meanwhile", python.done))


def one_resident_model(demo: Demo) -> None:
    """Both clients were answered by one resident model."""
    demo.part = "mlxd ps"
    shown = subprocess.run(
        demo.command("ps", "--address", demo.address),
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS_MAX,
        env=demo.environment,
        check=False,
    )
    require(shown.returncode == 0, f"status {shown.returncode}: {shown.stderr.strip()}")
    require(demo.model in shown.stdout, f"does not show {demo.model}: {shown.stdout.strip()!r}")
    with demo.client() as client:
        resident = [info.name for info in client.list_models(resident_only=True)]
    require(resident == [demo.model], f"resident models: {resident}")
    print("   Both used the one resident model, says `mlxd ps`:")
    for line in shown.stdout.rstrip().splitlines()[:PS_LINES_MAX]:
        print(f"   {line.rstrip()}")


def session_turns(demo: Demo) -> None:
    """The second turn of a session finds the whole first turn in the KV cache."""
    demo.part = "the session"
    print("3. A session, two turns, each sends only what is new:")
    with demo.client() as client:
        session = client.create_session("demo", model=demo.model)
        first, second = (turn(session, number, text) for number, text in enumerate(TURNS, 1))
        session.delete()
    demo.rows += [Row.of("3 session, turn 1", first), Row.of("3 session, turn 2", second)]
    whole = first.prompt_tokens + first.completion_tokens
    cached = second.cached_tokens
    require(cached >= whole - 1, f"turn 2 found {cached} tokens cached of turn 1's {whole}")
    print(f"   Turn 2 found {cached} of turn 1's {whole} tokens in the KV cache.")


def turn(session: mlxd.Session, number: int, text: str) -> mlxd.Completion:
    """Runs a turn, which streams, and shows it."""
    kinds = set()
    expected = session.token_count
    with session.stream(
        text, temperature=0, max_tokens=40, expected_token_count=expected
    ) as events:
        for event in events:
            kinds.add(type(event))
        done = events.result()
    needed = {GenerateStarted, GenerateDelta, GenerateFinished}
    require(needed <= kinds, f"turn {number} streamed only {kinds}")
    print(f"   {number}> {text}")
    print(f"   {' '.join(done.text.split())}")
    return done


def table(demo: Demo) -> None:
    """Shows the numbers."""
    demo.part = "the table"
    print("4. " + f"{'':<26}{'TTFT':>9}{'tokens/s':>10}{'prompt':>9}{'cached':>9}{'output':>9}")
    for row in demo.rows:
        print(row)
    with demo.client() as client:
        stats = client.stats()
    memory = stats.memory
    require(memory.weight_bytes > 0, "GetStats counts no weights")
    sizes = (
        ("weights", memory.weight_bytes),
        ("KV slabs", memory.kv_slab_bytes),
        ("process", memory.process_resident_bytes),
    )
    print("   Memory: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes))


def stop(demo: Demo, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM drains the daemon, and it exits 0."""
    demo.part = "stop"
    process.terminate()
    try:
        status = process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise DemoError(f"still running {STOP_SECONDS_MAX:.0f} s after SIGTERM") from None
    require(status == 0, f"the daemon ended with status {status} after SIGTERM")
    print("The daemon stopped on SIGTERM with status 0.")


def show(demo: Demo) -> None:
    """Runs all parts."""
    with daemon(demo) as process:
        seconds = wait_until_serving(demo, process)
        print(
            f"mlxd serves {demo.model} on a private unix socket, {seconds:.1f} s after its start."
        )
        two_clients(demo)
        one_resident_model(demo)
        session_turns(demo)
        table(demo)
        stop(demo, process)


def log_tail(demo: Demo) -> str:
    """The last lines of the daemon's log."""
    if not demo.log.exists():
        return ""
    lines = demo.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"  | {line}" for line in lines)


def main() -> int:
    """Runs the show; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--mlxd", type=Path, required=True, help="the binary")
    parser.add_argument("--model-root", type=Path, required=True, help="a folder of models")
    parser.add_argument("--model", required=True, help="the name of a folder in it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # Those of AbstractLLM's own source.
    folder = Path(tempfile.mkdtemp(prefix="mlxd-demo-"))
    demo = Demo(
        binary=arguments.mlxd.resolve(),
        model_root=arguments.model_root.resolve(),
        model=arguments.model,
        folder=folder,
        environment=dict(os.environ),
    )
    os.environ["HOME"] = str(folder)  # AbstractLLM writes below it.
    try:
        show(demo)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # Whatever it is, the part has failed.
        print(f"\ndemo failed at {demo.part}: {type(error).__name__}: {error}", file=sys.stderr)
        if tail := log_tail(demo):
            print(f"the daemon's last lines:\n{tail}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
