"""Sessions as files, and watched, through both clients."""

import asyncio
import io

import pytest
from fake import FILE, MODEL

import mlxd
from mlxd import types


def test_an_export_is_the_whole_file_or_an_error(client):
    session = client.create_session("trip", model=MODEL)
    assert list(client.export_session("trip")) == [FILE, b"trip"]
    assert session.export().read() == FILE + b"trip"
    client.create_session("cut", model=MODEL)
    with pytest.raises(mlxd.ServerError, match="finished"):
        client.export_session("cut").read()
    with pytest.raises(mlxd.NotFoundError):
        client.export_session("absent").read()


@pytest.mark.parametrize(
    "file",
    [FILE + b"trip", io.BytesIO(FILE + b"trip"), [FILE, b"", b"trip"], iter([FILE, b"trip"])],
    ids=["bytes", "file", "list", "iterator"],
)
def test_an_import_takes_bytes_files_and_iterables(client, fake, file):
    session = client.import_session(file, "copy", model=MODEL, pinned=True, ttl=5)
    assert (session.name, session.model, session.token_count) == ("copy", MODEL, len(FILE) + 4)
    assert fake.requests[-1].pinned
    assert fake.requests[-1].ttl.seconds == 5
    assert client.import_session(FILE + b"trip").name == "trip"
    with pytest.raises(mlxd.AlreadyExistsError):
        client.import_session(FILE + b"trip")
    again = client.import_session(FILE + b"trip", replace=True, expected_token_count=7)
    assert again.name == "trip"
    assert (fake.requests[-1].replace, fake.requests[-1].expected_token_count) == (True, 7)
    with pytest.raises(mlxd.InvalidRequestError) as caught:
        client.import_session(b"something else")
    assert caught.value.reason == "SESSION_FILE_INVALID"


def test_a_long_file_goes_in_chunks_and_a_file_that_cannot_be_read_says_why(client):
    assert client.import_session(FILE + b"x" * 200_000, "long").token_count == len(FILE) + 200_000

    def broken():
        yield FILE
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        client.import_session(broken())
    with pytest.raises(mlxd.InvalidRequestError):
        client.import_session(FILE, name=3)


def test_a_watch_tells_what_there_is_and_ends_with_the_daemon(client):
    client.create_session("a", model=MODEL)
    with client.watch_sessions() as events:
        first, second = next(events), next(events)
        assert isinstance(first, types.SessionChange)
        assert (first.name, first.kind) == ("a", types.SessionChangeKind.SESSION_CHANGE_KIND_LISTED)
        assert isinstance(second, types.WatchReady)
        with pytest.raises(mlxd.UnavailableError) as caught:
            next(events)
    assert caught.value.reason == "DRAINING"


def test_a_watch_that_is_left_ends(client, fake):
    fake.hang = True
    with client.watch_sessions(changes_only=True, labels={"a": "b"}, pinned=True) as events:
        assert isinstance(next(events), types.WatchReady)
    assert fake.left.wait(10)
    assert dict(fake.requests[-1].labels) == {"a": "b"}
    assert fake.requests[-1].pinned


def test_the_asyncio_client_does_the_same(address):
    async def main():
        async with mlxd.AsyncClient(address, timeout=10) as client:
            session = await client.create_session("trip", model=MODEL)
            file = await session.export().read()
            assert file == FILE + b"trip"
            copy = await client.import_session(io.BytesIO(file), "copy")
            assert copy.token_count == len(file)
            with pytest.raises(mlxd.AlreadyExistsError):
                await client.import_session([file], "copy")
            events = client.watch_sessions()
            assert [(await anext(events)).name for _ in range(2)] == ["trip", "copy"]
            assert isinstance(await anext(events), types.WatchReady)
            with pytest.raises(mlxd.UnavailableError):
                await anext(events)

            def broken():
                yield FILE
                raise OSError("the disk is gone")

            with pytest.raises(OSError, match="the disk is gone"):
                await client.import_session(broken())

    asyncio.run(main())
