"""The provider against the real AbstractLLM: create_llm and Session."""

import asyncio
import json
import logging
import weakref

import grpc
import pytest
from fake import MODEL, PARIS

pytest.importorskip("abstractllm", reason="the abstractllm extra is not installed")

from abstractllm import ModelCapability, ModelParameter, create_llm, exceptions
from abstractllm.session import Session
from google.rpc import error_details_pb2

import mlxd.abstractllm
from mlxd.abstractllm.messages import conversation
from mlxd.v1 import inference_pb2, server_pb2

CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def chat(fake, index=-1):
    """Role and text of the messages of a request."""
    roles = {1: "system", 2: "user", 3: "assistant", 4: "tool"}
    return [
        (roles[m.role], "".join(p.text for p in m.content))
        for m in fake.requests[index].chat.messages
    ]


def test_create_llm_finds_the_provider(llm):
    assert isinstance(llm, mlxd.abstractllm.MlxdProvider)
    assert llm.provider_name == "mlxd"


def test_generate_returns_content_and_usage(llm, fake):
    response = llm.generate("Where?", system_prompt="Be brief.", temperature=0.0)
    assert (response.content, response.finish_reason, response.model) == (PARIS, "stop", MODEL)
    assert response.usage["prompt_tokens"] == 3
    assert response.usage["total_tokens"] == 9
    assert response.tool_calls is None
    assert response.raw_response.request_id == "r-1"
    assert chat(fake) == [("system", "Be brief."), ("user", "Where?")]
    assert fake.requests[-1].sampling.HasField("temperature")


def test_a_stream_is_deltas_and_a_last_chunk_with_usage(llm):
    chunks = list(llm.generate("Where?", stream=True))
    assert "".join(chunk.content for chunk in chunks) == PARIS
    assert len(chunks) == 7
    assert chunks[-1].content == ""
    assert chunks[-1].usage["completion_tokens"] == 6
    assert chunks[-1].finish_reason == "stop"
    assert chunks[0].usage is None


def test_leaving_a_stream_cancels_its_call(llm, fake):
    fake.hang = True
    stream = llm.generate("Where?", stream=True)
    next(stream)
    stream.close()
    assert fake.left.wait(5)


def test_async_calls_may_use_different_loops(llm):
    async def whole():
        return (await llm.generate_async("Where?")).content

    async def streamed():
        return [chunk.content async for chunk in await llm.generate_async("W?", stream=True)]

    assert asyncio.run(whole()) == PARIS
    assert "".join(asyncio.run(streamed())) == PARIS


def _close(llm):
    llm.close()


def _move(llm):
    llm.set_config(api_key="another")
    llm.get_capabilities()


@pytest.mark.parametrize("leave", [_close, _move])
def test_asyncio_connections_close_with_the_provider_and_when_it_moves(llm, leave):
    async def ask():
        assert (await llm.generate_async("Where?")).content == PARIS
        held = llm._clients()  # As by a stream that is still read.
        (opened,) = [weakref.ref(channel) for channel, _ in held.aio._link._open.values()]
        assert opened() is not None
        leave(llm)
        assert opened() is None
        assert held.aio is not llm._clients().aio

    asyncio.run(ask())


def test_config_gives_defaults_and_a_calls_none_is_unset(address, fake):
    llm = create_llm(
        "mlxd",
        **{
            ModelParameter.MODEL: MODEL,
            "base_url": address,
            ModelParameter.TEMPERATURE: 0.5,
            "max_output_tokens": 7,
            "system_prompt": "S",
            "stop": ["END"],
            "timeout": 9,
            "logit_bias": {"5": 1},
        },
    )
    llm.generate("x", temperature=None, max_tokens=None, top_p=0.9, min_p=0.1)
    request = fake.requests[-1]
    assert request.sampling.temperature == 0.5
    assert request.sampling.top_p == pytest.approx(0.9)
    assert request.sampling.min_p == pytest.approx(0.1)
    assert dict(request.sampling.logit_bias) == {5: 1.0}
    assert not request.sampling.HasField("frequency_penalty")
    assert (request.stopping.max_tokens, list(request.stopping.stop_strings)) == (7, ["END"])
    assert chat(fake)[0] == ("system", "S")
    assert 0 < fake.deadlines[-1] < 10
    llm.generate("x", temperature=0.1, max_tokens=3)
    assert fake.requests[-1].sampling.temperature == pytest.approx(0.1)
    assert fake.requests[-1].stopping.max_tokens == 3


