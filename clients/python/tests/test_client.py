import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import pytest
from fake import LOAD, MODEL, PARIS, Fake, server

import mlxd
from mlxd import types
from mlxd.v1 import inference_pb2 as pb


def test_generate_returns_the_outcome(client, fake):
    done = client.generate(model=MODEL, prompt="one two", return_token_ids=True)
    assert (done.text, done.finish_reason, done.request_id) == (PARIS, "stop", "r-1")
    assert (done.prompt_tokens, done.cached_tokens, done.completion_tokens) == (2, 0, 6)
    assert (done.token_ids, done.session_token_count) == ((1, 2), None)
    assert done.time_to_first_token == 0.025
    assert done.tokens_per_second == pytest.approx(50)


def test_an_answer_above_grpcs_own_limit_arrives(client, fake):
    fake.answer = "x" * (5 << 20)
    assert len(client.generate(model=MODEL, prompt="a").text) == 5 << 20
    assert len(client.stream(model=MODEL, prompt="a").result().text) == 5 << 20


def test_options_reach_their_fields_and_none_is_unset(client, fake):
    client.generate(
        model=MODEL,
        prompt="x",
        temperature=0,
        top_p=None,
        top_k=3,
        logit_bias={5: -1.0},
        max_tokens=8,
        stop="END",
        stop_token_ids=[2],
        logprobs=0,
        ignore_eos=True,
    )
    request = fake.requests[-1]
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0
    assert not request.sampling.HasField("top_p")
    assert (request.sampling.top_k, dict(request.sampling.logit_bias)) == (3, {5: -1.0})
    assert (request.stopping.max_tokens, list(request.stopping.stop_strings)) == (8, ["END"])
    assert list(request.stopping.stop_token_ids) == [2]
    assert request.stopping.ignore_eos
    assert request.output.HasField("logprobs")


def test_messages_are_text_dicts_or_protos(client, fake):
    client.chat("hello", model=MODEL)
    assert fake.requests[-1].chat.messages[0].role == pb.ROLE_USER
    tool = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "be brief"},
        pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text="sum")]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "1"}], "tool_call_id": "c1"},
    ]
    client.chat(messages, model=MODEL, tools=[{"function": tool}], template_arguments={"t": True})
    chat = fake.requests[-1].chat
    assert [m.role for m in chat.messages] == [1, 2, 3, 4]
    assert chat.messages[2].tool_calls[0].arguments_json == '{"a": 1}'
    assert chat.messages[3].content[0].text == "1"
    assert chat.tools[0].parameters_json == '{"type": "object"}'
    assert chat.template_arguments["t"] is True


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": "x", "top_k": -1}, "sampling.top_k"),
        ({"prompt": "x", "seed": 2**64}, "sampling.seed"),
        ({"prompt": "x", "temperature": "warm"}, "sampling.temperature"),
        ({"prompt": "x", "logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ({"prompt": "x", "stop": [3]}, "stopping.stop_strings"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"messages": [{"role": "king", "content": "x"}]}, "chat.messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "chat.messages[0].content"),
        ({"messages": [{"role": "user", "image": "x"}]}, "chat.messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "chat.messages[0].content[0]",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused_before_the_call(client, fake, arguments, field):
    with pytest.raises(mlxd.InvalidRequestError) as caught:
        client.generate(model=MODEL, **arguments)
    assert caught.value.field_violations[0].field == field
    assert fake.requests == []


def test_misuse_is_a_type_error(client):
    with pytest.raises(TypeError, match="exactly one of prompt"):
        client.generate(model=MODEL)
    with pytest.raises(TypeError, match="temprature"):
        client.generate(model=MODEL, prompt="x", temprature=1)
    with pytest.raises(TypeError, match="deadline"):
        client.stats(deadline=1)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("count_tokens", {"model": MODEL, "prompt": "x"}),
        ("score", {"model": MODEL, "text": "x"}),
        ("load_model", {"model": MODEL}),
        ("validate_model", {"model": MODEL}),
        ("list_models", {}),
        ("session", {"model": MODEL}),
        ("create_session", {"model": MODEL}),
        ("stats", {}),
    ],
)
def test_an_option_that_a_call_would_drop_is_a_type_error(client, fake, call, arguments):
    method = getattr(client, call)
    others = {"temperature", "keep_alive", "tools", "validate_only", "pin"}
    for option in others - inspect.signature(method).parameters.keys():
        with pytest.raises(TypeError, match=option):
            method(**arguments, **{option: 1})
    assert fake.requests == []


