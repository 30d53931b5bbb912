"""The provider's defaults, its budget of time and tries, and how the host sorts its errors."""

import asyncio

import grpc
import pytest
from fake import MODEL, PARIS

pytest.importorskip("abstractllm", reason="the abstractllm extra is not installed")

from abstractllm import create_llm, exceptions
from abstractllm.retry_strategies import RetryableError, RetryManager
from google.rpc import error_details_pb2

import mlxd.abstractllm  # registers the provider


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def test_unset_sampling_is_that_of_abstractllms_own_local_providers(llm, address, fake):
    llm.generate("x", temperature=None)
    request = fake.requests[-1]
    assert request.sampling.temperature == pytest.approx(0.7)
    assert request.sampling.top_p == pytest.approx(0.9)
    assert request.stopping.max_tokens == 4096
    assert not request.sampling.HasField("top_k")
    llm.generate("x", temperature=0, max_output_tokens=5)
    assert fake.requests[-1].sampling.temperature == 0
    assert fake.requests[-1].stopping.max_tokens == 5


def test_a_calls_second_name_outranks_the_configurations_first(address, fake):
    llm = create_llm("mlxd", model=MODEL, base_url=address, max_tokens=100, timeout=900)
    llm.generate("x", max_output_tokens=7, request_timeout=8)
    assert fake.requests[-1].stopping.max_tokens == 7
    assert fake.deadlines[-1] < 9


@pytest.mark.parametrize(
    ("name", "value"),
    [("timeout", "soon"), ("timeout", -1), ("max_retries", -1), ("retry_count", 1.5)],
)
def test_a_limit_that_is_none_is_refused(llm, fake, name, value):
    with pytest.raises(exceptions.InvalidParameterError):
        llm.generate("x", **{name: value})
    assert fake.requests == []


def sorted_as(error):
    """How the host's Session sorts an error, which decides whether it tries again."""
    return RetryManager().classify_error(error)


def test_no_daemon_is_a_connection_error(tmp_path):
    llm = create_llm("mlxd", model=MODEL, base_url=f"unix://{tmp_path}/none.sock")
    with pytest.raises(exceptions.ProviderConnectionError, match="mlxd serve") as caught:
        llm.generate("x")
    assert sorted_as(caught.value) is RetryableError.NETWORK


def test_a_daemon_that_dies_during_a_call_is_a_connection_error(mortal):
    process, address = mortal
    llm = create_llm("mlxd", model=MODEL, base_url=address)
    stream = llm.generate("x", stream=True)
    next(stream)
    process.kill()
    with pytest.raises(exceptions.ProviderConnectionError, match="is lost") as caught:
        list(stream)
    assert isinstance(caught.value.original_exception, mlxd.ConnectionLostError)
    assert sorted_as(caught.value) is RetryableError.NETWORK


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.get_capabilities(),
        lambda llm: llm.get_model_limits(),
        lambda llm: llm.load_model(),
        lambda llm: llm.unload_model(),
        lambda llm: llm.generate("x"),
        lambda llm: llm.generate("x", tools=[add]),
        lambda llm: llm.generate("x", max_input_tokens=3),
        lambda llm: list(llm.generate("x", stream=True)),
        lambda llm: asyncio.run(llm.generate_async("x")),
        lambda llm: asyncio.run(llm.generate_async("x", tools=[add])),
    ],
)
def test_every_call_to_a_daemon_that_stands_still_ends_at_its_timeout(silent, call):
    llm = create_llm("mlxd", model=MODEL, base_url=silent, timeout=0.1)
    with pytest.raises(exceptions.RequestTimeoutError) as caught:
        call(llm)
    assert sorted_as(caught.value) is RetryableError.TIMEOUT
    llm.close()


# A full queue


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_tried_again(llm, fake, stream):
    fake.refusals = 3
    answer = llm.generate("Where?", stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.content for chunk in chunks) == PARIS
    assert len(fake.requests) == 4


def test_two_hundred_gathered_calls_succeed_where_the_queue_is_shorter(llm, fake):
    fake.refusals = 300

    async def whole():
        return (await llm.generate_async("Where?")).content

    async def streamed():
        return "".join(
            [chunk.content async for chunk in await llm.generate_async("W?", stream=True)]
        )

    async def all_at_once():
        return await asyncio.gather(*(kind() for kind in (whole, streamed) for _ in range(100)))

    assert asyncio.run(all_at_once()) == [PARIS] * 200
    assert len(fake.requests) == 500


@pytest.mark.parametrize("stream", [False, True])
def test_memory_that_others_use_is_not_waited_for(llm, fake, stream):
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(10)
    facts = {"needed_bytes": "9", "available_bytes": "4", "in_the_way": "a"}
    fake.error = (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_BUDGET", "in use", facts, retry)
    calls = [
        lambda: list(llm.generate("x", stream=stream, timeout=10)),
        lambda: asyncio.run(_all(llm, stream)),
        llm.load_model,
    ]
    llm.set_config(timeout=10)  # Else a provider that waits would wait without end.
    for number, call in enumerate(calls, 1):
        with pytest.raises(exceptions.MemoryExceededError) as caught:
            call()
        assert caught.value.details["retry_after"] == 0.01
        assert (caught.value.required_memory, caught.value.available_memory) == (9, 4)
        assert len(fake.requests) == number


async def _all(llm, stream):
    answer = await llm.generate_async("x", stream=stream)
    return [chunk async for chunk in answer] if stream else answer


@pytest.mark.parametrize("limit", [{"max_retries": 1}, {"retry_count": 1}])
def test_tries_are_limited_by_max_retries(llm, fake, limit):
    fake.refusals = 2
    with pytest.raises(exceptions.QuotaExceededError) as caught:
        llm.generate("x", **limit)
    assert sorted_as(caught.value) is RetryableError.RATE_LIMIT
    assert caught.value.details["retry_after"] == fake.retry_s
    assert len(fake.requests) == 2


def test_a_try_beyond_the_timeout_is_not_waited_for(llm, fake):
    fake.refusals, fake.retry_s = 1, 3600
    with pytest.raises(exceptions.QuotaExceededError):
        llm.generate("x", timeout=60)
    assert len(fake.requests) == 1
