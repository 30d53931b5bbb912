"""A stand-in for the mlxd binary, for a test of the demo: serve, generate, ps.

`FAKE_MLXD` breaks it: "die" at start, "wrong" answer, "cold" sessions, "unclean" exit at SIGTERM;
"mortal" streams do not end, and Generate kills it.
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from fake import Fake, server

import mlxd

BROKEN = os.environ.get("FAKE_MLXD", "")


class Mortal(Fake):
    hang = True

    def Generate(self, request, context):
        os.kill(os.getpid(), signal.SIGKILL)


def serve(arguments):
    if BROKEN == "die":
        sys.exit("error: the model root is on fire")
    fake = Mortal() if BROKEN == "mortal" else Fake()
    fake.delay = 0.02
    fake.cold = BROKEN == "cold"
    if BROKEN == "wrong":
        fake.answer = "The capital of France is Lyon."
    assert (Path(arguments.model_root) / arguments.model).is_dir()
    running, _ = server(fake, f"unix:{arguments.socket}")
    asked = threading.Event()
    if BROKEN == "unclean":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    else:
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
    asked.wait()
    running.stop(1).wait()


def generate(arguments):
    with (
        mlxd.Client(arguments.address) as client,
        client.stream(
            model=arguments.model, messages=arguments.prompt, temperature=arguments.temperature
        ) as stream,
    ):
        for text in stream.text():
            print(text, end="", flush=True)
        done = stream.result()
    print()
    if arguments.stats:
        print(
            f"prompt {done.prompt_tokens} tokens ({done.cached_tokens} cached), first token after "
            f"25 ms, {done.completion_tokens} tokens at 50.0 tokens/s, 0.22 s in total",
            file=sys.stderr,
        )


def ps(arguments):
    with mlxd.Client(arguments.address) as client:
        print("MODEL STATE")
        for info in client.list_models(resident_only=True):
            print(info.name, "resident")


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("serve")
    command.set_defaults(run=serve)
    for name in ("--socket", "--model-root", "--model"):
        command.add_argument(name, required=True)
    command = commands.add_parser("generate")
    command.set_defaults(run=generate)
    command.add_argument("-m", "--model")
    command.add_argument("--address")
    command.add_argument("--temperature", type=float)
    command.add_argument("--stats", action="store_true")
    command.add_argument("prompt")
    command = commands.add_parser("ps")
    command.set_defaults(run=ps)
    command.add_argument("--address")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
