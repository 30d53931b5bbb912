"""Which models are in memory: who makes room for whom, how long they stay, what they give back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from daemon import Daemon, default_model, wait_for
from mlxd.v1 import inference_pb2, model_pb2, server_pb2
from wire import CALL_S, Wire, refused

CLIENTS = 16
CYCLES = 100
# The first cycles fill allocators' and the interpreter's pools.
SETTLED = 20
MIB = 1 << 20
# Of a small model, what a step computes with and a first KV cache.
WORKING_BYTES = 8 * MIB
# The same of the default model, which has 30 layers.
REAL_WORKING_BYTES = 64 * MIB
REAL_CYCLES = 5
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three models of the same size, each of four shards."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from checkpoints import Checkpoint, build

    root = tmp_path_factory.mktemp("residency")
    size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    for seed, name in enumerate(NAMES):
        build(Checkpoint(name, size, shards=4), root, seed=seed)
    return root


@pytest.fixture(scope="module")
def weights(root: Path) -> int:
    """The bytes of one model's weights, which compute as they are stored."""
    return weights_bytes(root / "a")


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    """A daemon without resident models."""
    with Daemon([root]) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A connection to it."""
    with daemon.wire() as wire:
        yield wire


def weights_bytes(folder: Path) -> int:
    """Returns the bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def seconds(count: float) -> Duration:
    """Makes a duration."""
    duration = Duration()
    duration.FromNanoseconds(round(count * 1e9))
    return duration


def test_the_right_model_goes_before_the_next_load_begins(root: Path, weights: int) -> None:
    shard = max(file.stat().st_size for file in (root / "a").glob("*.safetensors"))
    budget = 2 * weights + WORKING_BYTES
    config = {"memory_budget_bytes": budget}
    with Daemon([root], config) as daemon, daemon.wire() as wire:
        wire.load("b", pin=True)
        seen = []
        for name in ["a", "c", "a", "b", "c"]:
            wire.generate(name, [5, 6, 7], max_tokens=3)
            seen.append(wire.resident())
        assert seen == [["a", "b"], ["b", "c"], ["a", "b"], ["a", "b"], ["b", "c"]]
        stats = wire.stats()
        assert (stats.loads_total, stats.evictions_total) == (5, 3)
        assert stats.memory.mlx_peak_bytes <= budget + shard
        validated = wire.load("a", validate_only=True)[0].validated
        assert validated.fits
        assert [gone.model for gone in validated.evictions] == ["c"]
        assert validated.evictions[0].bytes >= weights * 0.99
        wire.load("c", pin=True)
        verdict = wire.load("a", validate_only=True)[0].validated
        assert not verdict.fits
        assert verdict.rule.startswith("pinned models hold "), verdict
        assert list(verdict.in_the_way) == ["b"]
        with refused("RESOURCE_EXHAUSTED", "MEMORY_BUDGET") as refusal:
            wire.load("a")
        assert refusal.failure.metadata["in_the_way"] == "b"
        assert not refusal.failure.has_retry_info


@pytest.mark.real
def test_of_three_real_models_two_stay_and_one_gives_its_memory_back(tmp_path: Path) -> None:
    folder = default_model()
    if not (folder / "config.json").exists():
        pytest.skip(f"no default model in {folder}: run `make model` or set MLXD_MODEL_DIR")
    for name in NAMES:
        (tmp_path / name).symlink_to(folder)
    weights = weights_bytes(folder)
    budget = 2 * weights + REAL_WORKING_BYTES
    config = {"memory_budget_bytes": budget, "model_links_anywhere": True}
    with Daemon([tmp_path], config) as daemon, daemon.wire() as wire:
        wire.load("b", pin=True)
        seen, held = [], []
        for _ in range(REAL_CYCLES):
            for name in ("a", "c"):
                reply = wire.generate(name, prompt="The capital of France is", max_tokens=4)
                assert reply.text.startswith(" Paris")
                seen.append(wire.resident())
            held.append(process_bytes(wire))
        assert seen == [["a", "b"], ["b", "c"]] * REAL_CYCLES
        stats = wire.stats()
        assert (stats.loads_total, stats.evictions_total) == (
            1 + 2 * REAL_CYCLES,
            2 * REAL_CYCLES - 1,
        )
        # The weights are one shard.
        assert stats.memory.mlx_peak_bytes <= budget + weights
        assert max(held) - min(held) < weights // 2, "nothing piles up"
        loaded = process_bytes(wire)
        wire.unload("c")
        left = loaded - weights * 3 // 4
        wait_for(lambda: process_bytes(wire) <= left, "the system has the weights' memory back")