def test_logprobs_and_priority_reach_the_request(llm, fake):
    llm.generate("x", logprobs=2, priority="background")
    assert fake.requests[-1].output.logprobs == 2
    assert fake.requests[-1].priority == inference_pb2.PRIORITY_BACKGROUND
    llm.generate("x", logprobs=True)
    assert fake.requests[-1].output.HasField("logprobs")
    assert fake.requests[-1].output.logprobs == 0
    llm.generate("x", logprobs=False)
    assert not fake.requests[-1].output.HasField("logprobs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation_strategy", "left"),
        ("device", "cuda"),
        ("images", ["a.png"]),
        ("user", "u"),
        ("context_window", 10),
        ("load_in_4bit", True),
        ("tool_choice", "some"),
        ("mirostat", 2),
        ("n", 2),
    ],
)
def test_what_cannot_be_honoured_is_refused(llm, address, fake, name, value):
    with pytest.raises(exceptions.UnsupportedFeatureError, match=name):
        llm.generate("x", **{name: value})
    with pytest.raises(exceptions.UnsupportedFeatureError, match=name):
        create_llm("mlxd", model=MODEL, base_url=address, **{name: value})
    assert fake.requests == []


def test_unknown_parameters_and_values_are_refused(llm, fake):
    with pytest.raises(exceptions.InvalidParameterError, match="temprature"):
        llm.generate("x", temprature=1)
    with pytest.raises(exceptions.InvalidParameterError, match="top_k"):
        llm.generate("x", top_k=-1)
    with pytest.raises(exceptions.InvalidRequestError, match="neither"):
        llm.generate("")
    llm.generate("x", load_in_8bit=False, max_retries=0, tool_choice="auto", n=1)
    assert len(fake.requests) == 1


def test_max_input_tokens_is_checked_before_generating(llm):
    assert llm.generate("a b", max_input_tokens=2).content == PARIS
    with pytest.raises(exceptions.ContextWindowExceededError) as caught:
        llm.generate("a b c", max_input_tokens=2)
    assert (caught.value.context_window, caught.value.content_length) == (2, 3)
    assert llm.set_memory_limits()["model_input_limit"] == 8192


def test_capabilities_are_the_daemons(llm):
    found = llm.get_capabilities()
    assert found[ModelCapability.MAX_TOKENS] == 8192
    assert found[ModelCapability.STREAMING] is found[ModelCapability.ASYNC] is True
    assert found[ModelCapability.VISION] is False


