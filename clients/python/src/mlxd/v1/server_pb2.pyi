import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from mlxd.v1 import inference_pb2 as _inference_pb2
from mlxd.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Feature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_UNSPECIFIED: _ClassVar[Feature]
    FEATURE_STREAMING: _ClassVar[Feature]
    FEATURE_CHAT: _ClassVar[Feature]
    FEATURE_TOOLS: _ClassVar[Feature]
    FEATURE_LOGPROBS: _ClassVar[Feature]
    FEATURE_SCORE: _ClassVar[Feature]
    FEATURE_SESSIONS: _ClassVar[Feature]
    FEATURE_SEED: _ClassVar[Feature]
    FEATURE_SYSTEM_PROMPT: _ClassVar[Feature]
    FEATURE_THINKING: _ClassVar[Feature]
    FEATURE_STRUCTURED_OUTPUT: _ClassVar[Feature]
    FEATURE_REASONING: _ClassVar[Feature]
    FEATURE_TOOL_CALLS: _ClassVar[Feature]

class Modality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODALITY_UNSPECIFIED: _ClassVar[Modality]
    MODALITY_TEXT: _ClassVar[Modality]
FEATURE_UNSPECIFIED: Feature
FEATURE_STREAMING: Feature
FEATURE_CHAT: Feature
FEATURE_TOOLS: Feature
FEATURE_LOGPROBS: Feature
FEATURE_SCORE: Feature
FEATURE_SESSIONS: Feature
FEATURE_SEED: Feature
FEATURE_SYSTEM_PROMPT: Feature
FEATURE_THINKING: Feature
FEATURE_STRUCTURED_OUTPUT: Feature
FEATURE_REASONING: Feature
FEATURE_TOOL_CALLS: Feature
MODALITY_UNSPECIFIED: Modality
MODALITY_TEXT: Modality

class CapabilitiesRequest(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, models: _Optional[_Iterable[str]] = ...) -> None: ...

class CapabilitiesResponse(_message.Message):
    __slots__ = ("server", "models")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    server: ServerCapabilities
    models: _containers.RepeatedCompositeFieldContainer[ModelCapabilities]
    def __init__(self, server: _Optional[_Union[ServerCapabilities, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelCapabilities, _Mapping]]] = ...) -> None: ...

