"""The connection to a daemon and the calls on it; `_sessions` adds those about sessions."""

from __future__ import annotations

import asyncio  # async only
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from typing_extensions import Self, Unpack

from mlxd import _convert as convert
from mlxd._address import default_address, find_token, parse
from mlxd._cancel import closed, task_is_cancelled  # async only
from mlxd._channel import AioLink, Stubs, call_metadata
from mlxd._deadline import Deadline
from mlxd._outcome import completion_of
from mlxd.aio._stream import AsyncGenerateStream, AsyncStream
from mlxd.errors import ServerError, from_call
from mlxd.types import (
    CallOptions,
    CapabilitiesResponse,
    Completion,
    ComputeDtype,
    CountTokensResponse,
    GenerateOptions,
    GetStatsResponse,
    KvDtype,
    LoadEvent,
    LoadProgress,
    LoadValidated,
    Messages,
    ModelInfo,
    ModelLoaded,
    Priority,
    Quantize,
    ScoreResponse,
    ToolChoice,
    ToolFormat,
)
from mlxd.v1 import model_pb2, server_pb2


class AsyncConnection:
    """A connection to the daemon, and the calls on it that are not about sessions."""

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        client_name: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        found = find_token(token, token_file)
        self.address = os.fspath(address or default_address())
        self.timeout = timeout
        target = parse(address or self.address, token=found)
        self._link = AioLink(target, call_metadata(found, client_name, metadata))

    @property
    def _stubs(self) -> Stubs:
        return self._link.stubs()

    async def close(self) -> None:
        """Closes the connection. Calls that run on it raise CancelledCallError."""
        await self._link.close()

    def _drop(self) -> None:  # async only
        """Lets go of the connections of every event loop, from outside of them."""
        self._link.drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _deadline(self, options: CallOptions) -> Deadline:
        """Returns the end of a call that sends several requests."""
        timeout = options.get("timeout")
        return Deadline(self.timeout if timeout is None else timeout)

    def _start(self, method: Any, request: Any, options: Mapping[str, Any]) -> Any:
        convert.check_names(options, convert.CALL_OPTIONS)
        timeout = options.get("timeout")
        return method(
            request,
            timeout=self.timeout if timeout is None else timeout,
            metadata=self._stubs.metadata(options.get("request_id")),
        )

    async def _call(self, method: Any, request: Any, options: Mapping[str, Any]) -> Any:
        stubs = self._stubs  # async only
        try:
            return await self._start(method, request, options)
        except grpc.RpcError as error:
            raise from_call(error, options.get("request_id") or "", self.address) from error
        except asyncio.CancelledError:  # async only
            if stubs.closed and not task_is_cancelled():
                raise closed("client", options.get("request_id")) from None
            raise

    # Generation

    async def generate(
        self,
        *,
        model: str = "",
        prompt: str | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        session: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Runs one generation to its end.

        Args:
            model: the model's name; empty with a session, which is bound to one.
            prompt: raw text. Exactly one of prompt, messages and token_ids must be given.
            messages: a conversation; in a session, only its new messages.
            token_ids: a tokenized prompt.
            session: name of the session in which this is a turn.
            options: sampling, stopping and output options, and those of every call.

        Raises:
            TypeError: an unknown option, or not exactly one input.
            MlxdError: the call failed; the subclass tells what the caller can do.
        """
        request = convert.generate_request(
            model=model,
            session=session,
            prompt=prompt,
            messages=messages,
            token_ids=token_ids,
            options=options,
        )
        response = await self._call(
            self._stubs.inference.Generate, request, convert.call_options(options)
        )
        return completion_of(response)

    def stream(
        self,
        *,
        model: str = "",
        prompt: str | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        session: str = "",
        on_end: Callable[[Completion], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateStream:
        """Starts a generation and returns an iterator over its events.

        Takes what `generate` takes. `on_end` receives the outcome with the last event. A failed
        call raises from the iterator.
        """
        request = convert.generate_request(
            model=model,
            session=session,
            prompt=prompt,
            messages=messages,
            token_ids=token_ids,
            options=options,
        )
        call = self._start(
            self._stubs.inference.StreamGenerate, request, convert.call_options(options)
        )
        stream = AsyncGenerateStream(call, options.get("request_id"), self.address, on_end)
        return self._stubs.hold(stream)

    async def chat(
        self, messages: Messages, *, model: str, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Answers a conversation; a plain string is one user message."""
        return await self.generate(model=model, messages=messages, **options)

    async def count_tokens(
        self,
        *,
        model: str,
        prompt: str | None = None,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        allow_control_tokens: bool | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        tool_format: ToolFormat | None = None,
        reasoning: bool | None = None,
        reasoning_effort: str | None = None,
        return_token_ids: bool = False,
        **options: Unpack[CallOptions],
    ) -> CountTokensResponse:
        """Renders and tokenizes an input as `generate` would, without running it."""
        request = convert.count_request(
            model=model,
            prompt=prompt,
            messages=messages,
            chat={
                "tools": tools,
                "template_arguments": template_arguments,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "allow_control_tokens": allow_control_tokens,
                "tool_choice": tool_choice,
                "parallel_tool_calls": parallel_tool_calls,
                "tool_format": tool_format,
            },
            reasoning=reasoning,
            reasoning_effort=reasoning_effort,
            return_token_ids=return_token_ids,
        )
        response: CountTokensResponse = await self._call(
            self._stubs.inference.CountTokens, request, options
        )
        return response

    async def score(
        self,
        *,
        model: str = "",
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        allow_control_tokens: bool | None = None,
        top_logprobs: int = 0,
        session: str = "",
        priority: Priority | None = None,
        cache: bool | None = None,
        cache_salt: str | None = None,
        keep_alive: float | None = None,
        **options: Unpack[CallOptions],
    ) -> ScoreResponse:
        """Computes the log-probability of every token of a text.

        Args:
            model: the model's name; empty with a session.
            text: the text. Exactly one of text, token_ids and messages must be given.
            token_ids: a tokenized text.
            messages: a conversation, written by the model's chat template; not in a session.
            tools: tools of the conversation.
            template_arguments: further variables of the template.
            add_generation_prompt: whether the text ends with what begins an answer; None is False.
            continue_final_message: whether it ends after the last message's content.
            allow_control_tokens: whether control tokens in the messages are such.
            top_logprobs: number of most likely alternatives to return for each token.
            session: name of the session whose tokens precede the text.
            priority: None is "normal", as of a generation.
            cache: False looks up no cached KV.
            cache_salt: only KV with the same salt is reused.
            keep_alive: seconds that the model stays after its last use; negative is forever, None
                leaves that as it is.
            options: options of the call.
        """
        request = convert.score_request(
            model=model,
            text=text,
            token_ids=token_ids,
            messages=messages,
            chat={
                "tools": tools,
                "template_arguments": template_arguments,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "allow_control_tokens": allow_control_tokens,
            },
            top_logprobs=top_logprobs,
            session=session,
            priority=priority,
            cache=cache,
            cache_salt=cache_salt,
            keep_alive=keep_alive,
        )
        response: ScoreResponse = await self._call(self._stubs.inference.Score, request, options)
        return response

    # Models

    async def load_model(
        self,
        model: str,
        *,
        compute_dtype: ComputeDtype | None = None,
        kv_dtype: KvDtype | None = None,
        quantize: Quantize | None = None,
        keep_alive: float | None = None,
        pin: bool | None = None,
        on_progress: Callable[[LoadProgress], object] | None = None,
        **options: Unpack[CallOptions],
    ) -> ModelInfo:
        """Loads a model and returns once it is resident.

        Args:
            model: a folder's name under a model root, or a Hugging Face repository id.
            compute_dtype: None is the daemon's policy.
            kv_dtype: element type of the KV cache; None is the daemon's setting.
            quantize: how matrices that are stored as floats are quantized while they are read.
            keep_alive: seconds that it stays after its last use; negative is forever, None
                leaves it as it is or as configured.
            pin: whether it is neither evicted nor unloaded with time; None leaves that as it is.
            on_progress: called with each LoadProgress event.
            options: options of the call.
        """
        convert.check_names(options, convert.CALL_OPTIONS)
        async with self.load_model_events(
            model,
            compute_dtype=compute_dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            keep_alive=keep_alive,
            pin=pin,
            **options,
        ) as events:
            async for event in events:
                if isinstance(event, ModelLoaded):
                    return event.model
                if isinstance(event, LoadProgress) and on_progress:
                    on_progress(event)
        raise ServerError("the load ended without `loaded`")

    def load_model_events(
        self,
        model: str,
        *,
        compute_dtype: ComputeDtype | None = None,
        kv_dtype: KvDtype | None = None,
        quantize: Quantize | None = None,
        keep_alive: float | None = None,
        pin: bool | None = None,
        validate_only: bool = False,
        **options: Unpack[CallOptions],
    ) -> AsyncStream[LoadEvent]:
        """Returns the events of a load: progress, then one ModelLoaded (or LoadValidated)."""
        request = convert.request(
            model_pb2.LoadModelRequest,
            model=model,
            validate_only=validate_only,
            compute_dtype=convert.compute_dtype(compute_dtype),
            kv_dtype=convert.kv_dtype(kv_dtype),
            quantize=convert.quantize(quantize),
            keep_alive=convert.duration(keep_alive, "keep_alive"),
            pin=pin,
        )
        call = self._start(self._stubs.model.LoadModel, request, options)
        stream: AsyncStream[LoadEvent] = AsyncStream(call, options.get("request_id"), self.address)
        return self._stubs.hold(stream)

    async def validate_model(
        self,
        model: str,
        *,
        compute_dtype: ComputeDtype | None = None,
        kv_dtype: KvDtype | None = None,
        quantize: Quantize | None = None,
        **options: Unpack[CallOptions],
    ) -> LoadValidated:
        """Tells whether a model would fit, without loading it."""
        convert.check_names(options, convert.CALL_OPTIONS)
        events = self.load_model_events(
            model,
            compute_dtype=compute_dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            validate_only=True,
            **options,
        )
        async with events:
            async for event in events:
                if isinstance(event, LoadValidated):
                    return event
        raise ServerError("the load ended without `validated`")

    async def unload_model(self, model: str, **options: Unpack[CallOptions]) -> int:
        """Unloads a resident model and returns the number of bytes freed."""
        request = convert.request(model_pb2.UnloadModelRequest, model=model)
        response = await self._call(self._stubs.model.UnloadModel, request, options)
        freed: int = response.freed_bytes
        return freed

    async def get_model(self, model: str, **options: Unpack[CallOptions]) -> ModelInfo:
        """Describes one model."""
        request = convert.request(model_pb2.GetModelRequest, model=model)
        response = await self._call(self._stubs.model.GetModel, request, options)
        info: ModelInfo = response.model
        return info

    async def list_models(
        self, *, resident_only: bool = False, page_size: int = 0, **options: Unpack[CallOptions]
    ) -> list[ModelInfo]:
        """Lists the models that are resident or can be loaded, reading every page.

        `page_size` is in models; 0 is the daemon's default.
        """
        models: list[ModelInfo] = []
        request = convert.request(
            model_pb2.ListModelsRequest, page_size=page_size, resident_only=resident_only
        )
        deadline = self._deadline(options)
        while True:
            options["timeout"] = deadline.left()
            page = await self._call(self._stubs.model.ListModels, request, options)
            models.extend(page.models)
            if not page.next_page_token:
                return models
            request.page_token = page.next_page_token

    # The daemon

    async def capabilities(
        self, *models: str, **options: Unpack[CallOptions]
    ) -> CapabilitiesResponse:
        """Describes the daemon and the named models, by default the resident ones."""
        request = convert.request(server_pb2.CapabilitiesRequest, models=models)
        response: CapabilitiesResponse = await self._call(
            self._stubs.server.Capabilities, request, options
        )
        return response

    async def stats(self, **options: Unpack[CallOptions]) -> GetStatsResponse:
        """Returns the daemon's counters and gauges."""
        request = convert.request(server_pb2.GetStatsRequest)
        response: GetStatsResponse = await self._call(self._stubs.server.GetStats, request, options)
        return response
