"""The provider. It stores no conversation: the daemon finds the cached prefix by itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from abstractllm.enums import ModelCapability, ModelParameter
from abstractllm.exceptions import ContextWindowExceededError, UnsupportedFeatureError
from abstractllm.providers.base import BaseProvider
from abstractllm.tools import ToolCall, UniversalToolHandler
from abstractllm.tools.parser import detect_tool_calls, parse_tool_calls
from abstractllm.types import GenerateResponse

import mlxd
from mlxd._record import CallParts
from mlxd.abstractllm.budget import Budget
from mlxd.abstractllm.errors import PROVIDER, mapped
from mlxd.abstractllm.messages import Conversation, conversation, is_text_file
from mlxd.abstractllm.parameters import Parameters, check, merge, plain
from mlxd.types import GenerateDelta, GenerateOptions, ModelCapabilities
from mlxd.v1.server_pb2 import (
    FEATURE_CHAT,
    FEATURE_SYSTEM_PROMPT,
    FEATURE_TOOL_CALLS,
    FEATURE_TOOLS,
)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Clients:
    """Both clients of one daemon; each connects at its first call."""

    address: str | None
    token: str | None
    sync: mlxd.Client
    aio: mlxd.AsyncClient


@dataclass(frozen=True)
class _Call:
    """A request, ready to send, and what it may still spend."""

    model: str
    messages: Conversation
    options: GenerateOptions
    has_calls_in_text: bool
    max_input_tokens: int | None
    budget: Budget


@dataclass(frozen=True)
class _Tools:
    """Tools, as text for the system message or as the model's template takes them.

    `has_calls_in_text` says that the daemon leaves the calls in the answer's text.
    """

    described: str | None = None
    definitions: list[dict[str, Any]] | None = None
    has_calls_in_text: bool = False


class _Response(GenerateResponse):
    """A response whose text is its content: Session's memory shows the model what `str` gives."""

    def __str__(self) -> str:
        return self.content or ""