def test_an_empty_input_is_the_daemons_to_refuse(client, fake):
    client.generate(model=MODEL, prompt="")
    assert fake.requests[-1].WhichOneof("input") == "prompt"
    client.generate(model=MODEL, messages=[])
    assert fake.requests[-1].WhichOneof("input") == "chat"
    client.generate(model=MODEL, token_ids=[])
    assert fake.requests[-1].WhichOneof("input") == "token_ids"


def test_a_streams_deltas_concatenate_to_the_output(client):
    with client.stream(model=MODEL, messages="x") as stream:
        events = list(stream)
    kinds = [type(event) for event in events]
    assert kinds[:2] == [types.GenerateStarted, types.PrefillProgress]
    assert kinds[-1] is types.GenerateFinished
    stream = client.stream(model=MODEL, messages="x")
    assert "".join(stream.text()) == PARIS
    assert stream.result().text == PARIS


@pytest.mark.parametrize("leave", ["close", "with", "collect"])
def test_leaving_a_stream_cancels_its_call(client, fake, leave):
    fake.hang = True
    stream = client.stream(model=MODEL, messages="x")
    for event in stream:
        if isinstance(event, types.GenerateDelta):
            break
    assert not fake.left.is_set()
    if leave == "close":
        stream.close()
    elif leave == "with":
        with stream:
            pass
    else:
        del stream, event
        gc.collect()
    assert fake.left.wait(5)


def test_a_closed_stream_raises_cancelled(client, fake):
    stream = client.stream(model=MODEL, messages="x")
    next(stream)
    stream.close()
    with pytest.raises(mlxd.CancelledCallError):
        stream.result()


@pytest.mark.parametrize("work", ["stream", "generate"])
def test_closing_the_client_ends_its_calls(address, fake, work):
    fake.hang = True
    client = mlxd.Client(address, timeout=10)
    with ThreadPoolExecutor(1) as pool:
        if work == "stream":
            answer = pool.submit(client.stream(model=MODEL, messages="x").result)
        else:
            answer = pool.submit(client.generate, model=MODEL, prompt="x")
        assert fake.hangs.wait(5)
        client.close()
        with pytest.raises(mlxd.CancelledCallError):
            answer.result(5)