class ServerCapabilities(_message.Message):
    __slots__ = ("version", "mlx_version", "device", "platform", "features", "architectures", "limits")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MLX_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    version: str
    mlx_version: str
    device: str
    platform: str
    features: _containers.RepeatedScalarFieldContainer[Feature]
    architectures: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    def __init__(self, version: _Optional[str] = ..., mlx_version: _Optional[str] = ..., device: _Optional[str] = ..., platform: _Optional[str] = ..., features: _Optional[_Iterable[_Union[Feature, str]]] = ..., architectures: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes_max", "sessions_max", "queue_length_max", "running_sequences_max", "memory_budget_bytes", "score_tokens_max", "top_logprobs_max", "queue_length_per_client_max", "choices_max")
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_MAX_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCORE_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_MAX_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_PER_CLIENT_MAX_FIELD_NUMBER: _ClassVar[int]
    CHOICES_MAX_FIELD_NUMBER: _ClassVar[int]
    message_bytes_max: int
    sessions_max: int
    queue_length_max: int
    running_sequences_max: int
    memory_budget_bytes: int
    score_tokens_max: int
    top_logprobs_max: int
    queue_length_per_client_max: int
    choices_max: int
    def __init__(self, message_bytes_max: _Optional[int] = ..., sessions_max: _Optional[int] = ..., queue_length_max: _Optional[int] = ..., running_sequences_max: _Optional[int] = ..., memory_budget_bytes: _Optional[int] = ..., score_tokens_max: _Optional[int] = ..., top_logprobs_max: _Optional[int] = ..., queue_length_per_client_max: _Optional[int] = ..., choices_max: _Optional[int] = ...) -> None: ...

class ModelCapabilities(_message.Message):
    __slots__ = ("model", "modalities", "features", "has_chat_template", "default_sampling", "eos_token_ids", "tool_format", "reasoning_format", "reasoning_switch", "reasoning_effort")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOOL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    REASONING_FORMAT_FIELD_NUMBER: _ClassVar[int]
    REASONING_SWITCH_FIELD_NUMBER: _ClassVar[int]
    REASONING_EFFORT_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelInfo
    modalities: _containers.RepeatedScalarFieldContainer[Modality]
    features: _containers.RepeatedScalarFieldContainer[Feature]
    has_chat_template: bool
    default_sampling: _inference_pb2.EffectiveSampling
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tool_format: str
    reasoning_format: str
    reasoning_switch: str
    reasoning_effort: bool
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelInfo, _Mapping]] = ..., modalities: _Optional[_Iterable[_Union[Modality, str]]] = ..., features: _Optional[_Iterable[_Union[Feature, str]]] = ..., has_chat_template: bool = ..., default_sampling: _Optional[_Union[_inference_pb2.EffectiveSampling, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tool_format: _Optional[str] = ..., reasoning_format: _Optional[str] = ..., reasoning_switch: _Optional[str] = ..., reasoning_effort: bool = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("uptime", "requests_total", "finished_total", "cancelled_total", "failed_total", "prefill_tokens_total", "cached_tokens_total", "decode_tokens_total", "steps_total", "running_sequences", "queued_sequences", "sessions", "memory", "slabs", "prefilling_sequences", "stalled_sequences", "preemptions_total", "refused_total", "loads_total", "evictions_total", "expirations_total", "pinned_sessions", "busy_sessions", "session_bytes", "session_store", "snapshots")
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FINISHED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    PREFILLING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STALLED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REFUSED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOADS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPIRATIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PINNED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    SESSION_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_STORE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    uptime: _duration_pb2.Duration
    requests_total: int
    finished_total: int
    cancelled_total: int
    failed_total: int
    prefill_tokens_total: int
    cached_tokens_total: int
    decode_tokens_total: int
    steps_total: int
    running_sequences: int
    queued_sequences: int
    sessions: int
    memory: MemoryStats
    slabs: _containers.RepeatedCompositeFieldContainer[SlabStats]
    prefilling_sequences: int
    stalled_sequences: int
    preemptions_total: int
    refused_total: int
    loads_total: int
    evictions_total: int
    expirations_total: int
    pinned_sessions: int
    busy_sessions: int
    session_bytes: int
    session_store: SessionStoreStats
    snapshots: SnapshotStats
    def __init__(self, uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., requests_total: _Optional[int] = ..., finished_total: _Optional[int] = ..., cancelled_total: _Optional[int] = ..., failed_total: _Optional[int] = ..., prefill_tokens_total: _Optional[int] = ..., cached_tokens_total: _Optional[int] = ..., decode_tokens_total: _Optional[int] = ..., steps_total: _Optional[int] = ..., running_sequences: _Optional[int] = ..., queued_sequences: _Optional[int] = ..., sessions: _Optional[int] = ..., memory: _Optional[_Union[MemoryStats, _Mapping]] = ..., slabs: _Optional[_Iterable[_Union[SlabStats, _Mapping]]] = ..., prefilling_sequences: _Optional[int] = ..., stalled_sequences: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., refused_total: _Optional[int] = ..., loads_total: _Optional[int] = ..., evictions_total: _Optional[int] = ..., expirations_total: _Optional[int] = ..., pinned_sessions: _Optional[int] = ..., busy_sessions: _Optional[int] = ..., session_bytes: _Optional[int] = ..., session_store: _Optional[_Union[SessionStoreStats, _Mapping]] = ..., snapshots: _Optional[_Union[SnapshotStats, _Mapping]] = ...) -> None: ...

class SessionStoreStats(_message.Message):
    __slots__ = ("enabled", "durable", "unwritten_sessions")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    UNWRITTEN_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    durable: bool
    unwritten_sessions: int
    def __init__(self, enabled: bool = ..., durable: bool = ..., unwritten_sessions: _Optional[int] = ...) -> None: ...

class SnapshotStats(_message.Message):
    __slots__ = ("enabled", "writable", "snapshots", "bytes", "bytes_max", "waiting_bytes", "saved_total", "failed_total", "dropped_total", "restored_total", "restored_tokens_total")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DROPPED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    writable: bool
    snapshots: int
    bytes: int
    bytes_max: int
    waiting_bytes: int
    saved_total: int
    failed_total: int
    dropped_total: int
    restored_total: int
    restored_tokens_total: int
    def __init__(self, enabled: bool = ..., writable: bool = ..., snapshots: _Optional[int] = ..., bytes: _Optional[int] = ..., bytes_max: _Optional[int] = ..., waiting_bytes: _Optional[int] = ..., saved_total: _Optional[int] = ..., failed_total: _Optional[int] = ..., dropped_total: _Optional[int] = ..., restored_total: _Optional[int] = ..., restored_tokens_total: _Optional[int] = ...) -> None: ...

class MemoryStats(_message.Message):
    __slots__ = ("budget_bytes", "weight_bytes", "kv_slab_bytes", "kv_idle_bytes", "mlx_active_bytes", "mlx_peak_bytes", "mlx_cache_bytes", "process_resident_bytes", "kv_reserved_bytes", "snapshot_bytes")
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_IDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MLX_ACTIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MLX_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MLX_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    budget_bytes: int
    weight_bytes: int
    kv_slab_bytes: int
    kv_idle_bytes: int
    mlx_active_bytes: int
    mlx_peak_bytes: int
    mlx_cache_bytes: int
    process_resident_bytes: int
    kv_reserved_bytes: int
    snapshot_bytes: int
    def __init__(self, budget_bytes: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., kv_slab_bytes: _Optional[int] = ..., kv_idle_bytes: _Optional[int] = ..., mlx_active_bytes: _Optional[int] = ..., mlx_peak_bytes: _Optional[int] = ..., mlx_cache_bytes: _Optional[int] = ..., process_resident_bytes: _Optional[int] = ..., kv_reserved_bytes: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ...) -> None: ...

class SlabStats(_message.Message):
    __slots__ = ("model", "slot_capacity_tokens", "slabs", "slots", "slots_in_use", "bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOT_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    slot_capacity_tokens: int
    slabs: int
    slots: int
    slots_in_use: int
    bytes: int
    def __init__(self, model: _Optional[str] = ..., slot_capacity_tokens: _Optional[int] = ..., slabs: _Optional[int] = ..., slots: _Optional[int] = ..., slots_in_use: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...
