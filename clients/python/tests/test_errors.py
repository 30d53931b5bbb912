import asyncio
import time
from types import SimpleNamespace

import grpc
import pytest
from fake import MODEL, running
from google.rpc import error_details_pb2 as details

import mlxd
from mlxd.errors import error_class

Code = grpc.StatusCode

# Reason: its status code in errors.proto, and what the client raises.
CLASSES = {
    "INVALID_FIELD": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "EMPTY_PROMPT": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "CONTEXT_OVERFLOW": (Code.INVALID_ARGUMENT, mlxd.ContextOverflowError),
    "TEMPLATE_FAILED": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "MESSAGE_TOO_LARGE": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "MODEL_NOT_FOUND": (Code.NOT_FOUND, mlxd.NotFoundError),
    "MODEL_NOT_LOADED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "MODEL_INVALID": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "MODEL_UNSUPPORTED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "NO_CHAT_TEMPLATE": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "MODEL_TOO_LARGE": (Code.FAILED_PRECONDITION, mlxd.TooLargeError),
    "MODEL_BUSY": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "MEMORY_BUDGET": (Code.RESOURCE_EXHAUSTED, mlxd.CapacityError),
    "MODEL_UNLOADED": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "SESSION_NOT_FOUND": (Code.NOT_FOUND, mlxd.NotFoundError),
    "SESSION_EXISTS": (Code.ALREADY_EXISTS, mlxd.AlreadyExistsError),
    "SESSION_BUSY": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SESSION_MOVED": (Code.ABORTED, mlxd.SessionMovedError),
    "SESSION_WRONG_MODEL": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SESSION_NOT_CHAT": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SESSION_LIMIT": (Code.RESOURCE_EXHAUSTED, mlxd.CapacityError),
    "QUEUE_FULL": (Code.RESOURCE_EXHAUSTED, mlxd.CapacityError),
    "KV_TOO_LARGE": (Code.FAILED_PRECONDITION, mlxd.TooLargeError),
    "ANSWER_TOO_LARGE": (Code.RESOURCE_EXHAUSTED, mlxd.TooLargeError),
    "SCHEMA_TOO_LARGE": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "SCHEMA_UNSUPPORTED": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "GRAMMAR_TOO_COMPLEX": (Code.RESOURCE_EXHAUSTED, mlxd.TooLargeError),
    "DEADLINE": (Code.DEADLINE_EXCEEDED, mlxd.DeadlineError),
    "DEADLINE_UNMEETABLE": (Code.DEADLINE_EXCEEDED, mlxd.DeadlineError),
    "SLOW_READER": (Code.ABORTED, mlxd.SlowReaderError),
    "CANCELLED": (Code.CANCELLED, mlxd.CancelledCallError),
    "DRAINING": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "ENGINE_DEAD": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "NON_FINITE_LOGITS": (Code.INTERNAL, mlxd.ServerError),
    "INTERNAL": (Code.INTERNAL, mlxd.ServerError),
    "UNAUTHENTICATED": (Code.UNAUTHENTICATED, mlxd.AuthError),
    "PERMISSION_DENIED": (Code.PERMISSION_DENIED, mlxd.AuthError),
    "MODEL_NOT_ALLOWED": (Code.PERMISSION_DENIED, mlxd.AuthError),
    "DOWNLOAD_FAILED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "HUB_DENIED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "HUB_UNAVAILABLE": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "DISK_FULL": (Code.RESOURCE_EXHAUSTED, mlxd.CapacityError),
    "SESSION_DAMAGED": (Code.DATA_LOSS, mlxd.StateError),
    "SESSION_UNREADABLE": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "SESSION_TOKENIZER_CHANGED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SESSION_FILE_INVALID": (Code.INVALID_ARGUMENT, mlxd.InvalidRequestError),
    "SESSION_FILE_UNSUPPORTED": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SNAPSHOTS_OFF": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "SNAPSHOT_FAILED": (Code.UNAVAILABLE, mlxd.UnavailableError),
    "CANNOT_APPEND": (Code.FAILED_PRECONDITION, mlxd.StateError),
    "UNIMPLEMENTED": (Code.UNIMPLEMENTED, mlxd.UnsupportedError),
}


@pytest.mark.parametrize("reason", CLASSES)
def test_a_reason_is_raised_as_its_class(client, fake, reason):
    code, kind = CLASSES[reason]
    fake.error = (code, reason, "said", {"k": "v"})
    with pytest.raises(mlxd.MlxdError) as caught:
        client.stats()
    error = caught.value
    assert type(error) is kind is error_class(code, reason)
    assert (error.code, error.reason, error.message) == (code, reason, "said")
    assert (error.metadata, error.request_id) == ({"k": "v"}, "r-9")


def test_details_become_attributes(client, fake):
    retry = details.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    bad = details.BadRequest(
        field_violations=[details.BadRequest.FieldViolation(field="a.b", description="is wrong")]
    )
    resource = details.ResourceInfo(resource_name="m")
    facts = {"needed_bytes": "9", "available_bytes": "4"}
    fake.error = (
        Code.RESOURCE_EXHAUSTED, "MEMORY_BUDGET", "full", facts, retry, bad, resource,
    )  # fmt: skip
    with pytest.raises(mlxd.CapacityError) as caught:
        client.generate(model="m", prompt="x")
    error = caught.value
    assert error.retry_after == 1.5
    assert error.field_violations == (mlxd.FieldViolation("a.b", "is wrong"),)
    assert (error.resource, error.needed_bytes, error.available_bytes) == ("m", 9, 4)
    assert str(error) == "MEMORY_BUDGET: full (request r-9)"