class MlxdProvider(BaseProvider):
    """Generates through a running mlxd.

    Configuration: `model`; `base_url`, an address as `mlxd.Client` takes it (default: the daemon's
    default socket); `api_key`, the token, which TCP requires. Sampling parameters given here are
    defaults for calls. Parameters that cannot be honoured are refused.

    Each method takes at most `timeout` seconds, whatever it asks of the daemon. While the daemon's
    queue is full it tries again, as often as `max_retries` and `timeout` allow.
    """

    _tool_handler: UniversalToolHandler | None

    def __init__(self, config: dict[Any, Any] | None = None) -> None:
        super().__init__(config)
        check(self._configured())
        self._connected: _Clients | None = None

    def _configured(self) -> dict[str, Any]:
        return plain(self.config_manager.get_config())

    @property
    def config(self) -> dict[str, Any]:
        """The configuration by plain names, for Session.save: everything but the token."""
        return {key: value for key, value in self._configured().items() if key != "api_key"}

    def _clients(self) -> _Clients:
        given = self._configured()
        address, token = given.get("base_url"), given.get("api_key")
        address = str(address) if address else None
        found = self._connected
        if found is None or (found.address, found.token) != (address, token):
            self.close()
            sync = mlxd.Client(address, token=token)
            found = _Clients(address, token, sync, mlxd.AsyncClient(address, token=token))
            self._connected = found
        return found

    def close(self) -> None:
        """Closes the connections, those of asyncio too; the next call opens another."""
        found, self._connected = self._connected, None
        if found is not None:
            found.sync.close()
            found.aio._drop()

    def _ask(self, model: str, budget: Budget, ask: Callable[[float | None], Answer]) -> Answer:
        """Calls `ask` with the seconds left, again while the queue is full and budget is left."""
        with mapped(model):
            while True:
                try:
                    return ask(budget.left())
                except mlxd.CapacityError as error:
                    time.sleep(budget.pause(error))

    async def _ask_async(
        self, model: str, budget: Budget, ask: Callable[[float | None], Awaitable[Answer]]
    ) -> Answer:
        """As `_ask`."""
        with mapped(model):
            while True:
                try:
                    return await ask(budget.left())
                except mlxd.CapacityError as error:
                    await asyncio.sleep(budget.pause(error))

    # The model

    def _model(self) -> str:
        return str(self.get_param(ModelParameter.MODEL) or "")

    def _described(self, model: str, budget: Budget) -> ModelCapabilities:
        client, names = self._clients().sync, [model] if model else []
        found = self._ask(model, budget, lambda left: client.capabilities(*names, timeout=left))
        return found.models[0]

    def get_capabilities(self) -> dict[Any, Any]:
        """Returns the model's capabilities, as the daemon reports them.

        Raises:
            AbstractLLMError: no daemon answers, or the model is unknown.
        """
        described = self._described(self._model(), Budget.of(self._configured()))
        chat = FEATURE_CHAT in described.features
        return {
            ModelCapability.STREAMING: True,
            ModelCapability.ASYNC: True,
            ModelCapability.MAX_TOKENS: described.model.context_length,
            ModelCapability.SYSTEM_PROMPT: FEATURE_SYSTEM_PROMPT in described.features,
            ModelCapability.MULTI_TURN: chat,
            ModelCapability.FUNCTION_CALLING: chat,
            ModelCapability.TOOL_USE: chat,
            ModelCapability.PARALLEL_INFERENCE: True,
            ModelCapability.VISION: False,
            ModelCapability.JSON_MODE: False,
        }

    def get_model_limits(self) -> dict[str, int]:
        """Returns the model's limits in tokens, from the daemon, not from AbstractLLM's table."""
        described = self._described(self._model(), Budget.of(self._configured()))
        output = described.default_sampling.max_tokens or described.model.context_length
        return {"input": described.model.context_length, "output": output}

    def load_model(self) -> None:
        """Loads the model and returns once it is resident."""
        client, model = self._clients().sync, self._model()
        budget = Budget.of(self._configured())
        self._ask(model, budget, lambda left: client.load_model(model, timeout=left))

    def unload_model(self) -> None:
        """Unloads the model, for every client of the daemon."""
        client, model = self._clients().sync, self._model()
        budget = Budget.of(self._configured())
        self._ask(model, budget, lambda left: client.unload_model(model, timeout=left))

    # Preparing a call

    def _parse_file_references(self, text: str) -> tuple[str, list[str]]:
        """As the base, which inlines text files and also lists them as files: drops those."""
        cleaned, files = super()._parse_file_references(text)
        return cleaned, [path for path in files if not is_text_file(path)]

    def _expanded(self, text: str) -> str:
        return self._parse_file_references(text)[0]

    def _prepare(
        self,
        asked: Parameters,
        prompt: str | None,
        messages: list[Any] | None,
        files: list[str | Path] | None,
    ) -> _Call:
        tools = self._tool_context(asked)
        system = asked.system_prompt
        chat = conversation(prompt, system, messages, files, self._expanded, tools.described)
        options = asked.options
        if tools.definitions:
            options = {**options, "tools": tools.definitions}
        elif "tool_choice" in options:
            text = "tool_choice needs tools that the model's chat template takes"
            raise UnsupportedFeatureError("tool_choice", message=text, provider=PROVIDER)
        in_text, limit = tools.has_calls_in_text, asked.max_input_tokens
        call = _Call(asked.model, chat, options, in_text, limit, asked.budget)
        self._capture_verbatim_context(self._verbatim(call))
        return call

    def _verbatim(self, call: _Call) -> str:
        """Shows what is sent, as Session stores it beside its interactions."""
        shown = json.dumps(_generated(call), indent=2, ensure_ascii=False, default=str)
        return f"ENDPOINT: {self._clients().sync.address}\n\nREQUEST PAYLOAD:\n{shown}"

    def _tool_context(self, asked: Parameters) -> _Tools:
        """Returns the tools, as the base's `_prepare_tool_context`, within the call's budget."""
        if asked.tools is None:
            return _Tools()
        features = self._described(asked.model, asked.budget).features
        if FEATURE_CHAT not in features:
            text = f"the model {asked.model} has no chat template"
            raise UnsupportedFeatureError("tools", message=text, provider=PROVIDER)
        handler = self._tool_handler
        if handler is None or handler.model_name != asked.model:
            handler = self._tool_handler = UniversalToolHandler(asked.model)
        handler.supports_native = FEATURE_TOOLS in features
        tools = self._process_tools(asked.tools)
        if handler.supports_native:
            definitions = handler.prepare_tools_for_native(tools)
            definitions = self._format_tools_for_provider(definitions)
            in_text = FEATURE_TOOL_CALLS not in features
            return _Tools(definitions=definitions, has_calls_in_text=in_text)
        return _Tools(described=handler.format_tools_prompt(tools), has_calls_in_text=True)

    def _response(self, call: _Call, done: mlxd.Completion, content: str) -> GenerateResponse:
        found = _tool_calls(content) if call.has_calls_in_text else _called(done)
        reason = "stop" if done.finish_reason == "stop_string" else done.finish_reason
        return _Response(
            content=content,
            raw_response=done,
            usage={
                "prompt_tokens": done.prompt_tokens,
                "completion_tokens": done.completion_tokens,
                "total_tokens": done.prompt_tokens + done.completion_tokens,
                "cached_tokens": done.cached_tokens,
            },
            model=call.model,
            finish_reason="tool_calls" if found else reason,
            tool_calls=found,
            reasoning_trace=done.reasoning or None,
        )

    # Calls

    def _generate_impl(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        files: list[str | Path] | None = None,
        stream: bool = False,
        tools: list[Any] | None = None,
        **kwargs: Any,
    ) -> GenerateResponse | Generator[GenerateResponse, None, None]:
        messages = kwargs.pop("messages", None)
        asked = merge(self.config_manager.get_config(), kwargs, system_prompt, tools)
        call = self._prepare(asked, prompt, messages, files)
        client = self._clients().sync
        if call.max_input_tokens is not None:
            counted = self._ask(
                call.model,
                call.budget,
                lambda left: client.count_tokens(**_counted(call), timeout=left),
            )
            _check_input(call.max_input_tokens, counted.token_count)
        if stream:
            return self._stream(call)
        done = self._ask(
            call.model, call.budget, lambda left: client.generate(**_generated(call), timeout=left)
        )
        return self._response(call, done, done.text)

    def _stream(self, call: _Call) -> Generator[GenerateResponse, None, None]:
        client, begun = self._clients().sync, False
        with mapped(call.model):
            while True:
                try:
                    with client.stream(**_generated(call), timeout=call.budget.left()) as events:
                        calls = CallParts()
                        for event in events:
                            begun = True
                            if isinstance(event, GenerateDelta) and (text := _shown(event, calls)):
                                yield _chunk(call, event, text)
                        done = events.result()
                    break
                except mlxd.CapacityError as error:
                    if begun:
                        raise
                    time.sleep(call.budget.pause(error))
        yield self._last(call, done)

    def _last(self, call: _Call, done: mlxd.Completion) -> GenerateResponse:
        """Makes the last chunk. It has no text: Session finds tool calls in the streamed text."""
        last = self._response(call, done, done.text)
        last.content, last.tool_calls = "", None
        return last

    async def generate_async(
        self,
        prompt: str | None = None,
        system_prompt: str | None = None,
        files: list[str | Path] | None = None,
        stream: bool = False,
        tools: list[Any] | None = None,
        **kwargs: Any,
    ) -> GenerateResponse | AsyncGenerator[GenerateResponse, None]:
        """As `generate`, without blocking the event loop."""
        messages = kwargs.pop("messages", None)
        asked = merge(self.config_manager.get_config(), kwargs, system_prompt, tools)
        if prompt:
            prompt, named = self._parse_file_references(prompt)
            files = [*(files or []), *named]
        # Reads files, and may ask the daemon about the model.
        call = await asyncio.to_thread(self._prepare, asked, prompt, messages, files)
        client = self._clients().aio
        if call.max_input_tokens is not None:
            counted = await self._ask_async(
                call.model,
                call.budget,
                lambda left: client.count_tokens(**_counted(call), timeout=left),
            )
            _check_input(call.max_input_tokens, counted.token_count)
        if stream:
            return self._stream_async(call)
        done = await self._ask_async(
            call.model, call.budget, lambda left: client.generate(**_generated(call), timeout=left)
        )
        return self._response(call, done, done.text)

    async def _stream_async(self, call: _Call) -> AsyncGenerator[GenerateResponse, None]:
        client, begun = self._clients().aio, False
        with mapped(call.model):
            while True:
                left = call.budget.left()
                try:
                    async with client.stream(**_generated(call), timeout=left) as events:
                        calls = CallParts()
                        async for event in events:
                            begun = True
                            if isinstance(event, GenerateDelta) and (text := _shown(event, calls)):
                                yield _chunk(call, event, text)
                        done = await events.result()
                    break
                except mlxd.CapacityError as error:
                    if begun:
                        raise
                    await asyncio.sleep(call.budget.pause(error))
        yield self._last(call, done)