def test_metadata_names_request_and_client_and_carries_the_token():
    fake = Fake()
    running, port = server(fake, "127.0.0.1:0")
    address = f"http://127.0.0.1:{port}"
    extra = [("traceparent", "00-1")]
    with mlxd.Client(address, token="t0\n", client_name="me", metadata=extra) as client:
        client.stats(request_id="mine")
    running.stop(None)
    metadata = fake.metadata[-1]
    assert metadata["authorization"] == "Bearer t0"
    assert metadata["x-mlxd-client"] == "me"
    assert metadata["x-request-id"] == "mine"
    assert metadata["traceparent"] == "00-1"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"token": "se\ncret"}, "token"),
        ({"client_name": "m\u00e9"}, "client_name"),
        ({"metadata": [("traceparent", "\t")]}, "traceparent"),
    ],
)
def test_what_a_header_cannot_carry_is_refused_unseen(address, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        mlxd.Client(address, **options)
    assert "cret" not in str(caught.value)


def test_a_request_id_that_a_header_cannot_carry_is_refused(client, fake):
    with pytest.raises(ValueError, match="request_id"):
        client.stats(request_id="a\nb")
    assert fake.requests == []


def test_model_calls_load_unload_describe_and_list(client, fake):
    seen = []
    info = client.load_model(
        MODEL,
        compute_dtype="float32",
        kv_dtype="int8",
        quantize={"bits": 3, "group_size": 32},
        keep_alive=-1,
        pin=False,
        on_progress=seen.append,
    )
    assert info.name == MODEL
    assert [(step.phase, step.done_bytes, step.total_bytes) for step in seen] == LOAD
    asked = fake.requests[-1]
    assert (asked.compute_dtype, asked.kv_dtype) == (1, 2)
    assert (asked.quantize.bits, asked.quantize.group_size) == (3, 32)
    assert (asked.keep_alive.seconds, asked.HasField("pin"), asked.pin) == (-1, True, False)
    client.generate(prompt="a", model=MODEL, keep_alive=1.5)
    assert fake.requests[-1].keep_alive.ToMilliseconds() == 1500
    client.score(text="a", model=MODEL, keep_alive=0)
    assert fake.requests[-1].HasField("keep_alive")
    assert fake.requests[-1].keep_alive.ToMilliseconds() == 0
    assert client.validate_model(MODEL).fits
    assert client.unload_model(MODEL) == 538
    assert client.get_model("m").name == "m"
    assert [model.name for model in client.list_models()] == [MODEL, "other"]
    with pytest.raises(mlxd.InvalidRequestError):
        client.load_model(MODEL, compute_dtype="int3")
    with pytest.raises(mlxd.InvalidRequestError, match="quant_recipe"):
        client.load_model(MODEL, quantize={"recipe": "mixed_1_2"})
    client.validate_model(MODEL, quantize={"mode": "mxfp4", "recipe": "mixed_3_6"})
    assert (fake.requests[-1].quantize.mode, fake.requests[-1].quantize.recipe) == (2, 3)
    with pytest.raises(mlxd.InvalidRequestError):
        client.list_models(page_size=-1)


def test_counts_scores_capabilities_and_stats_are_returned(client, fake):
    assert client.count_tokens(model=MODEL, messages="one two three").token_count == 3
    assert client.count_tokens(model=MODEL, prompt="one").context_length == 8192
    assert client.score(model=MODEL, text="a", top_logprobs=2).tokens[0].token.token_id == 7
    assert fake.requests[-1].top_logprobs == 2
    assert client.capabilities(MODEL, "b").models[1].model.name == "b"
    assert client.stats().memory.weight_bytes == 538_000_000


def test_a_session_runs_forks_truncates_and_deletes(client, fake):
    session = client.session("talk", model=MODEL, ttl=60)
    assert fake.requests[-1].ttl.seconds == 60
    first = session.generate("What is it?")
    assert first.session_token_count == session.token_count == 9
    with session.stream("And then?", expected_token_count=session.token_count) as stream:
        second = stream.result()
    assert second.cached_tokens == 9
    assert session.token_count == second.session_token_count == 17
    copy = session.fork("copy")
    assert (copy.name, copy.model, copy.token_count) == ("copy", MODEL, 17)
    assert session.truncate(turns=1).token_count == session.token_count == 9
    assert [message.role for message in session.messages()] == [pb.ROLE_USER, pb.ROLE_ASSISTANT]
    assert [info.name for info in client.list_sessions()] == ["talk", "copy"]
    with pytest.raises(mlxd.SessionMovedError) as caught:
        session.generate("late", expected_token_count=17)
    assert (caught.value.expected, caught.value.actual) == (17, 9)
    copy.delete()
    assert list(fake.sessions) == ["talk"]


def test_sessions_are_labelled_pinned_and_found_again(client, fake):
    talk = client.session("talk", model=MODEL, labels={"project": "a", "kind": "chat"})
    client.create_session("other", model=MODEL, pinned=True)
    assert fake.requests[-1].pinned
    end = datetime(2030, 1, 2, tzinfo=timezone.utc)
    client.create_session("until", model=MODEL, expire_time=end)
    assert fake.requests[-1].expire_time.ToDatetime(timezone.utc) == end
    changed = talk.update(labels={"kind": "test"}, remove_labels=["project"], pinned=True, ttl=5)
    assert (dict(changed.labels), changed.pinned) == ({"kind": "test"}, True)
    assert fake.requests[-1].ttl.seconds == 5
    found = client.list_sessions(labels={"kind": "test"}, name_prefix="t", pinned=True)
    assert [info.name for info in found] == ["talk"]
    assert (fake.requests[-1].name_prefix, fake.requests[-1].pinned) == ("t", True)
    talk.fork("part", turns=0, pinned=False)
    assert fake.requests[-1].HasField("turn_count")
    assert fake.requests[-1].HasField("pinned")
    with pytest.raises(TypeError, match="ttl, expire_time"):
        talk.update(ttl=1, expire_time=end)
    with pytest.raises(mlxd.InvalidRequestError, match="time zone"):
        talk.update(expire_time=datetime(2030, 1, 2))
    with pytest.raises(mlxd.InvalidRequestError):
        talk.update(labels={"a": 1})


def test_a_session_is_saved(client, fake):
    talk = client.session("talk", model=MODEL)
    talk.extend("a b c")
    saved = talk.save(expected_token_count=3)
    assert (saved.token_count, saved.bytes, saved.session.name) == (3, 9, "talk")
    assert fake.requests[-1].expected_token_count == 3
    assert client.save_session("talk").token_count == 3
    assert not fake.requests[-1].HasField("expected_token_count")


def test_a_session_is_extended_without_an_answer(client, fake):
    talk = client.session("talk", model=MODEL)
    extended = talk.extend("a b c", priority="background", keep_alive=5)
    assert (extended.usage.prompt_tokens, extended.usage.cached_tokens) == (3, 0)
    assert fake.requests[-1].priority == pb.PRIORITY_BACKGROUND
    assert not fake.requests[-1].chat.HasField("add_generation_prompt")
    assert talk.extend(token_ids=[1, 2], expected_token_count=3).usage.cached_tokens == 3
    assert client.extend_session("talk", prompt="x").session.token_count == 6
    assert talk.token_count == 5
    for inputs in ({}, {"prompt": "x", "token_ids": [1]}, {"prompt": "x", "tools": []}):
        with pytest.raises(TypeError):
            talk.extend(**inputs)
    client.chat("x", model=MODEL, add_generation_prompt=False)
    assert fake.requests[-1].chat.HasField("add_generation_prompt")
    with pytest.raises(TypeError, match="belong to messages"):
        client.generate(model=MODEL, prompt="x", add_generation_prompt=True)


def test_session_opens_what_exists_and_create_does_not(client):
    client.session("talk", model=MODEL).generate("x")
    assert client.session("talk", model=MODEL).token_count == 7
    with pytest.raises(mlxd.AlreadyExistsError):
        client.create_session("talk", model=MODEL)
    with pytest.raises(TypeError, match="turns, tokens, messages"):
        client.truncate_session("talk")


def test_a_session_of_another_model_is_refused(client):
    client.session("talk", model=MODEL)
    with pytest.raises(mlxd.StateError, match="bound to the model") as caught:
        client.session("talk", model="other")
    assert caught.value.reason == "SESSION_WRONG_MODEL"
    assert caught.value.metadata == {"session": "talk", "model": MODEL}


def test_history_reaches_the_session_and_its_turns_and_comes_back(client, fake):
    session = client.create_session("h", model=MODEL, history="append")
    assert fake.requests[-1].history == 2
    assert session.generate("x").history is None
    assert session.generate("x", history="append").history == "appended"
    with session.stream("x", history="rerender") as stream:
        assert stream.result().history == "rerendered"
    with pytest.raises(mlxd.InvalidRequestError, match="history"):
        session.generate("x", history="forget")


def test_the_switches_of_the_cache_reach_the_request(client, fake):
    client.generate(model=MODEL, prompt="x")
    assert not fake.requests[-1].HasField("cache")
    client.generate(model=MODEL, prompt="x", cache=False)
    assert (fake.requests[-1].cache.off, fake.requests[-1].cache.salt) == (True, "")
    client.generate(model=MODEL, prompt="x", cache_salt="tenant")
    assert (fake.requests[-1].cache.off, fake.requests[-1].cache.salt) == (False, "tenant")
    client.score(model=MODEL, text="x", cache_salt="tenant")
    assert fake.requests[-1].cache.salt == "tenant"
    client.create_session(model=MODEL, cache_salt="tenant")
    assert fake.requests[-1].cache_salt == "tenant"


def test_typical_p_and_dry_reach_the_request(client, fake):
    client.generate(model=MODEL, prompt="x", typical_p=0.5, dry_multiplier=0.75, dry_base=2.0)
    sampling = fake.requests[-1].sampling
    assert (sampling.typical_p, sampling.dry_multiplier, sampling.dry_base) == (0.5, 0.75, 2.0)
    assert not sampling.HasField("dry_sequence_breakers")
    assert not sampling.HasField("dry_allowed_length")
    client.generate(model=MODEL, prompt="x", dry_sequence_breakers=["a", "b"])
    assert list(fake.requests[-1].sampling.dry_sequence_breakers.texts) == ["a", "b"]
    client.generate(model=MODEL, prompt="x", dry_sequence_breakers=[])
    assert fake.requests[-1].sampling.HasField("dry_sequence_breakers")


def test_a_last_message_can_be_continued_and_control_tokens_allowed(client, fake):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "and "}]
    client.generate(model=MODEL, messages=messages, continue_final_message=True)
    chat = fake.requests[-1].chat
    assert chat.continue_final_message
    assert not chat.allow_control_tokens
    assert not chat.HasField("add_generation_prompt")
    client.count_tokens(model=MODEL, messages=messages, continue_final_message=True)
    assert fake.requests[-1].chat.continue_final_message
    client.generate(model=MODEL, messages="x", allow_control_tokens=True)
    assert fake.requests[-1].chat.allow_control_tokens
    with pytest.raises(TypeError, match="continue_final_message"):
        client.generate(model=MODEL, prompt="x", continue_final_message=True)


