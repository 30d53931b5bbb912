import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from mlxd.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    SESSION_STATE_COLD: _ClassVar[SessionState]
    SESSION_STATE_HOT: _ClassVar[SessionState]
    SESSION_STATE_RUNNING: _ClassVar[SessionState]
    SESSION_STATE_SAVED: _ClassVar[SessionState]

class SessionChangeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_CHANGE_KIND_UNSPECIFIED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_LISTED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_CREATED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_CHANGED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_DELETED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_EXPIRED: _ClassVar[SessionChangeKind]
    SESSION_CHANGE_KIND_UNLISTED: _ClassVar[SessionChangeKind]
SESSION_STATE_UNSPECIFIED: SessionState
SESSION_STATE_COLD: SessionState
SESSION_STATE_HOT: SessionState
SESSION_STATE_RUNNING: SessionState
SESSION_STATE_SAVED: SessionState
SESSION_CHANGE_KIND_UNSPECIFIED: SessionChangeKind
SESSION_CHANGE_KIND_LISTED: SessionChangeKind
SESSION_CHANGE_KIND_CREATED: SessionChangeKind
SESSION_CHANGE_KIND_CHANGED: SessionChangeKind
SESSION_CHANGE_KIND_DELETED: SessionChangeKind
SESSION_CHANGE_KIND_EXPIRED: SessionChangeKind
SESSION_CHANGE_KIND_UNLISTED: SessionChangeKind