def _tool_calls(text: str) -> list[ToolCall] | None:
    """Returns the tool calls in a text, None without any: an empty list makes Session loop.

    AbstractLLM's own parser reads them, in any format, as Session does in a streamed answer.
    """
    if not detect_tool_calls(text):
        return None
    return parse_tool_calls(text) or None


def _called(done: mlxd.Completion) -> list[ToolCall] | None:
    """Returns the tool calls that the daemon found, None without any."""
    calls = [ToolCall(call.name, call.arguments, call.id) for call in done.tool_calls]
    return calls or None


def _shown(event: GenerateDelta, calls: CallParts) -> str:
    """Returns what an event says as text: Session looks for the tool calls of a stream there."""
    texts = [event.text]
    for whole in calls.add(event):
        call = json.dumps({"name": whole.name, "arguments": whole.arguments}, ensure_ascii=False)
        texts.append(f"<tool_call>\n{call}\n</tool_call>")
    return "".join(texts)


def _chunk(call: _Call, event: GenerateDelta, text: str) -> GenerateResponse:
    return _Response(content=text, raw_response=event, model=call.model)


def _generated(call: _Call) -> dict[str, Any]:
    return {"model": call.model, "messages": call.messages, **call.options}


def _counted(call: _Call) -> dict[str, Any]:
    names = ("tools", "template_arguments", "request_id")
    shared = {name: value for name, value in call.options.items() if name in names}
    return {"model": call.model, "messages": call.messages, **shared}


def _check_input(limit: int, count: int) -> None:
    if count > limit:
        raise ContextWindowExceededError(limit, count, provider=PROVIDER)