def test_a_stream_raises_the_same_errors(client, fake):
    fake.error = (Code.INVALID_ARGUMENT, "CONTEXT_OVERFLOW", "long", {"prompt_tokens": "9"})
    with pytest.raises(mlxd.ContextOverflowError) as caught:
        client.stream(model="m", prompt="x").result()
    assert caught.value.prompt_tokens == 9
    assert caught.value.context_length is None
    assert isinstance(caught.value, ValueError)


def test_no_daemon_is_a_connection_error_that_does_not_wait_for_the_deadline(tmp_path):
    with mlxd.Client(f"unix://{tmp_path}/none.sock", timeout=60) as client:
        with pytest.raises(mlxd.ConnectionFailedError) as caught:
            client.stats()
        with pytest.raises(ConnectionError, match="mlxd serve"):
            list(client.stream(model="m", prompt="x"))
    assert caught.value.reason == ""
    assert f"no daemon answers at {client.address}: " in caught.value.message
    assert "start one with `mlxd serve`" in caught.value.message

    async def ask():
        async with mlxd.AsyncClient(f"unix://{tmp_path}/none.sock", timeout=60) as client:
            await client.stats()

    with pytest.raises(mlxd.ConnectionFailedError, match="mlxd serve"):
        asyncio.run(ask())


def assert_lost(error, address):
    assert type(error) is mlxd.ConnectionLostError
    assert isinstance(error, mlxd.UnavailableError)
    assert isinstance(error, ConnectionError)
    assert not isinstance(error, mlxd.ConnectionFailedError)
    assert (error.code, error.reason, error.retry_after) == (Code.UNAVAILABLE, "", None)
    assert f"the connection to the daemon at {address} is lost: " in error.message
    assert "no daemon answers" not in error.message


def test_a_stream_whose_daemon_dies_ends_with_a_lost_connection(mortal):
    process, address = mortal
    with mlxd.Client(address, timeout=60) as client:
        stream = client.stream(model=MODEL, prompt="x")
        next(stream)
        process.kill()
        with pytest.raises(mlxd.ConnectionLostError) as caught:
            stream.result()
        assert_lost(caught.value, address)
        with pytest.raises(mlxd.ConnectionFailedError, match="no daemon answers"):
            client.stats()


def test_a_call_whose_daemon_dies_ends_with_a_lost_connection(mortal):
    _, address = mortal
    with (
        mlxd.Client(address, timeout=60) as client,
        pytest.raises(mlxd.ConnectionLostError) as caught,
    ):
        client.generate(model=MODEL, prompt="x")
    assert_lost(caught.value, address)


def test_asyncio_calls_whose_daemon_dies_end_with_a_lost_connection(mortal):
    process, address = mortal

    async def ask():
        async with mlxd.AsyncClient(address, timeout=60) as client:
            stream = client.stream(model=MODEL, prompt="x")
            await anext(stream)
            with pytest.raises(mlxd.ConnectionLostError) as unary:
                await client.generate(model=MODEL, prompt="x")
            process.wait()
            with pytest.raises(mlxd.ConnectionLostError) as streamed:
                await stream.result()
            return unary.value, streamed.value

    for error in asyncio.run(ask()):
        assert_lost(error, address)


def test_a_daemon_that_starts_later_is_found(tmp_path):
    with mlxd.Client(f"unix://{tmp_path}/d.sock") as client:
        with pytest.raises(mlxd.ConnectionFailedError):
            client.stats()
        with running(tmp_path):
            deadline = time.monotonic() + 30
            while True:
                try:
                    client.stats()
                    break
                except mlxd.ConnectionFailedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)


def test_a_timeout_is_the_calls_deadline(client, fake):
    client.stats(timeout=1000)
    assert 100 < fake.deadlines[-1] < 1100  # The server reads its own clock.
    client.stats()
    assert fake.deadlines[-1] < 11, "the client's own timeout"
    fake.hang = True
    with pytest.raises(TimeoutError) as caught:
        client.stream(model="SmolLM2-135M-Instruct", prompt="x", timeout=0.3).result()
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def test_every_call_to_a_daemon_that_stands_still_ends_at_its_timeout(silent):
    with mlxd.Client(silent, timeout=0.1) as client:
        for call in (
            lambda: client.stats(),
            lambda: client.list_models(),
            lambda: client.load_model("m"),
            lambda: client.session("talk", model="m"),
            lambda: client.stream(model="m", prompt="x").result(),
        ):
            with pytest.raises(mlxd.DeadlineError) as caught:
                call()
            assert caught.value.reason == "DEADLINE"


@pytest.mark.parametrize("call", ["list_models", "session"])
def test_a_timeout_is_for_a_call_with_all_its_requests(client, fake, monkeypatch, call):
    client.session("talk", model="m")
    seconds = iter([0.0, 0.0, 4.0] if call == "list_models" else [0.0, 4.0, 4.0])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("mlxd._deadline.time", clock)
    if call == "list_models":
        client.list_models(timeout=6)
    else:
        client.session("talk", model="m", timeout=6)
    first, second = fake.deadlines[-2:]
    assert 2 < first < 7
    assert second < 3
