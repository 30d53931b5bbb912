"""The asyncio client, from which `scripts/generate_sync.py` makes the synchronous one."""

from mlxd.aio._stream import AsyncExportStream, AsyncGenerateStream, AsyncStream
from mlxd.aio.client import AsyncClient
from mlxd.aio.session import AsyncSession

__all__ = [
    "AsyncClient",
    "AsyncExportStream",
    "AsyncGenerateStream",
    "AsyncSession",
    "AsyncStream",
]