def test_a_conversation_can_be_scored(client, fake):
    client.score(model=MODEL, messages="x", continue_final_message=True)
    request = fake.requests[-1]
    assert request.chat.messages[0].content[0].text == "x"
    assert request.chat.continue_final_message
    with pytest.raises(TypeError, match="belong to messages"):
        client.score(model=MODEL, text="x", add_generation_prompt=True)
    with pytest.raises(TypeError, match="exactly one"):
        client.score(model=MODEL, text="x", messages="x")


def test_several_outputs_come_apart_streamed_or_not(client, fake):
    fake.answer = "a b"
    whole = client.generate(model=MODEL, prompt="x", n=3)
    assert fake.requests[-1].n == 3
    assert not fake.requests[-1].HasField("best_of")
    streamed = client.stream(model=MODEL, prompt="x", n=3, best_of=4).result()
    assert fake.requests[-1].best_of == 4
    for outcome in (whole, streamed):
        assert outcome.text == "a b"
        assert [choice.text for choice in outcome.choices] == ["a b", "a b 1", "a b 2"]
        assert [choice.seed for choice in outcome.choices] == [7, 8, 9]
        assert {choice.finish_reason for choice in outcome.choices} == {"length"}
        assert outcome.choices[0].mean_logprob is None
    assert client.generate(model=MODEL, prompt="x").choices == ()
    assert "".join(client.stream(model=MODEL, prompt="x", n=2).text()) == "a b"


def test_mirostat_is_refused_by_name(client, fake):
    before = len(fake.requests)
    for name in ("mirostat", "mirostat_tau"):
        with pytest.raises(mlxd.InvalidRequestError, match=name):
            client.generate(model=MODEL, prompt="x", **{name: 2})
    assert len(fake.requests) == before
    client.generate(model=MODEL, prompt="x", mirostat=None)


def test_priority_and_xtc_reach_the_request(client, fake):
    client.generate(model=MODEL, prompt="x", priority="background", xtc_probability=0.5)
    request = fake.requests[-1]
    assert request.priority == 3
    assert request.sampling.xtc_probability == 0.5
    assert not request.sampling.HasField("xtc_threshold")
    with pytest.raises(mlxd.InvalidRequestError, match="priority"):
        client.generate(model=MODEL, prompt="x", priority="urgent")
    client.score(model=MODEL, text="x", priority="background")
    assert fake.requests[-1].priority == 3
    client.score(model=MODEL, text="x")
    assert fake.requests[-1].priority == 0