def test_a_model_in_use_is_not_evicted_and_the_refusal_says_so(root: Path, weights: int) -> None:
    # What the stream may still grow by leaves no room for another model.
    config = {"memory_budget_bytes": weights + 40 * MIB}
    with Daemon([root], config) as daemon, daemon.wire() as wire:
        stream = wire.stream("a", [5, 6, 7], max_tokens=1500)
        next(stream)
        with refused("RESOURCE_EXHAUSTED", "MEMORY_BUDGET") as refusal:
            wire.generate("b", [5], max_tokens=1)
        assert refusal.failure.metadata["in_the_way"] == "a"
        assert refusal.failure.metadata["rule"].startswith("models in use hold ")
        assert refusal.failure.has_retry_info
        stream.cancel()
        wait_for(lambda: wire.stats().running_sequences == 0, "the stream has ended")
        wire.generate("b", [5], max_tokens=1)
        assert "b" in wire.resident()


def test_a_load_that_cannot_succeed_evicts_nothing(
    root: Path, weights: int, tmp_path: Path
) -> None:
    odd = shutil.copytree(root / "a", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    settings = {"memory_budget_bytes": weights + 40 * MIB}
    with Daemon([root, tmp_path], settings) as daemon, daemon.wire() as wire:
        wire.load("a")
        for ask in (
            lambda: wire.generate("odd", [5], max_tokens=1),
            lambda: wire.load("odd", validate_only=True),
        ):
            with refused("FAILED_PRECONDITION", "MODEL_UNSUPPORTED"):
                ask()
        assert wire.resident() == ["a"]
        assert wire.stats().evictions_total == 0


def test_another_format_than_that_of_a_resident_model_is_refused(wire: Wire) -> None:
    wire.load("a")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "quantize"):
        wire.load("a", quantize=model_pb2.QuantizeOptions(bits=4))
    wire.load("a", compute_dtype=model_pb2.COMPUTE_DTYPE_FLOAT32)


