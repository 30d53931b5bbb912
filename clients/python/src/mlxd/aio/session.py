"""A session as an object: a conversation whose KV cache stays in the daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from typing_extensions import Unpack

from mlxd.aio._sessions import AsyncSessionCalls
from mlxd.aio._stream import AsyncExportStream, AsyncGenerateStream
from mlxd.types import (
    CallOptions,
    Completion,
    ExtendSessionResponse,
    GenerateOptions,
    GetSessionResponse,
    Messages,
    Priority,
    ProtoMessage,
    SaveSessionResponse,
    SessionInfo,
    ToolFormat,
)


class AsyncSession:
    """A session. Pass to each turn only its new messages.

    Attributes:
        name: the session's name.
        model: the model it is bound to.
        token_count: its length in tokens when this object last saw it. Passed to a turn as
            `expected_token_count`, it makes a retry of that turn safe.
    """

    def __init__(self, connection: AsyncSessionCalls, info: SessionInfo) -> None:
        self._connection = connection
        self.name = info.name
        self.model = info.model
        self.token_count = info.token_count

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, model={self.model!r}, token_count={self.token_count})"

    def _seen(self, completion: Completion) -> None:
        if completion.session_token_count is not None:
            self.token_count = completion.session_token_count

    async def generate(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Runs one turn. A turn that fails leaves the session as it was."""
        result = await self._connection.generate(
            model=self.model,
            session=self.name,
            messages=messages,
            prompt=prompt,
            token_ids=token_ids,
            **options,
        )
        self._seen(result)
        return result

    def stream(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateStream:
        """Runs one turn and streams it. Leaving the stream early undoes the turn."""
        return self._connection.stream(
            model=self.model,
            session=self.name,
            messages=messages,
            prompt=prompt,
            token_ids=token_ids,
            on_end=self._seen,
            **options,
        )

    async def extend(
        self,
        messages: Messages | None = None,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        tool_format: ToolFormat | None = None,
        expected_token_count: int | None = None,
        priority: Priority | None = None,
        keep_alive: float | None = None,
        **options: Unpack[CallOptions],
    ) -> ExtendSessionResponse:
        """Adds an input and computes its KV cache, without generating.

        The next turn prefills only what it adds.
        """
        response = await self._connection.extend_session(
            self.name,
            messages,
            prompt=prompt,
            token_ids=token_ids,
            tools=tools,
            template_arguments=template_arguments,
            tool_format=tool_format,
            expected_token_count=expected_token_count,
            priority=priority,
            keep_alive=keep_alive,
            **options,
        )
        self.token_count = response.session.token_count
        return response

    async def save(
        self, *, expected_token_count: int | None = None, **options: Unpack[CallOptions]
    ) -> SaveSessionResponse:
        """Writes its cached KV to disk, so that it goes on at once after a restart."""
        return await self._connection.save_session(
            self.name, expected_token_count=expected_token_count, **options
        )

    async def get(
        self,
        *,
        include_messages: bool = False,
        include_token_ids: bool = False,
        **options: Unpack[CallOptions],
    ) -> GetSessionResponse:
        """Describes the session."""
        response = await self._connection.get_session(
            self.name,
            include_messages=include_messages,
            include_token_ids=include_token_ids,
            **options,
        )
        self.token_count = response.session.token_count
        return response

    async def messages(self, **options: Unpack[CallOptions]) -> list[ProtoMessage]:
        """Returns the session's messages, oldest first."""
        response = await self.get(include_messages=True, **options)
        return list(response.messages)

    async def update(
        self,
        *,
        ttl: float | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        pinned: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> SessionInfo:
        """Changes the session's lifetime, labels or pin; what is None stays as it is."""
        return await self._connection.update_session(
            self.name,
            ttl=ttl,
            expire_time=expire_time,
            labels=labels,
            remove_labels=remove_labels,
            pinned=pinned,
            **options,
        )

    async def fork(
        self,
        new_name: str = "",
        *,
        ttl: float | None = None,
        turns: int | None = None,
        pinned: bool | None = None,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncSession:
        """Copies the session; the tokens that both share are not prefilled again.

        `turns` copies only the first turns. `ttl` and `pinned` are this session's unless given.
        """
        changes = {
            "ttl": ttl,
            "turn_count": turns,
            "pinned": pinned,
            "expected_token_count": expected_token_count,
        }
        info = await self._connection._fork_session(self.name, new_name, changes, options)
        return AsyncSession(self._connection, info)

    async def truncate(
        self,
        *,
        turns: int | None = None,
        tokens: int | None = None,
        messages: int | None = None,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> SessionInfo:
        """Cuts the session back to its first `turns` turns, `tokens` tokens or `messages` messages.

        Tokens may end within an answer, which is then shortened; messages end at the end of a
        turn, or before its answer.
        """
        info = await self._connection.truncate_session(
            self.name,
            turns=turns,
            tokens=tokens,
            messages=messages,
            expected_token_count=expected_token_count,
            **options,
        )
        self.token_count = info.token_count
        return info

    def export(
        self, *, expected_token_count: int | None = None, **options: Unpack[CallOptions]
    ) -> AsyncExportStream:
        """Returns all of the session, as it is now, as one file: an iterator over its bytes."""
        return self._connection.export_session(
            self.name, expected_token_count=expected_token_count, **options
        )

    async def delete(self, **options: Unpack[CallOptions]) -> None:
        """Deletes the session and cancels a turn that runs in it."""
        await self._connection.delete_session(self.name, **options)
