"""Client of mlxd, the session-first MLX inference daemon.

`Client` and `AsyncClient` speak its gRPC API, `mlxd.v1`. Importing `mlxd.abstractllm` registers the
provider `mlxd` with AbstractLLM.
"""

from mlxd import types
from mlxd._stream import ExportStream, GenerateStream, Stream
from mlxd.aio import (
    AsyncClient,
    AsyncExportStream,
    AsyncGenerateStream,
    AsyncSession,
    AsyncStream,
)
from mlxd.client import Client
from mlxd.errors import (
    AlreadyExistsError,
    AuthError,
    CancelledCallError,
    CapacityError,
    ConnectionFailedError,
    ConnectionLostError,
    ContextOverflowError,
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    MlxdError,
    NotFoundError,
    ServerError,
    SessionMovedError,
    SlowReaderError,
    StateError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
)
from mlxd.session import Session
from mlxd.types import Completion, GenerateOptions, Message, ToolCall

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncExportStream",
    "AsyncGenerateStream",
    "AsyncSession",
    "AsyncStream",
    "AuthError",
    "CancelledCallError",
    "CapacityError",
    "Client",
    "Completion",
    "ConnectionFailedError",
    "ConnectionLostError",
    "ContextOverflowError",
    "DeadlineError",
    "ExportStream",
    "FieldViolation",
    "GenerateOptions",
    "GenerateStream",
    "InvalidRequestError",
    "Message",
    "MlxdError",
    "NotFoundError",
    "ServerError",
    "Session",
    "SessionMovedError",
    "SlowReaderError",
    "StateError",
    "Stream",
    "TooLargeError",
    "ToolCall",
    "UnavailableError",
    "UnsupportedError",
    "types",
]
