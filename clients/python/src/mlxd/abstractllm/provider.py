"""The provider. It stores no conversation: the daemon finds the cached prefix by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abstractllm.enums import ModelCapability, ModelParameter
from abstractllm.exceptions import ContextWindowExceededError
from abstractllm.providers.base import BaseProvider
from abstractllm.tools import ToolCall, UniversalToolHandler
from abstractllm.tools.parser import detect_tool_calls, parse_tool_calls
from abstractllm.types import GenerateResponse

import mlxd
from mlxd.abstractllm.errors import PROVIDER, mapped
from mlxd.abstractllm.messages import Conversation, conversation, is_text_file
from mlxd.abstractllm.parameters import Parameters, check, merge, plain
from mlxd.types import GenerateDelta, GenerateOptions, ModelCapabilities
from mlxd.v1.server_pb2 import FEATURE_CHAT, FEATURE_SYSTEM_PROMPT, FEATURE_TOOLS


@dataclass(frozen=True)
class _Call:
    """A request, ready to send."""

    model: str
    messages: Conversation
    options: GenerateOptions
    with_tools: bool
    max_input_tokens: int | None


class MlxdProvider(BaseProvider):
    """Generates through a running mlxd.

    Configuration: `model`; `base_url`, an address as `mlxd.Client` takes it (default: the daemon's
    default socket); `api_key`, the token, which TCP requires. Sampling parameters given here are
    defaults for calls. Parameters that cannot be honoured are refused.
    """

    _tool_handler: UniversalToolHandler | None

    def __init__(self, config: dict[Any, Any] | None = None) -> None:
        super().__init__(config)
        check(plain(self.config_manager.get_config()))
        self._client: mlxd.Client | None = None
        self._client_key: tuple[str | None, str | None] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration by plain names, for Session.save: everything but the token."""
        config = plain(self.config_manager.get_config())
        return {key: value for key, value in config.items() if key != "api_key"}

    def _connection(self) -> tuple[str | None, str | None]:
        address = self.get_param(ModelParameter.BASE_URL)
        token = self.get_param(ModelParameter.API_KEY)
        return (str(address) if address else None, token)

    def _sync(self) -> mlxd.Client:
        key = self._connection()
        if self._client is None or key != self._client_key:
            self.close()
            self._client, self._client_key = mlxd.Client(key[0], token=key[1]), key
        return self._client

    def _async(self) -> mlxd.AsyncClient:
        """Makes a client for the running event loop; it is not reused, because loops end."""
        address, token = self._connection()
        return mlxd.AsyncClient(address, token=token)

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        if self._client is not None:
            self._client.close()
            self._client = None

    # The model

    def _model(self) -> str:
        return str(self.get_param(ModelParameter.MODEL) or "")

    def _described(self, model: str) -> ModelCapabilities:
        with mapped(model):
            return self._sync().capabilities(*([model] if model else [])).models[0]

    def get_capabilities(self) -> dict[Any, Any]:
        """Returns the model's capabilities, as the daemon reports them.

        Raises:
            AbstractLLMError: no daemon answers, or the model is unknown.
        """
        described = self._described(self._model())
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
        described = self._described(self._model())
        output = described.default_sampling.max_tokens or described.model.context_length
        return {"input": described.model.context_length, "output": output}

    def load_model(self) -> None:
        """Loads the model and returns once it is resident."""
        with mapped(self._model()):
            self._sync().load_model(self._model())

    def unload_model(self) -> None:
        """Unloads the model, for every client of the daemon."""
        with mapped(self._model()):
            self._sync().unload_model(self._model())

    # Preparing a call

    def _get_tool_handler(self) -> UniversalToolHandler:
        """Returns AbstractLLM's handler; the daemon tells whether the template takes tools."""
        model = self._model()
        handler = self._tool_handler
        if handler is None or handler.model_name != model:
            handler = UniversalToolHandler(model)
            handler.supports_native = FEATURE_TOOLS in self._described(model).features
            handler.supports_prompted = True
            self._tool_handler = handler
        return handler

    def _parse_file_references(self, text: str) -> tuple[str, list[str]]:
        """As the base, which inlines text files and also lists them as files: drops those."""
        cleaned, files = super()._parse_file_references(text)
        return cleaned, [path for path in files if not is_text_file(path)]

    def _expanded(self, text: str) -> str:
        return self._parse_file_references(text)[0]

    def _prepare(
        self,
        prompt: str | None,
        system_prompt: str | None,
        files: list[str | Path] | None,
        tools: list[Any] | None,
        kwargs: dict[str, Any],
    ) -> _Call:
        messages = kwargs.pop("messages", None)
        asked = merge(self.config_manager.get_config(), kwargs, system_prompt, tools)
        system, definitions = self._tool_context(asked)
        chat = conversation(prompt, system, messages, files, self._expanded)
        options = asked.options
        if definitions:
            options = {**options, "tools": definitions}
        with_tools = asked.tools is not None
        return _Call(asked.model, chat, options, with_tools, asked.max_input_tokens)

    def _tool_context(self, asked: Parameters) -> tuple[str | None, list[dict[str, Any]] | None]:
        """Returns the system prompt, and the tools if the model's template takes them."""
        if asked.tools is None:
            return asked.system_prompt, None
        system, definitions, mode = self._prepare_tool_context(asked.tools, asked.system_prompt)
        return system, definitions if mode == "native" else None

    def _response(self, call: _Call, done: mlxd.Completion, content: str) -> GenerateResponse:
        found = _tool_calls(content) if call.with_tools else None
        reason = "stop" if done.finish_reason == "stop_string" else done.finish_reason
        return GenerateResponse(
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
        call = self._prepare(prompt, system_prompt, files, tools, kwargs)
        if call.max_input_tokens is not None:
            with mapped(call.model):
                counted = self._sync().count_tokens(**_count(call))
            _check_input(call.max_input_tokens, counted.token_count)
        if stream:
            return self._stream(call)
        with mapped(call.model):
            done = self._sync().generate(model=call.model, messages=call.messages, **call.options)
        return self._response(call, done, done.text)

    def _stream(self, call: _Call) -> Generator[GenerateResponse, None, None]:
        with (
            mapped(call.model),
            self._sync().stream(model=call.model, messages=call.messages, **call.options) as events,
        ):
            for event in events:
                if isinstance(event, GenerateDelta) and event.text:
                    yield GenerateResponse(content=event.text, raw_response=event, model=call.model)
            done = events.result()
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
        if prompt:
            prompt, named = self._parse_file_references(prompt)
            files = [*(files or []), *named]
        # Reads files, and may ask the daemon about the model.
        call = await asyncio.to_thread(self._prepare, prompt, system_prompt, files, tools, kwargs)
        if call.max_input_tokens is not None:
            with mapped(call.model):
                async with self._async() as client:
                    counted = await client.count_tokens(**_count(call))
            _check_input(call.max_input_tokens, counted.token_count)
        if stream:
            return self._stream_async(call)
        with mapped(call.model):
            async with self._async() as client:
                done = await client.generate(
                    model=call.model, messages=call.messages, **call.options
                )
        return self._response(call, done, done.text)

    async def _stream_async(self, call: _Call) -> AsyncGenerator[GenerateResponse, None]:
        with mapped(call.model):
            async with (
                self._async() as client,
                client.stream(model=call.model, messages=call.messages, **call.options) as events,
            ):
                async for event in events:
                    if isinstance(event, GenerateDelta) and event.text:
                        yield GenerateResponse(
                            content=event.text, raw_response=event, model=call.model
                        )
                done = await events.result()
        yield self._last(call, done)


def _tool_calls(text: str) -> list[ToolCall] | None:
    """Returns the tool calls in a text, None without any: an empty list makes Session loop.

    AbstractLLM's own parser reads them, in any format, as Session does in a streamed answer.
    """
    if not detect_tool_calls(text):
        return None
    return parse_tool_calls(text) or None


def _count(call: _Call) -> dict[str, Any]:
    names = ("tools", "template_arguments", "timeout", "request_id")
    shared = {name: value for name, value in call.options.items() if name in names}
    return {"model": call.model, "messages": call.messages, **shared}


def _check_input(limit: int, count: int) -> None:
    if count > limit:
        raise ContextWindowExceededError(limit, count, provider=PROVIDER)
