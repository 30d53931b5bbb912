"""The calls about sessions; `client` adds those that return a session as an object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO

from typing_extensions import Unpack

from mlxd import _convert as convert
from mlxd._files import ImportParts
from mlxd.aio._connection import AsyncConnection
from mlxd.aio._stream import AsyncExportStream, AsyncStream
from mlxd.types import (
    CallOptions,
    ExtendSessionResponse,
    GetSessionResponse,
    Messages,
    Priority,
    SaveSessionResponse,
    SessionInfo,
    ToolFormat,
    WatchEvent,
)
from mlxd.v1 import session_pb2


class AsyncSessionCalls(AsyncConnection):
    """A connection to the daemon, and every call on it that returns no session object."""

    async def get_session(
        self,
        name: str,
        *,
        include_messages: bool = False,
        include_token_ids: bool = False,
        **options: Unpack[CallOptions],
    ) -> GetSessionResponse:
        """Describes a session; its messages are those of all pages."""
        request = convert.request(
            session_pb2.GetSessionRequest,
            name=name,
            include_messages=include_messages,
            include_token_ids=include_token_ids,
        )
        deadline = self._deadline(options)
        response: GetSessionResponse = await self._call(
            self._stubs.session.GetSession, request, options
        )
        request.include_token_ids = False
        while response.next_message_page_token:
            request.message_page_token = response.next_message_page_token
            options["timeout"] = deadline.left()
            page = await self._call(self._stubs.session.GetSession, request, options)
            response.messages.extend(page.messages)
            response.next_message_page_token = page.next_message_page_token
        return response

    async def list_sessions(
        self,
        *,
        model: str = "",
        labels: Mapping[str, str] | None = None,
        name_prefix: str = "",
        pinned: bool | None = None,
        page_size: int = 0,
        **options: Unpack[CallOptions],
    ) -> list[SessionInfo]:
        """Lists the caller's sessions by name, reading every page.

        Args:
            model: only those of this model; empty for all.
            labels: only those that have all of these labels.
            name_prefix: only those whose name begins with this.
            pinned: only pinned ones, or only others; None for all.
            page_size: in sessions; 0 is the daemon's default.
            options: options of the call.
        """
        sessions: list[SessionInfo] = []
        request = convert.request(
            session_pb2.ListSessionsRequest,
            page_size=page_size,
            model=model,
            labels=labels,
            name_prefix=name_prefix,
            pinned=pinned,
        )
        deadline = self._deadline(options)
        while True:
            options["timeout"] = deadline.left()
            page = await self._call(self._stubs.session.ListSessions, request, options)
            sessions.extend(page.sessions)
            if not page.next_page_token:
                return sessions
            request.page_token = page.next_page_token

    async def update_session(
        self,
        name: str,
        *,
        ttl: float | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        pinned: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> SessionInfo:
        """Changes a session's lifetime, labels or pin; what is None stays as it is.

        Args:
            name: the session.
            ttl: lifetime after its last use, in seconds, from now on.
            expire_time: the time at which it expires, instead; with a time zone.
            labels: labels to add or replace.
            remove_labels: keys of labels to remove, before others are added.
            pinned: whether it stays until it is deleted.
            options: options of the call.
        """
        if ttl is not None and expire_time is not None:
            raise TypeError("give at most one of ttl, expire_time")
        request = convert.request(
            session_pb2.UpdateSessionRequest,
            name=name,
            ttl=convert.duration(ttl, "ttl"),
            expire_time=convert.timestamp(expire_time, "expire_time"),
            labels=labels,
            remove_labels=list(remove_labels),
            pinned=pinned,
        )
        response = await self._call(self._stubs.session.UpdateSession, request, options)
        info: SessionInfo = response.session
        return info

    async def extend_session(
        self,
        name: str,
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
        """Adds an input to a session and computes its KV cache, without generating.

        Args:
            name: the session.
            messages: messages to add. Exactly one of messages, prompt and token_ids must be given.
            prompt: raw text to add.
            token_ids: tokens to add.
            tools: tools that the messages are rendered with.
            template_arguments: variables that the messages are rendered with.
            tool_format: "prompted" writes tools, calls and results as text.
            expected_token_count: makes a retry safe, as of a generation.
            priority: None is "normal", as of a generation.
            keep_alive: seconds that the model stays in memory, as of a generation.
            options: options of the call.

        Raises:
            SessionMovedError: the session does not have `expected_token_count` tokens.
        """
        request = convert.extend_request(
            name=name,
            prompt=prompt,
            messages=messages,
            token_ids=token_ids,
            tools=tools,
            template_arguments=template_arguments,
            tool_format=tool_format,
            expected_token_count=expected_token_count,
            priority=priority,
            keep_alive=keep_alive,
        )
        response: ExtendSessionResponse = await self._call(
            self._stubs.session.ExtendSession, request, options
        )
        return response

    async def save_session(
        self,
        name: str,
        *,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> SaveSessionResponse:
        """Writes the cached KV of a session to disk, so that it goes on at once after a restart.

        Computes nothing; `token_count` of the response says how much was cached.

        Raises:
            SessionMovedError: the session does not have `expected_token_count` tokens.
            StateError: the daemon keeps no KV on disk.
        """
        request = convert.request(
            session_pb2.SaveSessionRequest,
            name=name,
            expected_token_count=expected_token_count,
        )
        response: SaveSessionResponse = await self._call(
            self._stubs.session.SaveSession, request, options
        )
        return response

    async def _fork_session(
        self, name: str, new_name: str, changes: Mapping[str, Any], options: CallOptions
    ) -> SessionInfo:
        """Copies a session. For `client` and `session`, which wrap the result in an object."""
        fields = {**changes, "ttl": convert.duration(changes["ttl"], "ttl")}
        request = convert.request(
            session_pb2.ForkSessionRequest, name=name, new_name=new_name, **fields
        )
        response = await self._call(self._stubs.session.ForkSession, request, options)
        info: SessionInfo = response.session
        return info

    async def truncate_session(
        self,
        name: str,
        *,
        turns: int | None = None,
        tokens: int | None = None,
        messages: int | None = None,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> SessionInfo:
        """Cuts a session back to its first `turns` turns, `tokens` tokens or `messages` messages.

        Tokens may end within an answer, which is then shortened; messages end at the end of a
        turn, or before its answer.

        Raises:
            SessionMovedError: the session does not have `expected_token_count` tokens.
        """
        if sum(to is not None for to in (turns, tokens, messages)) != 1:
            raise TypeError("give exactly one of turns, tokens, messages")
        request = convert.request(
            session_pb2.TruncateSessionRequest,
            name=name,
            turn_count=turns,
            token_count=tokens,
            message_count=messages,
            expected_token_count=expected_token_count,
        )
        response = await self._call(self._stubs.session.TruncateSession, request, options)
        info: SessionInfo = response.session
        return info

    async def delete_session(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Deletes a session and cancels a turn that runs in it."""
        request = convert.request(session_pb2.DeleteSessionRequest, name=name)
        await self._call(self._stubs.session.DeleteSession, request, options)

    def export_session(
        self,
        name: str,
        *,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncExportStream:
        """Returns all of a session, as it is now, as one file: an iterator over its bytes.

        The file is as private as the conversation. A failed call raises from the iterator.

        Raises:
            SessionMovedError: the session does not have `expected_token_count` tokens.
        """
        request = convert.request(
            session_pb2.ExportSessionRequest, name=name, expected_token_count=expected_token_count
        )
        call = self._start(self._stubs.session.ExportSession, request, options)
        stream = AsyncExportStream(call, options.get("request_id"), self.address)
        return self._stubs.hold(stream)

    async def _import_session(
        self,
        file: bytes | BinaryIO | Iterable[bytes],
        start: session_pb2.ImportStart,
        options: CallOptions,
    ) -> SessionInfo:
        """Makes a session of a file. For `client`, which wraps the result in an object."""
        parts = ImportParts(start, file)
        try:
            response = await self._call(self._stubs.session.ImportSession, iter(parts), options)
        except BaseException:
            # gRPC cancelled the call, which may look as if its caller had.
            if parts.error is not None:
                raise parts.error from None
            raise
        info: SessionInfo = response.session
        return info

    def watch_sessions(
        self,
        *,
        model: str = "",
        labels: Mapping[str, str] | None = None,
        name_prefix: str = "",
        pinned: bool | None = None,
        changes_only: bool = False,
        **options: Unpack[CallOptions],
    ) -> AsyncStream[WatchEvent]:
        """Returns what becomes of the caller's sessions, until the stream is closed.

        A SessionChange for each session that is there, one WatchReady, and from there on a
        SessionChange for what changes. The changes of a session that were not read in time become
        one, `merged_changes`. It raises UnavailableError when the daemon ends.

        Args:
            model: only those of this model; empty for all.
            labels: only those that have all of these labels.
            name_prefix: only those whose name begins with this.
            pinned: only pinned ones, or only others; None for all.
            changes_only: leave out those that are there.
            options: options of the call.
        """
        request = convert.request(
            session_pb2.WatchSessionsRequest,
            model=model,
            labels=labels,
            name_prefix=name_prefix,
            pinned=pinned,
            changes_only=changes_only,
        )
        call = self._start(self._stubs.session.WatchSessions, request, options)
        stream: AsyncStream[WatchEvent] = AsyncStream(call, options.get("request_id"), self.address)
        return self._stubs.hold(stream)