class CreateSessionRequest(_message.Message):
    __slots__ = ("name", "model", "ttl", "labels", "pinned", "expire_time", "history", "cache_salt")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    ttl: _duration_pb2.Duration
    labels: _containers.ScalarMap[str, str]
    pinned: bool
    expire_time: _timestamp_pb2.Timestamp
    history: _inference_pb2.History
    cache_salt: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., pinned: bool = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., history: _Optional[_Union[_inference_pb2.History, str]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("name", "include_messages", "include_token_ids", "message_page_size", "message_page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    include_messages: bool
    include_token_ids: bool
    message_page_size: int
    message_page_token: str
    def __init__(self, name: _Optional[str] = ..., include_messages: bool = ..., include_token_ids: bool = ..., message_page_size: _Optional[int] = ..., message_page_token: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session", "messages", "token_ids", "next_message_page_token")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_MESSAGE_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session: Session
    messages: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Message]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    next_message_page_token: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., messages: _Optional[_Iterable[_Union[_inference_pb2.Message, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., next_message_page_token: _Optional[str] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "model", "labels", "name_prefix", "pinned")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    model: str
    labels: _containers.ScalarMap[str, str]
    name_prefix: str
    pinned: bool
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., model: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., name_prefix: _Optional[str] = ..., pinned: bool = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateSessionRequest(_message.Message):
    __slots__ = ("name", "ttl", "expire_time", "labels", "remove_labels", "pinned")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REMOVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttl: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    remove_labels: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., remove_labels: _Optional[_Iterable[str]] = ..., pinned: bool = ...) -> None: ...

class UpdateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ExtendSessionRequest(_message.Message):
    __slots__ = ("name", "prompt", "token_ids", "chat", "expected_token_count", "priority", "keep_alive")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    prompt: str
    token_ids: _inference_pb2.TokenIds
    chat: _inference_pb2.ChatInput
    expected_token_count: int
    priority: _inference_pb2.Priority
    keep_alive: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., prompt: _Optional[str] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[_inference_pb2.ChatInput, _Mapping]] = ..., expected_token_count: _Optional[int] = ..., priority: _Optional[_Union[_inference_pb2.Priority, str]] = ..., keep_alive: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ExtendSessionResponse(_message.Message):
    __slots__ = ("session", "usage")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    usage: _inference_pb2.Usage
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., usage: _Optional[_Union[_inference_pb2.Usage, _Mapping]] = ...) -> None: ...

class SaveSessionRequest(_message.Message):
    __slots__ = ("name", "expected_token_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_token_count: int
    def __init__(self, name: _Optional[str] = ..., expected_token_count: _Optional[int] = ...) -> None: ...

class SaveSessionResponse(_message.Message):
    __slots__ = ("session", "token_count", "bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    session: Session
    token_count: int
    bytes: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., token_count: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("name", "new_name", "ttl", "expected_token_count", "turn_count", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NEW_NAME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TURN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    new_name: str
    ttl: _duration_pb2.Duration
    expected_token_count: int
    turn_count: int
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., new_name: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expected_token_count: _Optional[int] = ..., turn_count: _Optional[int] = ..., pinned: bool = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class TruncateSessionRequest(_message.Message):
    __slots__ = ("name", "turn_count", "token_count", "message_count", "expected_token_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TURN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    turn_count: int
    token_count: int
    message_count: int
    expected_token_count: int
    def __init__(self, name: _Optional[str] = ..., turn_count: _Optional[int] = ..., token_count: _Optional[int] = ..., message_count: _Optional[int] = ..., expected_token_count: _Optional[int] = ...) -> None: ...

class TruncateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Session(_message.Message):
    __slots__ = ("name", "model", "owner", "token_count", "turns", "busy", "ttl", "create_time", "last_use_time", "expire_time", "labels", "pinned", "content_bytes", "kv_bytes", "state", "history", "cached_token_count", "snapshot_token_count", "snapshot_bytes")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    owner: str
    token_count: int
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    busy: bool
    ttl: _duration_pb2.Duration
    create_time: _timestamp_pb2.Timestamp
    last_use_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    pinned: bool
    content_bytes: int
    kv_bytes: int
    state: SessionState
    history: _inference_pb2.History
    cached_token_count: int
    snapshot_token_count: int
    snapshot_bytes: int
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., owner: _Optional[str] = ..., token_count: _Optional[int] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., busy: bool = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_use_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., pinned: bool = ..., content_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., state: _Optional[_Union[SessionState, str]] = ..., history: _Optional[_Union[_inference_pb2.History, str]] = ..., cached_token_count: _Optional[int] = ..., snapshot_token_count: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("message_count", "token_count")
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    message_count: int
    token_count: int
    def __init__(self, message_count: _Optional[int] = ..., token_count: _Optional[int] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("name", "expected_token_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_token_count: int
    def __init__(self, name: _Optional[str] = ..., expected_token_count: _Optional[int] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("chunk", "finished")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    finished: ExportFinished
    def __init__(self, chunk: _Optional[bytes] = ..., finished: _Optional[_Union[ExportFinished, _Mapping]] = ...) -> None: ...

class ExportFinished(_message.Message):
    __slots__ = ("file_bytes",)
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    file_bytes: int
    def __init__(self, file_bytes: _Optional[int] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: ImportStart
    chunk: bytes
    def __init__(self, start: _Optional[_Union[ImportStart, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ImportStart(_message.Message):
    __slots__ = ("name", "model", "pinned", "ttl", "replace", "expected_token_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    pinned: bool
    ttl: _duration_pb2.Duration
    replace: bool
    expected_token_count: int
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., pinned: bool = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., replace: bool = ..., expected_token_count: _Optional[int] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class WatchSessionsRequest(_message.Message):
    __slots__ = ("model", "labels", "name_prefix", "pinned", "changes_only")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CHANGES_ONLY_FIELD_NUMBER: _ClassVar[int]
    model: str
    labels: _containers.ScalarMap[str, str]
    name_prefix: str
    pinned: bool
    changes_only: bool
    def __init__(self, model: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., name_prefix: _Optional[str] = ..., pinned: bool = ..., changes_only: bool = ...) -> None: ...

class WatchSessionsResponse(_message.Message):
    __slots__ = ("change", "ready")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    change: SessionChange
    ready: WatchReady
    def __init__(self, change: _Optional[_Union[SessionChange, _Mapping]] = ..., ready: _Optional[_Union[WatchReady, _Mapping]] = ...) -> None: ...

class WatchReady(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionChange(_message.Message):
    __slots__ = ("kind", "name", "session", "changed_fields", "merged_changes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELDS_FIELD_NUMBER: _ClassVar[int]
    MERGED_CHANGES_FIELD_NUMBER: _ClassVar[int]
    kind: SessionChangeKind
    name: str
    session: Session
    changed_fields: _containers.RepeatedScalarFieldContainer[str]
    merged_changes: int
    def __init__(self, kind: _Optional[_Union[SessionChangeKind, str]] = ..., name: _Optional[str] = ..., session: _Optional[_Union[Session, _Mapping]] = ..., changed_fields: _Optional[_Iterable[str]] = ..., merged_changes: _Optional[int] = ...) -> None: ...
