import asyncio
import gc
import sys
import threading

import pytest
from fake import LOAD, MODEL, PARIS

import mlxd
from mlxd import types


def run(address, body):
    async def main():
        async with mlxd.AsyncClient(address, timeout=10) as client:
            return await body(client)

    return asyncio.run(main())


def test_every_call_returns_what_the_sync_one_does(address, fake):
    async def body(client):
        seen = []
        await client.load_model(MODEL, on_progress=seen.append)
        assert [(step.phase, step.done_bytes, step.total_bytes) for step in seen] == LOAD
        assert (await client.validate_model(MODEL)).fits
        assert await client.unload_model(MODEL) == 538
        assert (await client.get_model("m")).name == "m"
        assert len(await client.list_models()) == 2
        assert (await client.count_tokens(model=MODEL, prompt="a b")).token_count == 2
        assert (await client.score(model=MODEL, token_ids=[1])).tokens[0].token.token_id == 7
        assert (await client.capabilities()).server.version == "0.1.0"
        assert (await client.stats()).requests_total
        assert (await client.chat("x", model=MODEL)).text == PARIS
        return await client.generate(model=MODEL, prompt="x", request_id="mine")

    assert run(address, body).text == PARIS
    assert fake.metadata[-1]["x-request-id"] == "mine"


def test_an_answer_above_grpcs_own_limit_arrives(address, fake):
    fake.answer = "x" * (5 << 20)

    async def body(client):
        return await client.generate(model=MODEL, prompt="a")

    assert len(run(address, body).text) == 5 << 20


def test_a_client_made_before_any_loop_serves_one_loop_after_another(address):
    client = mlxd.AsyncClient(address, timeout=10)

    async def whole():
        return (await client.chat("x", model=MODEL)).text

    async def streamed():
        async with client:
            return (await client.stream(model=MODEL, messages="x").result()).text

    assert [asyncio.run(main()) for main in (whole, streamed, whole)] == [PARIS] * 3


def test_a_client_serves_two_loops_at_once(address):
    client = mlxd.AsyncClient(address, timeout=10)
    both = threading.Barrier(2, timeout=10)
    texts = []

    async def ask():
        await client.stats()
        await asyncio.to_thread(both.wait)
        texts.append((await client.chat("x", model=MODEL)).text)

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == [PARIS, PARIS]


def test_two_streams_run_at_once(address):
    async def body(client):
        async def one():
            async with client.stream(model=MODEL, messages="x") as stream:
                return "".join([text async for text in stream.text()])

        return await asyncio.gather(one(), one())

    assert run(address, body) == [PARIS, PARIS]


@pytest.mark.parametrize("leave", ["with", "collect", "task"])
def test_leaving_a_stream_cancels_its_call(address, fake, leave):
    fake.hang = True

    async def first_delta(stream):
        async for event in stream:
            if isinstance(event, types.GenerateDelta):
                return

    async def body(client):
        stream = client.stream(model=MODEL, messages="x")
        await first_delta(stream)
        assert not fake.left.is_set()
        if leave == "with":
            async with stream:
                pass
        elif leave == "collect":
            del stream
            gc.collect()
        else:
            task = asyncio.ensure_future(stream.result())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.to_thread(fake.left.wait, 5)

    run(address, body)


def test_a_closed_stream_raises_cancelled(address, fake):
    fake.hang = True

    async def body(client):
        stream = client.stream(model=MODEL, messages="x")
        assert await asyncio.to_thread(fake.hangs.wait, 5)
        stream.close()
        for _ in range(2):
            with pytest.raises(mlxd.CancelledCallError):
                await stream.result()
        assert await asyncio.to_thread(fake.left.wait, 5)

    run(address, body)


def test_a_stream_that_was_read_to_its_end_is_not_cancelled_by_closing_it(address):
    async def body(client):
        async with client.stream(model=MODEL, messages="x") as stream:
            assert "".join([text async for text in stream.text()]) == PARIS
        return (await stream.result()).text

    assert run(address, body) == PARIS


async def _reads(client):
    return await client.stream(model=MODEL, messages="x").result()


async def _asks(client):
    return await client.generate(model=MODEL, prompt="x")


# `cancelling`, by which a task's own cancellation is told from the call's, is Python 3.11's.
@pytest.mark.skipif(sys.version_info < (3, 11), reason="a task does not say if it is cancelled")
@pytest.mark.parametrize("work", [_reads, _asks])
def test_closing_the_client_ends_its_calls_and_not_the_tasks_that_await_them(address, fake, work):
    fake.hang = True

    async def body(client):
        task = asyncio.ensure_future(work(client))
        assert await asyncio.to_thread(fake.hangs.wait, 5)
        await client.close()
        with pytest.raises(mlxd.CancelledCallError):
            await asyncio.wait_for(task, 5)
        assert not task.cancelled()
        assert await asyncio.to_thread(fake.left.wait, 5)

    run(address, body)


@pytest.mark.parametrize("work", [_reads, _asks])
def test_a_cancelled_task_is_cancelled_though_its_client_is_closed_too(address, fake, work):
    fake.hang = True

    async def body(client):
        task = asyncio.ensure_future(work(client))
        assert await asyncio.to_thread(fake.hangs.wait, 5)
        task.cancel()
        await client.close()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()

    run(address, body)


def test_a_closed_clients_stream_that_nobody_awaits_ends_too(address, fake):
    fake.hang = True

    async def body(client):
        stream = client.stream(model=MODEL, messages="x")
        assert await asyncio.to_thread(fake.hangs.wait, 5)
        await client.close()
        assert await asyncio.to_thread(fake.left.wait, 5)
        with pytest.raises(mlxd.CancelledCallError):
            await stream.result()

    run(address, body)


def test_a_session_runs_forks_truncates_and_deletes(address, fake):
    async def body(client):
        session = await client.session("talk", model=MODEL)
        await session.generate("What is it?")
        async with session.stream("And?") as stream:
            assert (await stream.result()).cached_tokens == 9
        copy = await session.fork("copy")
        assert copy.token_count == session.token_count == 16
        assert (await session.truncate(messages=2)).token_count == 9
        assert (await session.extend(prompt="one two")).usage.cached_tokens == 9
        assert (await session.truncate(turns=1)).token_count == 9
        assert (await session.save()).token_count == 9
        assert (await session.update(pinned=True, labels={"a": "b"})).labels["a"] == "b"
        assert len(await session.messages()) == 2
        assert (await client.session("talk", model=MODEL)).token_count == 9
        assert len(await client.list_sessions()) == 2
        await copy.delete()

    run(address, body)
    assert list(fake.sessions) == ["talk"]


def test_errors_are_the_same(address):
    async def body(client):
        with pytest.raises(mlxd.NotFoundError) as caught:
            await client.generate(model="none", prompt="x")
        assert caught.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(mlxd.NotFoundError):
            await client.stream(model="none", prompt="x").result()

    run(address, body)


def test_both_clients_have_the_same_methods():
    def public(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(mlxd.Client) == public(mlxd.AsyncClient)
    assert public(mlxd.Session) == public(mlxd.AsyncSession)