def test_what_never_fits_is_refused_at_once_with_the_budget(root: Path, weights: int) -> None:
    config = {"memory_budget_bytes": weights // 2}
    with Daemon([root], config) as daemon, daemon.wire() as wire:
        with refused("FAILED_PRECONDITION", "MODEL_TOO_LARGE") as refusal:
            wire.load("a")
        metadata = refusal.failure.metadata
        assert metadata["budget_bytes"] == str(weights // 2)
        assert metadata["rule"] == "larger than the whole budget"
        assert wire.stats().loads_total == 0


def read_bytes(daemon: Daemon) -> int:
    """Returns the bytes that the process has read from files."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_sixteen_who_load_at_once_read_the_files_once(
    daemon: Daemon, wire: Wire, weights: int
) -> None:
    def load(_: int) -> list[Any]:
        with daemon.wire() as own:
            return own.load("a")

    for round_ in (1, 2):
        before = read_bytes(daemon)
        with ThreadPoolExecutor(CLIENTS) as pool:
            loads = list(pool.map(load, range(CLIENTS)))
        assert [events[-1].WhichOneof("event") for events in loads] == ["loaded"] * CLIENTS
        assert wire.stats().loads_total == round_
        assert read_bytes(daemon) - before < 1.5 * weights
        wire.unload("a")


def test_an_expired_model_is_loaded_once_for_all_who_come_next(daemon: Daemon, wire: Wire) -> None:
    wire.generate("a", [5], max_tokens=1, keep_alive=seconds(0))
    wait_for(lambda: not wire.resident(), "it is unloaded after use")
    assert wire.stats().expirations_total == 1

    def generate(seed: int) -> int:
        with daemon.wire() as own:
            return len(own.generate("a", [5 + seed], max_tokens=2).token_ids)

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(generate, range(10))) == [2] * 10
    assert wire.stats().loads_total == 2


def test_an_idle_model_goes_when_its_time_is_over_though_nobody_calls(root: Path) -> None:
    with Daemon([root], {"model_keep_alive": "1s"}) as daemon, daemon.wire() as wire:
        wire.generate("a", [5], max_tokens=1)
        wait_for(lambda: "unloaded: nobody has used it" in daemon.log, "it expires")
        assert wire.resident() == []
        shown = {}
        for name, time_s in (("b", -1), ("c", 600)):
            wire.generate(name, [5], max_tokens=1, keep_alive=seconds(time_s))
            request = model_pb2.GetModelRequest(model=name)
            shown[name] = wire.models.GetModel(request, timeout=CALL_S).model
            assert (shown[name].keep_alive.seconds, shown[name].pinned) == (time_s, False)
        assert not shown["b"].HasField("expire_time")
        assert shown["c"].expire_time.seconds > 0


def test_a_score_says_how_long_its_model_stays(wire: Wire) -> None:
    request = inference_pb2.ScoreRequest(model="a", text="one two", keep_alive=seconds(0))
    assert wire.inference.Score(request, timeout=CALL_S).usage.prompt_tokens > 1
    wait_for(lambda: not wire.resident(), "it is unloaded after use")
    assert wire.stats().expirations_total == 1


def test_questions_wake_no_model(daemon: Daemon, wire: Wire) -> None:
    wire.stats()
    daemon.healthy()
    wire.models.GetModel(model_pb2.GetModelRequest(model="a"), timeout=CALL_S)
    wire.models.ListModels(model_pb2.ListModelsRequest(), timeout=CALL_S)
    wire.server.Capabilities(server_pb2.CapabilitiesRequest(models=NAMES), timeout=CALL_S)
    count = inference_pb2.CountTokensRequest(model="a", prompt="one two")
    wire.inference.CountTokens(count, timeout=CALL_S)
    wire.load("a", validate_only=True)
    assert (wire.stats().loads_total, wire.resident()) == (0, [])


def test_questions_extend_no_stay(daemon: Daemon, wire: Wire) -> None:
    def state() -> model_pb2.ModelInfo:
        request = model_pb2.GetModelRequest(model="a")
        return wire.models.GetModel(request, timeout=CALL_S).model

    count = inference_pb2.CountTokensRequest(model="a", prompt="one two")
    capabilities = server_pb2.CapabilitiesRequest(models=NAMES)
    questions: list[Callable[[], Any]] = [
        wire.stats,
        daemon.healthy,
        state,
        lambda: wire.models.ListModels(model_pb2.ListModelsRequest(), timeout=CALL_S),
        lambda: wire.server.Capabilities(capabilities, timeout=CALL_S),
        lambda: wire.inference.CountTokens(count, timeout=CALL_S),
        lambda: wire.get_session("s", include_token_ids=True),
        lambda: wire.load("a", validate_only=True),
        lambda: wire.load("a", validate_only=True, keep_alive=seconds(900), pin=True),
    ]
    wire.create_session("s", "a")
    wire.generate(ids=[5, 6, 7], max_tokens=1, session="s", keep_alive=seconds(600))
    before = state()
    assert before.HasField("expire_time")
    for ask in questions:
        ask()
        now = state()
        assert now.last_use_time == before.last_use_time
        assert (now.keep_alive, now.pinned) == (before.keep_alive, before.pinned)
    # Its time is shorter than all the rounds together: whatever extends it would keep it forever.
    wire.generate(ids=[8], max_tokens=1, session="s", keep_alive=seconds(2))

    def has_left() -> bool:
        for ask in questions:
            ask()
        return not wire.resident()

    wait_for(has_left, "it leaves, though questions come all the time")
    stats = wire.stats()
    assert (stats.loads_total, stats.expirations_total) == (1, 1)


def test_a_load_ends_with_the_last_who_waits(daemon: Daemon, wire: Wire, weights: int) -> None:
    def state() -> int:
        return wire.models.GetModel(
            model_pb2.GetModelRequest(model="a"), timeout=CALL_S
        ).model.state

    def load(name: str) -> Any:
        call = wire.models.LoadModel(model_pb2.LoadModelRequest(model=name), timeout=CALL_S)
        next(call)
        return call

    def left_in_line() -> bool:
        """Loads run one at a time: `a` is left while others do, unless they are quicker than we."""
        others = [load("b"), load("c")]
        call = load("a")
        wait_for(lambda: state() != model_pb2.MODEL_STATE_AVAILABLE, "it is in the line")
        call.cancel()
        wait_for(lambda: state() != model_pb2.MODEL_STATE_LOADING, "it leaves the line")
        for other in others:
            assert list(other)[-1].HasField("loaded")
        was_left = state() == model_pb2.MODEL_STATE_AVAILABLE
        for name in wire.resident():
            wire.unload(name)
        return was_left

    wait_for(left_in_line, "a load that nobody waits for ends before the model is there", 120)
    (line,) = [line for line in daemon.log.splitlines() if "nobody waits for the load" in line]
    assert "model=a" in line
    wait_for(lambda: wire.stats().memory.mlx_active_bytes < weights, "nothing is left of it")
    wire.generate("a", [5], max_tokens=1)


def process_bytes(wire: Wire) -> int:
    """Returns the process's resident memory."""
    return wire.stats().memory.process_resident_bytes


def test_a_hundred_cycles_give_everything_back(wire: Wire, weights: int) -> None:
    def held() -> tuple[int, int]:
        memory = wire.stats().memory
        return memory.mlx_active_bytes, memory.mlx_cache_bytes

    def cycle() -> None:
        wire.load("a")
        wire.generate("a", [5, 6, 7], max_tokens=2)
        loaded = process_bytes(wire)
        wire.unload("a")
        left = loaded - weights * 3 // 4
        wait_for(lambda: process_bytes(wire) <= left, "the system has the weights' memory back")

    cycle()
    # A thread frees what was unloaded.
    wait_for(lambda: held() < (weights, 0) and held()[1] == 0, "the weights are free")
    start = held()
    resident = []
    for _ in range(CYCLES):
        cycle()
        wait_for(lambda: held() == start, "everything is free")
        resident.append(process_bytes(wire))
    slope = slope_of(resident[SETTLED:])
    assert slope <= MIB, f"{slope / MIB:.3f} MiB a cycle: {[bytes_ // MIB for bytes_ in resident]}"


def slope_of(values: list[int]) -> float:
    """Returns the slope of the line that fits best."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    steps = range(len(values))
    rise = sum((step - middle) * (value - mean) for step, value in zip(steps, values, strict=True))
    return rise / sum((step - middle) ** 2 for step in steps)


def test_sessions_outlive_their_model(wire: Wire) -> None:
    wire.create_session("s", "a")
    wire.create_session("t", "b")
    for session in ("s", "t"):
        wire.generate(ids=[5, 6, 7], max_tokens=3, session=session)
    wire.unload("a")
    assert wire.get_session("s").session.token_count == 6
    assert wire.generate(ids=[8], max_tokens=1, session="t").usage.cached_tokens > 0
    turn = wire.generate(ids=[8], max_tokens=1, session="s")
    # Computed again, or read from a snapshot: whichever is quicker here.
    assert turn.usage.cached_tokens in (0, 5)
    assert turn.session_token_count == 8


def test_only_a_load_takes_files_that_changed(root: Path, weights: int, tmp_path: Path) -> None:
    from checkpoints import Checkpoint, build

    folder = shutil.copytree(root / "a", tmp_path / "m")
    prompt = [5, 6, 7]
    settings = {"memory_budget_bytes": 4 * weights + WORKING_BYTES}
    with Daemon([root, tmp_path], settings) as daemon, daemon.wire() as wire:
        old, new = (wire.generate(name, prompt, max_tokens=8).token_ids for name in ("a", "b"))
        assert old != new
        first = wire.load("m", pin=True)[-1].loaded.model
        for file in (root / "b").glob("*.safetensors"):
            shutil.copy(file, folder / "fresh")
            os.replace(folder / "fresh", folder / file.name)
        assert wire.load("a")[-1].loaded.model.name == "a"
        assert wire.generate("m", prompt, max_tokens=8).token_ids == old
        stream = wire.stream("m", prompt, max_tokens=1500)
        next(stream)
        with refused("FAILED_PRECONDITION", "MODEL_BUSY"):
            wire.load("m")
        stream.cancel()
        wait_for(lambda: wire.stats().running_sequences == 0, "the stream has ended")
        second = wire.load("m")[-1].loaded.model
        assert second.revision != first.revision
        assert second.pinned
        assert wire.generate("m", prompt, max_tokens=8).token_ids == new
        loads = wire.stats().loads_total
        large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
        shutil.rmtree(folder)
        build(Checkpoint("m", large), tmp_path, seed=1)
        verdict = wire.load("m", validate_only=True)[0].validated
        assert not verdict.fits
        with refused("FAILED_PRECONDITION", "MODEL_TOO_LARGE"):
            wire.load("m")
        assert wire.generate("m", prompt, max_tokens=8).token_ids == new, "it goes on"
        (folder / "config.json").write_text("{")
        assert wire.load("m")[-1].loaded.model.revision == second.revision
        assert wire.stats().loads_total == loads, "what cannot be used replaces nothing"


def test_a_hangup_reloads_what_can_change(root: Path, weights: int) -> None:
    with Daemon([root], {"sessions_max": 5}) as daemon, daemon.wire() as wire:
        for name in ("a", "b"):
            wire.generate(name, [5], max_tokens=1)
        file = daemon.folder / "config.toml"
        file.write_text('sessions_max = "many"\n')
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: "the configuration stays as it was" in daemon.log, "a bad file is refused")
        assert wire.resident() == ["a", "b"]
        budget = weights + WORKING_BYTES
        file.write_text(f"sessions_max = 6\nmemory_budget_bytes = {budget}\n")
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: wire.resident() == ["b"], "the one used least recently goes")
        assert "take a restart" in daemon.log
        assert "sessions_max" in daemon.log
        assert wire.capabilities().limits.memory_budget_bytes == budget
        section = "[model.b]\npin = true\n"
        file.write_text(f"memory_budget_bytes = {budget}\nauto_load = false\n{section}")
        daemon.signal(signal.SIGHUP)

        def pinned() -> bool:
            request = model_pb2.GetModelRequest(model="b")
            return wire.models.GetModel(request, timeout=CALL_S).model.pinned

        wait_for(pinned, "the model's section is taken over")
        with refused("FAILED_PRECONDITION", "MODEL_NOT_LOADED"):
            wire.generate("a", [5], max_tokens=1)