@pytest.mark.parametrize(
    ("code", "reason", "metadata", "kind"),
    [
        ("UNAUTHENTICATED", "UNAUTHENTICATED", {}, exceptions.AuthenticationError),
        ("RESOURCE_EXHAUSTED", "SESSION_LIMIT", {}, exceptions.ResourceExceededError),
        ("RESOURCE_EXHAUSTED", "MEMORY_BUDGET", {"needed_bytes": "9"},
         exceptions.MemoryExceededError),
        ("RESOURCE_EXHAUSTED", "ANSWER_TOO_LARGE", {}, exceptions.ResourceExceededError),
        ("FAILED_PRECONDITION", "MODEL_TOO_LARGE", {"needed_bytes": "9"},
         exceptions.MemoryExceededError),
        ("FAILED_PRECONDITION", "MODEL_UNSUPPORTED", {}, exceptions.UnsupportedModelError),
        ("FAILED_PRECONDITION", "MODEL_INVALID", {}, exceptions.ModelLoadingError),
        ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE", {}, exceptions.UnsupportedFeatureError),
        ("NOT_FOUND", "MODEL_NOT_FOUND", {}, exceptions.ModelNotFoundError),
        ("INVALID_ARGUMENT", "EMPTY_PROMPT", {}, exceptions.InvalidRequestError),
        ("INVALID_ARGUMENT", "CONTEXT_OVERFLOW", {"prompt_tokens": "9", "context_length": "4"},
         exceptions.ContextWindowExceededError),
        ("UNAVAILABLE", "DRAINING", {}, exceptions.ProviderConnectionError),
        ("DEADLINE_EXCEEDED", "DEADLINE", {}, exceptions.RequestTimeoutError),
        ("CANCELLED", "CANCELLED", {}, exceptions.GenerationError),
        ("INTERNAL", "NON_FINITE_LOGITS", {}, exceptions.GenerationError),
        ("INTERNAL", "INTERNAL", {}, exceptions.ProviderAPIError),
        ("UNIMPLEMENTED", "UNIMPLEMENTED", {}, exceptions.UnsupportedOperationError),
    ],
)  # fmt: skip
def test_errors_become_abstractllms(llm, fake, code, reason, metadata, kind):
    fake.error = (grpc.StatusCode[code], reason, "said", metadata)
    for stream in (False, True):
        with pytest.raises(exceptions.AbstractLLMError) as caught:
            list(llm.generate("x", stream=stream))
        assert type(caught.value) is kind
        assert caught.value.provider == "mlxd"
        assert caught.value.details["reason"] == reason
        assert caught.value.details["request_id"] == "r-9"
        assert isinstance(caught.value.original_exception, mlxd.MlxdError)


def test_the_template_says_whether_system_prompts_are_taken(llm, fake):
    assert llm.get_capabilities()[ModelCapability.SYSTEM_PROMPT] is False
    fake.features.append(server_pb2.FEATURE_SYSTEM_PROMPT)
    assert llm.get_capabilities()[ModelCapability.SYSTEM_PROMPT] is True


def test_a_refused_field_names_its_parameter(llm, fake):
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="d")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    fake.error = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "said", {}, bad)
    with pytest.raises(exceptions.InvalidParameterError) as caught:
        llm.generate("x", top_p=3.0)
    assert caught.value.parameter == "top_p"


# The prompt

RESULT = {"role": "user", "content": "[Tool Result: add]\n5"}


def said(role, content="yes"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("history", "repeated"),
    [
        ([said("user")], False),
        ([said("user"), said("assistant", CALL), said("tool", "5")], False),
        ([said("user"), said("assistant", CALL), RESULT, said("assistant", CALL), RESULT], False),
        ([said("user"), said("assistant", "Sure?")], True),
        ([said("user"), said("assistant")], True),
        ([said("user"), said("assistant", CALL), said("tool", "5"), said("assistant", "5.")], True),
        ([said("user"), said("assistant", "Sure?"), said("user", "no")], True),
        ([said("system"), said("assistant", "Hello.")], True),
        ([], True),
    ],
)
def test_only_the_message_that_awaits_an_answer_is_the_prompt(history, repeated):
    sent = conversation("yes", None, history, None, lambda text: text)
    assert sent == ([*history, said("user")] if repeated else history)


def test_files_belong_to_the_users_message_and_not_to_a_tools_result(tmp_path):
    notes = tmp_path / "n.txt"
    notes.write_text("blue")
    history = [said("user", "Add."), said("assistant", CALL), dict(RESULT)]
    sent = conversation(None, None, history, [notes], lambda text: text)
    assert "blue" in sent[0]["content"]
    assert sent[2] == RESULT


def test_a_prompt_that_repeats_an_older_one_is_sent(llm, fake):
    history = [said("user"), said("assistant", "Sure?")]
    llm.generate("yes", messages=history)
    assert chat(fake) == [("user", "yes"), ("assistant", "Sure?"), ("user", "yes")]


