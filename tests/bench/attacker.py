"""What number 7 of `neighbours` lets happen beside a stream, in a process of its own.

    attacker.py KIND TARGET MODEL FOLDER SEED

prefill: prompts of 500 to 2,000 tokens, one after another, each with an answer of one token.
load:    loads and unloads.
fits:    64 callers ask at once whether a model that is not resident would fit, again and again.
forms:   hostile schemas and grammars, one after another; each has to be refused, or to have a first
         token, within two seconds.
all:     every kind of attacker of the load test. With the name of one, that one alone.

The attackers of the load test stand for callers on other machines: what they make the daemon do is
measured, not what their own Python takes of the processors. So on Linux they have only what nobody
else wants of those (SCHED_IDLE); the lowest priority alone still takes whole ticks from the
daemon's threads. What they got done is reported with the gaps: `requests_per_s`, `prefilled_per_s`.

Prints a line when it has begun, then goes on until it is ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

import attackers
from hostile import HOSTILE
from mlxd.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
from streams import Prompts
from wire import CHANNEL, UNLIMITED

LENGTHS = (500, 1000, 2000)
CALLERS = 64
# Time to the first token or the refusal of a hostile form, in seconds.
FORM_S = 2.0
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def prefill(channel: grpc.aio.Channel, model: str, prompts: Prompts) -> None:
    """Asks with one prompt of each length."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for length in LENGTHS:
        await stub.Generate(
            inference_pb2.GenerateRequest(
                model=model,
                prompt=prompts.ask(length, 1).prompt,
                stopping=inference_pb2.StoppingOptions(max_tokens=1),
            )
        )


async def load(channel: grpc.aio.Channel, model: str, _: Prompts) -> None:
    """Loads a model and unloads it."""
    stub = model_pb2_grpc.ModelServiceStub(channel)
    async for _event in stub.LoadModel(model_pb2.LoadModelRequest(model=model)):
        pass
    await stub.UnloadModel(model_pb2.UnloadModelRequest(model=model))


async def fits(channel: grpc.aio.Channel, model: str, _: Prompts) -> None:
    """Lets every caller ask once."""
    stub = model_pb2_grpc.ModelServiceStub(channel)

    async def ask() -> None:
        request = model_pb2.LoadModelRequest(model=model, validate_only=True)
        async for _event in stub.LoadModel(request):
            pass

    await asyncio.gather(*(ask() for _ in range(CALLERS)))


async def forms(channel: grpc.aio.Channel, model: str, prompts: Prompts) -> None:
    """Asks for an answer of each hostile form."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for form in HOSTILE.values():
        request = inference_pb2.GenerateRequest(
            model=model,
            prompt=prompts.ask(20, 1).prompt,
            sampling=inference_pb2.SamplingOptions(temperature=1.5),
            stopping=inference_pb2.StoppingOptions(max_tokens=20),
            output=inference_pb2.OutputOptions(return_token_ids=True),
            response_format=form,
        )
        answer = stub.StreamGenerate(request)
        try:
            async with asyncio.timeout(FORM_S):
                async for event in answer:
                    if event.delta.token_ids:
                        break
            async for _event in answer:
                pass
        except grpc.aio.AioRpcError as error:
            if error.code() not in REFUSALS:
                raise


KINDS: dict[str, Callable[[grpc.aio.Channel, str, Prompts], Awaitable[None]]] = {
    "prefill": prefill,
    "load": load,
    "fits": fits,
    "forms": forms,
}


async def main(kind: str, target: str, model: str, folder: str, seed: str) -> None:
    """Attacks."""
    prompts = Prompts(Path(folder), int(seed))
    assert prompts.words
    async with grpc.aio.insecure_channel(target, options=UNLIMITED + CHANNEL) as channel:
        print("begun", flush=True)
        while True:
            await KINDS[kind](channel, model, prompts)
            print("again", flush=True)


def attack_as_in_the_load_test(target: str, *names: str) -> None:
    """Makes the named attacks of the load test, or all, until it is ended."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        # For the threads to come too.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print("begun", flush=True)
    attackers.main(Path(target.removeprefix("unix:")), *names)


if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        asyncio.run(main(*sys.argv[1:]))
    else:
        names = [] if sys.argv[1] == "all" else [sys.argv[1]]
        attack_as_in_the_load_test(sys.argv[2], *names)
