"""Callers that harm others: each does a fixed amount of work, on a connection of its own.

    python -m attackers SOCKET

A process of its own, so that they do not slow down the Python of those they attack. Writes what
was done as one line of JSON. What an attacker gets is its own matter: a refusal, a deadline or an
answer.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from mlxd.v1 import inference_pb2
from wire import CALL_S, Wire, request

GENERATE = "/mlxd.v1.InferenceService/Generate"
COUNT = "/mlxd.v1.InferenceService/CountTokens"
WORDS = "the harbour master counted the boats every evening "
EMPTY_MESSAGES = 250_000
HALVES, HALF_CONNECTIONS, HALF_SENT = 12, 6, 48_000


def big_text() -> bytes:
    """Makes a request for the tokens of 8 MB, which is below message_bytes_max."""
    text = WORDS * (8_000_000 // len(WORDS))
    return inference_pb2.CountTokensRequest(model="tiny", prompt=text).SerializeToString()


def big_prompt() -> bytes:
    """Makes a request to continue 8 MB, which is above the context."""
    text = WORDS * (8_000_000 // len(WORDS))
    return request("tiny", prompt=text).SerializeToString()


def empty_messages() -> bytes:
    """Makes a chat of a megabyte of messages without content."""
    user = inference_pb2.Message(role=inference_pb2.ROLE_USER)
    chat = inference_pb2.ChatInput(messages=[user] * EMPTY_MESSAGES)
    return request("tiny", chat=chat).SerializeToString()


def send(wire: Wire, method: str, body: bytes, timeout: float = CALL_S) -> None:
    """Makes a call with a message that was serialized once."""
    wire.channel.unary_unary(method, None, None)(body, timeout=timeout)


def validation(wire: Wire, _: int) -> None:
    """Asks whether a model would fit that is not resident."""
    wire.load("other", validate_only=True)


def cancelled(wire: Wire, at: int) -> None:
    """Leaves a stream after its first event; some have a long prompt."""
    ids = [7 + n % 300 for n in range(2000 if at % 10 == 0 else 20)]
    call = wire.stream("tiny", ids, max_tokens=1000)
    next(iter(call))
    call.cancel()


def invented_name(wire: Wire, at: int) -> None:
    """Calls under another name each time."""
    name = (("x-mlxd-client", f"invented-{at}"),)
    ask = request("tiny", [5, 6, 7], max_tokens=2)
    wire.inference.Generate(ask, timeout=CALL_S, metadata=name)


def unread(wire: Wire, at: int) -> None:
    """Opens a long stream, reads nothing of it and leaves later."""
    ask = request("tiny", [9, at % 300, 11], max_tokens=4000, logprobs=20)
    call = wire.inference.StreamGenerate(ask, timeout=2.0)
    time.sleep(0.2)
    del call


def half_sent(target: str, _: int) -> None:
    """Sends the beginnings of messages of 15 MB, and waits with them."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(target)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        # The daemon may close it: that is its right.
        with suppress(OSError):
            for stream in range(1, 2 * HALVES, 2):
                connection.sendall(_half_request(stream))
        time.sleep(4.0)


def _half_request(stream: int) -> bytes:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": COUNT,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # HPACK: each a literal without indexing, under a new name.
    literals = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    data = b"\0" + struct.pack(">I", 15_000_000) + bytes(HALF_SENT)
    end_headers = 4
    frames = [_frame(1, end_headers, stream, literals)]
    frames += [_frame(0, 0, stream, data[at : at + 16_000]) for at in range(0, len(data), 16_000)]
    return b"".join(frames)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def attacks() -> dict[str, tuple[int, Callable[[Any, int], None]]]:
    """Returns the attacks by name, each with the number of times that it is made."""
    text, prompt, empty = big_text(), big_prompt(), empty_messages()
    return {
        "big_text": (12, lambda wire, _: send(wire, COUNT, text, 1.5)),
        "big_prompt": (60, lambda wire, _: send(wire, GENERATE, prompt)),
        "empty_messages": (40, lambda wire, _: send(wire, GENERATE, empty)),
        "validation": (400, validation),
        "cancelled": (200, cancelled),
        "invented_name": (400, invented_name),
        "unread": (40, unread),
        "half_sent": (HALF_CONNECTIONS, half_sent),
    }


@dataclass
class Attack:
    """Attackers at work, and what they have done in the end."""

    process: subprocess.Popen[str]
    done: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def is_on(self) -> bool:
        """Whether an attacker is at work."""
        return self.process.poll() is None


@contextmanager
def attacked(target: Path) -> Iterator[Attack]:
    """Attacks the daemon at a socket; all attackers have finished at the end of the block."""
    command = [sys.executable, "-m", "attackers", str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        attack = Attack(process)
        try:
            yield attack
        except BaseException:
            process.kill()
            raise
        out, _ = process.communicate()
    attack.done, attack.refusals, attack.faults = json.loads(out)


def main(target: str) -> None:
    """Makes all attacks at once."""
    done: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    faults: list[str] = []

    def run(name: str, count: int, act: Callable[[Any, int], None]) -> None:
        with Wire(f"unix:{target}") as wire:
            for at in range(count):
                try:
                    act(target if act is half_sent else wire, at)
                except grpc.RpcError as error:
                    refusals[f"{name}: {error.code().name}"] += 1
                except Exception as error:
                    faults.append(f"{name}: {error!r}")
                    return
                done[name] += 1

    threads = [
        threading.Thread(target=run, args=(name, count, act))
        for name, (count, act) in attacks().items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([done, refusals, faults]))


if __name__ == "__main__":
    main(sys.argv[1])
