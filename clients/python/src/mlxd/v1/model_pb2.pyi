import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTE_DTYPE_UNSPECIFIED: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_FLOAT32: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_BFLOAT16: _ClassVar[ComputeDtype]
    COMPUTE_DTYPE_FLOAT16: _ClassVar[ComputeDtype]

class KvDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_DTYPE_UNSPECIFIED: _ClassVar[KvDtype]
    KV_DTYPE_COMPUTE: _ClassVar[KvDtype]
    KV_DTYPE_INT8: _ClassVar[KvDtype]

class QuantMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANT_MODE_UNSPECIFIED: _ClassVar[QuantMode]
    QUANT_MODE_AFFINE: _ClassVar[QuantMode]
    QUANT_MODE_MXFP4: _ClassVar[QuantMode]
    QUANT_MODE_NVFP4: _ClassVar[QuantMode]
    QUANT_MODE_MXFP8: _ClassVar[QuantMode]

class QuantRecipe(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANT_RECIPE_UNSPECIFIED: _ClassVar[QuantRecipe]
    QUANT_RECIPE_MIXED_2_6: _ClassVar[QuantRecipe]
    QUANT_RECIPE_MIXED_3_4: _ClassVar[QuantRecipe]
    QUANT_RECIPE_MIXED_3_6: _ClassVar[QuantRecipe]
    QUANT_RECIPE_MIXED_4_6: _ClassVar[QuantRecipe]

class LoadPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_PHASE_UNSPECIFIED: _ClassVar[LoadPhase]
    LOAD_PHASE_RESOLVING: _ClassVar[LoadPhase]
    LOAD_PHASE_LOADING: _ClassVar[LoadPhase]
    LOAD_PHASE_WARMING: _ClassVar[LoadPhase]
    LOAD_PHASE_DOWNLOADING: _ClassVar[LoadPhase]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_AVAILABLE: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_RESIDENT: _ClassVar[ModelState]
COMPUTE_DTYPE_UNSPECIFIED: ComputeDtype
COMPUTE_DTYPE_FLOAT32: ComputeDtype
COMPUTE_DTYPE_BFLOAT16: ComputeDtype
COMPUTE_DTYPE_FLOAT16: ComputeDtype
KV_DTYPE_UNSPECIFIED: KvDtype
KV_DTYPE_COMPUTE: KvDtype
KV_DTYPE_INT8: KvDtype
QUANT_MODE_UNSPECIFIED: QuantMode
QUANT_MODE_AFFINE: QuantMode
QUANT_MODE_MXFP4: QuantMode
QUANT_MODE_NVFP4: QuantMode
QUANT_MODE_MXFP8: QuantMode
QUANT_RECIPE_UNSPECIFIED: QuantRecipe
QUANT_RECIPE_MIXED_2_6: QuantRecipe
QUANT_RECIPE_MIXED_3_4: QuantRecipe
QUANT_RECIPE_MIXED_3_6: QuantRecipe
QUANT_RECIPE_MIXED_4_6: QuantRecipe
LOAD_PHASE_UNSPECIFIED: LoadPhase
LOAD_PHASE_RESOLVING: LoadPhase
LOAD_PHASE_LOADING: LoadPhase
LOAD_PHASE_WARMING: LoadPhase
LOAD_PHASE_DOWNLOADING: LoadPhase
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_AVAILABLE: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_RESIDENT: ModelState

class QuantizeOptions(_message.Message):
    __slots__ = ("bits", "group_size", "mode", "recipe")
    BITS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    bits: int
    group_size: int
    mode: QuantMode
    recipe: QuantRecipe
    def __init__(self, bits: _Optional[int] = ..., group_size: _Optional[int] = ..., mode: _Optional[_Union[QuantMode, str]] = ..., recipe: _Optional[_Union[QuantRecipe, str]] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "validate_only", "compute_dtype", "kv_dtype", "keep_alive", "pin", "quantize")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_FIELD_NUMBER: _ClassVar[int]
    model: str
    validate_only: bool
    compute_dtype: ComputeDtype
    kv_dtype: KvDtype
    keep_alive: _duration_pb2.Duration
    pin: bool
    quantize: QuantizeOptions
    def __init__(self, model: _Optional[str] = ..., validate_only: bool = ..., compute_dtype: _Optional[_Union[ComputeDtype, str]] = ..., kv_dtype: _Optional[_Union[KvDtype, str]] = ..., keep_alive: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pin: bool = ..., quantize: _Optional[_Union[QuantizeOptions, _Mapping]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("progress", "loaded", "validated")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    VALIDATED_FIELD_NUMBER: _ClassVar[int]
    progress: LoadProgress
    loaded: ModelLoaded
    validated: LoadValidated
    def __init__(self, progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., loaded: _Optional[_Union[ModelLoaded, _Mapping]] = ..., validated: _Optional[_Union[LoadValidated, _Mapping]] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("phase", "done_bytes", "total_bytes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    phase: LoadPhase
    done_bytes: int
    total_bytes: int
    def __init__(self, phase: _Optional[_Union[LoadPhase, str]] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class ModelLoaded(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class LoadValidated(_message.Message):
    __slots__ = ("fits", "needed_bytes", "available_bytes", "evictions", "rule", "budget_bytes", "in_the_way")
    FITS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_THE_WAY_FIELD_NUMBER: _ClassVar[int]
    fits: bool
    needed_bytes: int
    available_bytes: int
    evictions: _containers.RepeatedCompositeFieldContainer[Eviction]
    rule: str
    budget_bytes: int
    in_the_way: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fits: bool = ..., needed_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., evictions: _Optional[_Iterable[_Union[Eviction, _Mapping]]] = ..., rule: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., in_the_way: _Optional[_Iterable[str]] = ...) -> None: ...

class Eviction(_message.Message):
    __slots__ = ("model", "bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    bytes: int
    def __init__(self, model: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "resident_only")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_ONLY_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    resident_only: bool
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., resident_only: bool = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token", "problems")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    next_page_token: str
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "revision", "state", "architecture", "context_length", "vocabulary_size", "parameter_count", "stored_as", "computes_in", "file_bytes", "weight_bytes", "kv_slab_bytes", "kv_idle_bytes", "kv_bytes_per_token", "running_sequences", "queued_sequences", "load_time", "last_use_time", "problem", "pinned", "keep_alive", "expire_time", "session_count", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    STORED_AS_FIELD_NUMBER: _ClassVar[int]
    COMPUTES_IN_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_IDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    SESSION_COUNT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    state: ModelState
    architecture: str
    context_length: int
    vocabulary_size: int
    parameter_count: int
    stored_as: str
    computes_in: str
    file_bytes: int
    weight_bytes: int
    kv_slab_bytes: int
    kv_idle_bytes: int
    kv_bytes_per_token: int
    running_sequences: int
    queued_sequences: int
    load_time: _timestamp_pb2.Timestamp
    last_use_time: _timestamp_pb2.Timestamp
    problem: str
    pinned: bool
    keep_alive: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    session_count: int
    path: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., architecture: _Optional[str] = ..., context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., parameter_count: _Optional[int] = ..., stored_as: _Optional[str] = ..., computes_in: _Optional[str] = ..., file_bytes: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., kv_slab_bytes: _Optional[int] = ..., kv_idle_bytes: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., running_sequences: _Optional[int] = ..., queued_sequences: _Optional[int] = ..., load_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_use_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., problem: _Optional[str] = ..., pinned: bool = ..., keep_alive: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., session_count: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...