# Media


def test_text_files_are_inlined_and_images_refused(llm, fake, tmp_path, monkeypatch):
    notes = tmp_path / "notes.md"
    notes.write_text("the sky is green")
    llm.generate("What colour?", files=[notes])
    assert chat(fake) == [("user", "File notes.md:\nthe sky is green\n\nWhat colour?")]
    image = tmp_path / "p.png"
    image.write_bytes(b"\x89PNG")
    with pytest.raises(exceptions.UnsupportedFeatureError, match="text models"):
        llm.generate("What is it?", files=[image])
    with pytest.raises(exceptions.FileProcessingError):
        llm.generate("x", files=[tmp_path / "none.txt"])
    with pytest.raises(exceptions.UnsupportedFeatureError):
        llm.generate("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}])


def test_a_file_reference_is_inlined_once(llm, fake, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("the sky is green")
    llm.generate(f"What colour? @{notes}")
    assert chat(fake)[0][1].count("the sky is green") == 1
    Session(provider=llm, enable_memory=False).generate(f"What colour? @{notes}")
    assert len(chat(fake)) == 1
    assert chat(fake)[0][1].count("the sky is green") == 1


# Session


def test_a_session_sends_each_message_once(llm, fake):
    session = Session(system_prompt="Be brief.", provider=llm, enable_memory=False)
    assert session.generate("Where?").content == PARIS
    session.generate("And then?")
    assert chat(fake) == [
        ("system", "Be brief."),
        ("user", "Where?"),
        ("assistant", PARIS),
        ("user", "And then?"),
    ]


def test_a_call_may_override_the_sessions_system_prompt(llm, fake):
    session = Session(system_prompt="Be brief.", provider=llm, enable_memory=False)
    session.generate("Where?", system_prompt="Be long.")
    assert chat(fake)[0] == ("system", "Be long.")


def test_a_session_streams(llm, fake):
    session = Session(provider=llm, enable_memory=False)
    text = "".join(
        chunk if isinstance(chunk, str) else chunk.content or ""
        for chunk in session.generate("Where?", stream=True)
    )
    assert text.strip() == PARIS
    assert [message.content for message in session.messages] == ["Where?", PARIS]


def test_a_session_with_memory_works(llm, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Session(provider=llm, enable_memory=True)
    assert session.generate("Where?").content == PARIS
    assert [role for role, _ in chat(fake)][-1] == "user"
    session.generate("And then?")
    assert PARIS in chat(fake)[-1][1]
    assert "GenerateResponse" not in str(chat(fake)), "memory remembers the text of an answer"


def test_a_saved_session_finds_its_provider_again(llm, fake, tmp_path):
    llm.set_config(api_key="secret", temperature=0.5)
    session = Session(provider=llm, enable_memory=False)
    session.generate("Where?")
    path = tmp_path / "session.json"
    session.save(str(path))
    assert "secret" not in path.read_text()
    assert json.loads(path.read_text())["provider_state"]["provider_name"] == "mlxd"
    again = Session.load(str(path))
    again.generate("And then?")
    assert chat(fake)[0] == ("user", "Where?")
    assert fake.requests[-1].sampling.temperature == 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_can_store_what_was_sent(llm, fake, caplog, stream):
    logger = logging.getLogger("abstractllm.session")
    logger.addHandler(caplog.handler)
    llm.set_config(api_key="secret")
    session = Session(system_prompt="Be brief.", provider=llm, enable_memory=False)
    answer = session.generate("Where?", stream=stream)
    if stream:
        list(answer)
    logger.removeHandler(caplog.handler)
    assert "Failed to capture" not in caplog.text
    captured = llm.get_last_verbatim_context()["context"]
    assert captured.startswith("ENDPOINT: unix://")
    assert '"content": "Where?"' in captured
    assert "secret" not in captured


# Tools


def told_the_result(fake):
    """Whether the last message is the tool's: its role differs between AbstractLLM's versions."""
    role, text = chat(fake)[-1]
    return role in ("user", "tool") and text.endswith("5")


@pytest.mark.parametrize("native", [True, False])
def test_tools_reach_the_model_by_template_or_by_prompt(llm, fake, native):
    if native:
        fake.features.append(server_pb2.FEATURE_TOOLS)
    fake.answers = [CALL]
    response = llm.generate("2 + 3?", system_prompt="Be brief.", tools=[add])
    request = fake.requests[-1]
    system = chat(fake)[0][1]
    if native:
        assert request.chat.tools[0].name == "add"
        assert json.loads(request.chat.tools[0].parameters_json)["required"] == ["a", "b"]
        assert system == "Be brief."
    else:
        assert not request.chat.tools
        assert system.startswith("Be brief.")
        assert "Adds two numbers." in system
    assert response.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in response.tool_calls] == [
        ("add", {"a": 2, "b": 3})
    ]


def test_what_the_daemon_leaves_in_the_text_of_a_form_that_it_knows_is_no_call(llm, fake):
    fake.features += [server_pb2.FEATURE_TOOLS, server_pb2.FEATURE_TOOL_CALLS]
    fake.answers = [CALL]
    response = llm.generate("2 + 3?", tools=[add])
    assert (response.content, response.tool_calls, response.finish_reason) == (CALL, None, "stop")


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_prompt_with_tools_keeps_the_conversations_system_message(llm, fake, system_prompt):
    history = [said("system", "Be brief. You are a tax adviser."), said("user", "2 + 3?")]
    llm.generate("2 + 3?", messages=history, system_prompt=system_prompt, tools=[add])
    role, text = chat(fake)[0]
    assert (role, chat(fake)[1:]) == ("system", [("user", "2 + 3?")])
    assert text.startswith("Be brief. You are a tax adviser.\n\n")
    assert text.count("Available tools:") == 1


def test_without_tool_calls_they_are_none(llm):
    response = llm.generate("2 + 3?", tools=[add])
    assert response.tool_calls is None
    assert response.finish_reason == "stop"
    assert llm.generate("x", tools=[add], tool_choice="none").content == PARIS


def test_a_tool_choice_is_the_daemons(llm, fake):
    fake.features.append(server_pb2.FEATURE_TOOLS)
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        llm.generate("2 + 3?", tools=[add], tool_choice=choice)
        sent = fake.requests[-1].chat
        assert [tool.name for tool in sent.tools] == ["add"]
        assert sent.tool_choice.WhichOneof("choice") == (
            "mode" if choice == "required" else "function"
        )
    with pytest.raises(exceptions.UnsupportedFeatureError, match="tool_choice"):
        llm.generate("2 + 3?", tool_choice="required")


def test_a_streamed_answer_keeps_its_markup(llm, fake):
    fake.answers = [CALL]
    chunks = list(llm.generate("2 + 3?", tools=[add], stream=True))
    assert "".join(chunk.content for chunk in chunks) == CALL
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_sessions_tool_loop_ends(llm, fake, tmp_path, monkeypatch):
    # With memory on: without it, AbstractLLM itself fails with "No active cycle".
    monkeypatch.chdir(tmp_path)
    called = []

    def note(a: int, b: int) -> int:
        """Adds two numbers."""
        called.append((a, b))
        return a + b

    note.__name__ = "add"
    fake.answers = [CALL, "It is 5."]
    session = Session(provider=llm, enable_memory=True, tools=[note])
    assert "5" in session.generate("2 + 3?").content
    assert called == [(2, 3)]
    assert told_the_result(fake)


def test_a_sessions_streamed_tool_loop_ends(llm, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake.answers = [CALL, "It is 5."]
    session = Session(provider=llm, enable_memory=False, tools=[add])
    chunks = list(session.generate("2 + 3?", stream=True))
    text = "".join(chunk if isinstance(chunk, str) else chunk.content or "" for chunk in chunks)
    assert "It is 5." in text
    assert told_the_result(fake)
