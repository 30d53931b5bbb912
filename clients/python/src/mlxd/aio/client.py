"""The asyncio client. It can be made before an event loop runs, and used in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import BinaryIO

from typing_extensions import Unpack

from mlxd import _convert as convert
from mlxd.aio._sessions import AsyncSessionCalls
from mlxd.aio.session import AsyncSession
from mlxd.errors import AlreadyExistsError, wrong_model
from mlxd.types import CallOptions, History
from mlxd.v1 import session_pb2


class AsyncClient(AsyncSessionCalls):
    """A connection to the daemon.

    Args:
        address: `unix:///path`, `unix:path`, `http://127.0.0.1:port` or `https://host:port`.
            Default: the environment's `MLXD_ADDRESS`, else the daemon's default socket.
        token: the bearer token, which TCP requires. Default: read from `token_file`, else from the
            file that the environment's `MLXD_TOKEN_FILE` names.
        token_file: a file that contains the token.
        timeout: default deadline of a call, in seconds, whatever the call does; None sets none.
        client_name: sent as `x-mlxd-client`: the daemon is fair between the clients of a
            connection.
        metadata: further metadata for every call, such as `traceparent`.
    """

    async def session(
        self,
        name: str = "",
        *,
        model: str,
        ttl: float | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool = False,
        history: History | None = None,
        cache_salt: str = "",
        **options: Unpack[CallOptions],
    ) -> AsyncSession:
        """Opens the session of this name, or creates it. An empty name lets the daemon choose.

        `ttl` (in seconds) and the other terms apply only to a session that is created.

        Raises:
            StateError: the session exists and is bound to another model.
        """
        deadline = self._deadline(options)
        try:
            return await self.create_session(
                name,
                model=model,
                ttl=ttl,
                labels=labels,
                pinned=pinned,
                history=history,
                cache_salt=cache_salt,
                **options,
            )
        except AlreadyExistsError:
            options["timeout"] = deadline.left()
            response = await self.get_session(name, **options)
            if response.session.model != model:
                raise wrong_model(name, response.session.model, model) from None
            return AsyncSession(self, response.session)

    async def create_session(
        self,
        name: str = "",
        *,
        model: str,
        ttl: float | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool = False,
        history: History | None = None,
        cache_salt: str = "",
        **options: Unpack[CallOptions],
    ) -> AsyncSession:
        """Creates a session.

        Args:
            name: the session's name; the daemon chooses one if it is empty.
            model: the model that the session is bound to.
            ttl: lifetime without use, in seconds; None is the daemon's default.
            expire_time: the time at which it expires, instead of `ttl`; with a time zone.
            labels: labels to find it by.
            pinned: whether it stays until it is deleted.
            history: what its turns do where the chat template writes the past differently: "append"
                keeps it, "rerender" writes it again, "auto" (the default) keeps it where the
                template has a switch for past reasoning.
            cache_salt: separates those for whom a principal asks: only requests and sessions with
                the same one reuse each other's cached KV.
            options: options of the call.

        Raises:
            AlreadyExistsError: a session of this name exists.
        """
        request = convert.request(
            session_pb2.CreateSessionRequest,
            name=name,
            model=model,
            ttl=convert.duration(ttl, "ttl"),
            expire_time=convert.timestamp(expire_time, "expire_time"),
            labels=labels,
            pinned=pinned,
            history=convert.history(history),
            cache_salt=cache_salt,
        )
        response = await self._call(self._stubs.session.CreateSession, request, options)
        return AsyncSession(self, response.session)

    async def fork_session(
        self,
        name: str,
        new_name: str = "",
        *,
        ttl: float | None = None,
        turns: int | None = None,
        pinned: bool | None = None,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncSession:
        """Copies a session under a new name; its cached tokens are shared, not prefilled again.

        `turns` copies only the first turns. `ttl` and `pinned` are the original's unless given.

        Raises:
            SessionMovedError: the session does not have `expected_token_count` tokens.
        """
        changes = {
            "ttl": ttl,
            "turn_count": turns,
            "pinned": pinned,
            "expected_token_count": expected_token_count,
        }
        return AsyncSession(self, await self._fork_session(name, new_name, changes, options))

    async def import_session(
        self,
        file: bytes | BinaryIO | Iterable[bytes],
        name: str = "",
        *,
        model: str = "",
        pinned: bool | None = None,
        ttl: float | None = None,
        replace: bool = False,
        expected_token_count: int | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncSession:
        """Makes a session of a file that `export_session` gave.

        Args:
            file: its bytes, or a file that is open in binary mode, or an iterable of bytes.
            name: the session's name; empty for the one that it was exported from.
            model: the model to bind it to; empty for the one that it was bound to.
            pinned: whether it is pinned; None for as it was.
            ttl: lifetime without use, in seconds; None for what it was.
            replace: whether it takes the place of a session of its name, in one step.
            expected_token_count: number of tokens of the session that it replaces; 0 if none.
            options: options of the call.

        Raises:
            AlreadyExistsError: a session of this name exists, and is not to be replaced.
            SessionMovedError: the replaced session does not have `expected_token_count` tokens.
            InvalidRequestError: the file is damaged, incomplete, or something else.
        """
        start = convert.request(
            session_pb2.ImportStart,
            name=name,
            model=model,
            pinned=pinned,
            ttl=convert.duration(ttl, "ttl"),
            replace=replace,
            expected_token_count=expected_token_count,
        )
        return AsyncSession(self, await self._import_session(file, start, options))
