"""Callers that harm others, each on connections of its own, again and again.

    python -m attackers SOCKET [NAME ...]

A process of its own, so that they do not slow down the Python of those they attack. Each makes
its attack a least number of times, then goes on until stdin is closed. Writes what was done as one
line of JSON. What an attack gets is an answer, or one of the refusals that are named with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from mlxd.v1 import inference_pb2
from raw_frames import (
    cancelled_call,
    half_call,
    open_connection,
    wait_until_ended,
    wait_until_open,
    wait_until_taken,
)
from wire import CALL_S, Wire, failure, message, request

GENERATE = "/mlxd.v1.InferenceService/Generate"
COUNT = "/mlxd.v1.InferenceService/CountTokens"
# Models by what they are for: the honest callers' own, another one, and one that is loaded again
# and again.
OWN, OTHER, LOADED = "tiny", "other", "third"

WORDS = "the harbour master counted the boats every evening "
EMPTY_MESSAGES = 250_000
HALVES, HALF_SENT, ANNOUNCED = 3, 60_000, 15_000_000
SILENT, AT_ONCE, VALIDATIONS, FORKS = 300, 64, 16, 16
NAME_BYTES = 2_000_000


def big_text() -> bytes:
    """Makes a request for the tokens of 8 MB, which is below message_bytes_max."""
    text = WORDS * (8_000_000 // len(WORDS))
    return inference_pb2.CountTokensRequest(model=OWN, prompt=text).SerializeToString()


def big_prompt() -> bytes:
    """Makes a request to continue 8 MB, which is above the context."""
    text = WORDS * (8_000_000 // len(WORDS))
    return request(OWN, prompt=text).SerializeToString()


def empty_messages() -> bytes:
    """Makes a chat of a megabyte of messages without content."""
    user = inference_pb2.Message(role=inference_pb2.ROLE_USER)
    chat = inference_pb2.ChatInput(messages=[user] * EMPTY_MESSAGES)
    return request(OWN, chat=chat).SerializeToString()


def odd_texts() -> list[bytes]:
    """Makes requests for the tokens of texts without a space."""
    base64, emoji = "QUJDREVGR0hJSktM" * 20_000, "\N{GRINNING FACE}" * 80_000
    texts = [base64, emoji, "\N{LATIN SMALL LETTER A}" * 300_000]
    return [
        inference_pb2.CountTokensRequest(model=OWN, prompt=text).SerializeToString()
        for text in texts
    ]


def send(wire: Wire, method: str, body: bytes, timeout: float = CALL_S) -> None:
    """Makes a call with a message that was serialized once."""
    wire.channel.unary_unary(method, None, None)(body, timeout=timeout)


def prompt(seed: int, length: int) -> list[int]:
    """Makes ids that no other seed begins with."""
    return [
        5 + (seed // 300**place if place < 3 else seed + place) % 300 for place in range(length)
    ]


def at_once(wire: Wire, calls: int, ask: Callable[[int], tuple[Any, Any]]) -> None:
    """Makes calls of Generate all at once; fails as the first does that fails."""
    made = [
        wire.inference.Generate.future(request_, timeout=CALL_S, metadata=metadata)
        for request_, metadata in map(ask, range(calls))
    ]
    for call in made:
        call.exception()
    for call in made:
        call.result()


def in_threads(calls: int, act: Callable[[int], object]) -> None:
    """Does something in several threads at once; fails as one does."""
    with ThreadPoolExecutor(calls) as pool:
        for done in [pool.submit(act, number) for number in range(calls)]:
            done.result()


def validations(wire: Wire, _: int) -> None:
    """Asks, many at once, whether a model would fit that is not resident."""
    in_threads(VALIDATIONS, lambda _: wire.load(LOADED, validate_only=True))


def cancelled(wire: Wire, at: int) -> None:
    """Leaves a stream after its first event; some have a long prompt."""
    call = wire.stream(OWN, prompt(at, 2000 if at % 10 == 0 else 20), max_tokens=1000)
    next(iter(call))
    call.cancel()


def invented_names(wire: Wire, at: int) -> None:
    """Makes calls at once, each under a name of its own."""

    def ask(number: int) -> tuple[Any, Any]:
        name = (("x-mlxd-client", f"invented-{at}-{number}"),)
        return request(OWN, prompt(number, 4), max_tokens=2), name

    at_once(wire, AT_ONCE, ask)


def unread(wire: Wire, at: int) -> None:
    """Leaves a long stream unread while another is answered."""
    call = wire.stream(OWN, prompt(at, 3), max_tokens=4000, logprobs=20)
    wire.generate(OWN, prompt(at, 5), max_tokens=100)
    call.cancel()


def interactive_prompt(wire: Wire, at: int) -> None:
    """Has a long prompt run before those of others."""
    high = inference_pb2.PRIORITY_INTERACTIVE
    wire.generate(OWN, prompt(at, 3000), max_tokens=1, priority=high)


def other_prompt(wire: Wire, at: int) -> None:
    """Has a long prompt of another model run, which is loaded for it if need be."""
    wire.generate(OTHER, prompt(at, 3000), max_tokens=1)


def loads(wire: Wire, _: int) -> None:
    """Loads a model and unloads it."""
    wire.load(LOADED)
    wire.unload(LOADED)


def penalties(wire: Wire, at: int) -> None:
    """Has penalties examine all tokens of a long stream."""
    sampling = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    sampling |= {f"{kind}_context_size": 0 for kind in ("repetition", "presence", "frequency")}
    wire.generate(OWN, prompt(at, 1500), max_tokens=200, sampling=sampling)


def large_requests(wire: Wire, at: int) -> None:
    """Asks for the most that the context allows, several at once, and leaves what has begun."""

    def ask(number: int) -> None:
        call = wire.stream(OWN, prompt(at + number, 40), max_tokens=32_000)
        next(iter(call))
        call.cancel()

    in_threads(4, ask)


def parked_caches(wire: Wire, at: int) -> None:
    """Leaves caches that nobody asks for again."""
    at_once(
        wire, AT_ONCE, lambda n: (request(OWN, prompt(at * AT_ONCE + n, 40), max_tokens=1), None)
    )


def sessions(wire: Wire, at: int) -> None:
    """Fills sessions with names that cost no token, forks them and deletes all."""
    name = f"full-{at}"
    wire.create_session(name, OWN)
    made = [name]
    try:
        for fork in range(FORKS):
            said = message("USER", f"turn {fork}")
            said.name = "x" * NAME_BYTES
            chat = inference_pb2.ChatInput(messages=[said])
            wire.generate(chat=chat, session=made[-1], max_tokens=2)
            made.append(wire.fork_session(made[-1], f"{name}-{fork}").name)
        wire.get_session(name, include_messages=True)
    finally:
        for one in made:
            wire.delete_session(one)


def deleted_sessions(wire: Wire, at: int) -> None:
    """Deletes a session during its turn."""
    name = f"deleted-{at}"
    wire.create_session(name, OWN)
    call = wire.stream(ids=prompt(at, 600), session=name, max_tokens=2000)
    next(iter(call))
    wire.delete_session(name)
    for _ in call:
        pass


def half_sent(wire: Wire, _: int) -> None:
    """Sends the beginnings of messages of 15 MB, and stays until the daemon ends them."""
    # The daemon may close it, since it has made no call: that is its right.
    with open_connection(wire.target) as connection, suppress(ConnectionError):
        wait_until_open(connection)
        for stream in range(1, 2 * HALVES, 2):
            connection.sendall(half_call(stream, COUNT, ANNOUNCED, HALF_SENT))
        wait_until_ended(connection, HALVES)


def resets(wire: Wire, _: int) -> None:
    """Cancels many calls in the write that makes them."""
    body = request(OWN, [5, 6, 7], max_tokens=500).SerializeToString()
    with open_connection(wire.target) as connection, suppress(ConnectionError):
        calls = (cancelled_call(stream, GENERATE, body) for stream in range(1, 2 * AT_ONCE, 2))
        connection.sendall(b"".join(calls))
        wait_until_taken(connection)


def silent(wire: Wire, _: int) -> None:
    """Opens more connections than there is room for, silent while another is served."""
    opened = [open_connection(wire.target) for _ in range(SILENT)]
    wire.generate(OWN, [5, 6, 7], max_tokens=50)
    for connection in opened:
        connection.close()


@dataclass(frozen=True)
class Attacker:
    """One kind of attack: how often it is made at least, and the refusals that are right."""

    least: int
    act: Callable[[Wire, int], None]
    refusals: frozenset[str] = frozenset()


def attackers() -> dict[str, Attacker]:
    """Returns the attackers by name."""
    text, long, empty, odd = big_text(), big_prompt(), empty_messages(), odd_texts()
    late = frozenset({"DEADLINE", "DEADLINE_EXCEEDED"})
    # The running streams of others hold the budget.
    full = frozenset({"MEMORY_BUDGET"})
    # An idle model makes room for a request's KV cache, also before it is unloaded.
    gone = frozenset({"MODEL_NOT_LOADED"})
    return {
        "big_text": Attacker(3, lambda wire, _: send(wire, COUNT, text, 1.5), late),
        "big_prompt": Attacker(
            10, lambda wire, _: send(wire, GENERATE, long), late | {"CONTEXT_OVERFLOW"}
        ),
        "empty_messages": Attacker(
            10, lambda wire, _: send(wire, GENERATE, empty), late | {"INVALID_FIELD"}
        ),
        "odd_texts": Attacker(3, lambda wire, at: send(wire, COUNT, odd[at % 3], 3.0), late),
        "validations": Attacker(10, validations),
        "cancelled": Attacker(20, cancelled),
        "invented_names": Attacker(3, invented_names),
        "unread": Attacker(3, unread),
        "interactive_prompt": Attacker(3, interactive_prompt),
        "other_prompt": Attacker(3, other_prompt, full),
        "loads": Attacker(3, loads, full | gone),
        "penalties": Attacker(2, penalties),
        "large_requests": Attacker(3, large_requests),
        "parked_caches": Attacker(3, parked_caches),
        "sessions": Attacker(2, sessions, frozenset({"SESSION_LIMIT"})),
        "deleted_sessions": Attacker(3, deleted_sessions, frozenset({"CANCELLED"})),
        "half_sent": Attacker(1, half_sent),
        "resets": Attacker(5, resets),
        "silent": Attacker(5, silent),
    }


@dataclass
class Attack:
    """Attackers at work, and what they have done in the end."""

    process: subprocess.Popen[str]
    # By attacker: how often it was made, and its refusals by reason.
    done: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether an attacker is at work."""
        return self.process.poll() is None

    def relent(self) -> None:
        """Lets each attacker end once it has done its least."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wrong_refusals(self) -> list[str]:
        """Returns the refusals that are not right."""
        expected = {name: attacker.refusals for name, attacker in attackers().items()}
        return [
            f"{name}: {reason}"
            for name, refusals in self.refusals.items()
            for reason in refusals
            if reason not in expected[name]
        ]


@contextmanager
def attacked(target: Path, *names: str) -> Iterator[Attack]:
    """Attacks the daemon at a socket; all attackers have ended at the end of the block."""
    command = [sys.executable, "-m", "attackers", str(target), *names]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        attack = Attack(process)
        try:
            yield attack
            attack.relent()
            assert process.stdout is not None
            out = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    attack.done, attack.refusals, attack.faults, attack.longest = json.loads(out)


def main(target: Path, *names: str) -> None:
    """Makes the named attacks, or all."""
    done: Counter[str] = Counter()
    refusals: dict[str, Counter[str]] = {}
    longest: Counter[str] = Counter()
    faults: list[str] = []
    told_to_end = threading.Event()

    chosen = {name: one for name, one in attackers().items() if not names or name in names}
    all_connected = threading.Barrier(len(chosen))

    def run(name: str, attacker: Attacker) -> None:
        refused = refusals.setdefault(name, Counter())
        with Wire(f"unix:{target}") as wire:
            # A connection that has made no call may have to go for a newer one.
            wire.stats()
            all_connected.wait()
            while done[name] < attacker.least or not told_to_end.is_set():
                began = time.monotonic()
                try:
                    attacker.act(wire, done[name])
                except grpc.RpcError as error:
                    found = failure(error)
                    refused[found.reason or found.code.name] += 1
                except Exception as error:
                    faults.append(f"{name}: {error!r}")
                    return
                done[name] += 1
                longest[name] = max(longest[name], round(time.monotonic() - began, 1))

    threads = [threading.Thread(target=run, args=one) for one in chosen.items()]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    told_to_end.set()
    for thread in threads:
        thread.join()
    print(json.dumps([done, refusals, faults, longest]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
