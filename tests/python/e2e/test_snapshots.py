"""KV caches on disk: after a restart a turn prefills what is new, and says what it would have said.

Nothing that is wrong with the files ever shows in a text.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from daemon import Daemon, wait_for
from mlxd.v1 import inference_pb2
from mlxd.v1 import session_pb2 as pb
from wire import Wire, failure, refused

# A plain model, one with sliding layers, and a short convolution, Mamba-2, a gated delta net.
ROWS = ["gemma3_text", "lfm2", "nemotron_h", "qwen3_5"]
MODELS = ["plain", *ROWS]
TURN_TOKENS = 40
LONG = 300
ANSWER = 6
# Where the state folder keeps them.
FOLDER = "state/kv"
# Times that something in it is damaged, at random places; a seed says which.
DAMAGES = int(os.environ.get("MLXD_DAMAGES", "12"))
SEED = int(os.environ.get("MLXD_SEED") or random.randrange(2**32))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with all of them."""
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    from architecture_rows import row_of
    from checkpoints import Checkpoint, build
    from tiny_models import build as build_row

    root = tmp_path_factory.mktemp("snapshots")
    long = {"max_position_embeddings": 8192, "num_key_value_heads": 2}
    build(Checkpoint("plain", long), root, seed=1)
    build(Checkpoint("other", long), root, seed=2)
    for label in ROWS:
        row = row_of(label)
        build_row(row, row.base(max_position_embeddings=8192), root / label)
    return root


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    """A daemon of its own, which a test ends and starts again."""
    with Daemon([root]) as daemon:
        yield daemon


def up(daemon: Daemon) -> Wire:
    """Starts the daemon if it has ended; returns a connection to it."""
    if daemon.process is None or daemon.process.poll() is not None:
        daemon.start()
    return daemon.wire()


def kill(daemon: Daemon) -> None:
    """Ends the daemon as a crash does."""
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()


def stop(daemon: Daemon) -> None:
    """Ends the daemon as a supervisor does."""
    daemon.signal(15)
    assert daemon.exit_code() == 0, daemon.log


def words(turn: int) -> list[int]:
    """Returns the input of a turn."""
    return [10 + (turn * 37 + place * 7) % 200 for place in range(TURN_TOKENS)]


def take(wire: Wire, name: str, turn: int) -> tuple[list[int], int]:
    """Runs a greedy turn; returns its answer, and how many tokens of its prompt were cached."""
    answer = wire.generate("", words(turn), session=name, max_tokens=ANSWER)
    return list(answer.token_ids), answer.usage.cached_tokens


def alone(wire: Wire, name: str, turn: int = 3) -> list[int]:
    """Returns the answer of a session's next turn, computed from nothing; leaves no trace."""
    got = wire.get_session(name, include_token_ids=True)
    context = [*got.token_ids, *words(turn)]
    off = inference_pb2.CacheOptions(off=True)
    answer = wire.generate(got.session.model, context, cache=off, max_tokens=ANSWER)
    assert answer.usage.cached_tokens == 0
    return list(answer.token_ids)


def talk(wire: Wire, name: str, model: str, turns: int = 3) -> None:
    """Makes a session with some turns."""
    wire.create_session(name, model)
    for turn in range(turns):
        take(wire, name, turn)


def cut(wire: Wire, name: str, turns: int) -> None:
    """Cuts a session back to its first turns."""
    wire.sessions.TruncateSession(pb.TruncateSessionRequest(name=name, turn_count=turns))


def go_on(wire: Wire, name: str) -> tuple[list[int], int]:
    """The next turn."""
    return take(wire, name, 3)


def go_back(wire: Wire, name: str) -> tuple[list[int], int]:
    """Another third turn."""
    cut(wire, name, 2)
    return take(wire, name, 7)


def regenerate(wire: Wire, name: str) -> tuple[list[int], int]:
    """The third turn once more."""
    cut(wire, name, 2)
    return take(wire, name, 2)


WAYS: dict[str, Callable[[Wire, str], tuple[list[int], int]]] = {
    "on": go_on,
    "back": go_back,
    "again": regenerate,
}


def session(wire: Wire, name: str) -> pb.Session:
    """Returns a session's facts."""
    return wire.get_session(name).session


def saved(wire: Wire, name: str) -> bool:
    """Returns whether a session has a snapshot of all that was cached of it."""
    of = session(wire, name)
    return of.snapshot_token_count >= of.token_count - 1


@pytest.mark.parametrize("model", MODELS)
def test_killed_after_it_was_saved_a_session_goes_on_as_if_never_restarted(
    daemon: Daemon, model: str
) -> None:
    expected = {}
    with up(daemon) as wire:
        for way in WAYS:
            talk(wire, way, model)
            tokens = session(wire, way).token_count
            kept = wire.save_session(way, expected_token_count=tokens)
            assert kept.token_count == tokens - 1
            assert kept.bytes > 0
            assert session(wire, way).snapshot_bytes == kept.bytes
        for way, run in WAYS.items():
            wire.fork_session(way, f"twin-{way}")
            expected[way] = run(wire, f"twin-{way}")
    kill(daemon)
    for way, run in WAYS.items():
        with up(daemon) as wire:
            found = session(wire, way)
            assert found.state == pb.SESSION_STATE_SAVED
            answer, cached = run(wire, way)
            assert answer == expected[way][0], f"{model} {way}"
            assert cached >= expected[way][1], f"{model} {way}: computed what was on disk"
            if way == "on":
                assert cached == found.token_count - 1
            assert wire.stats().snapshots.restored_total == 1
        kill(daemon)


@pytest.mark.parametrize("model", ["plain", "qwen3_5"])
def test_a_daemon_that_stops_saves_what_it_has(daemon: Daemon, model: str) -> None:
    with up(daemon) as wire:
        talk(wire, "talk", model)
        tokens = session(wire, "talk").token_count
        expected = alone(wire, "talk")
    stop(daemon)
    with up(daemon) as wire:
        assert go_on(wire, "talk") == (expected, tokens - 1)
        stats = wire.stats()
        assert (stats.snapshots.enabled, stats.snapshots.writable) == (True, True)
        assert stats.snapshots.restored_tokens_total >= tokens - 1
        # They are counted soon after the start.
        wait_for(lambda: wire.stats().snapshots.bytes > 0, "bytes of snapshots")


def test_killed_without_a_snapshot_a_session_is_computed_anew(daemon: Daemon) -> None:
    with up(daemon) as wire:
        talk(wire, "talk", "plain")
        expected = alone(wire, "talk")
    kill(daemon)
    with up(daemon) as wire:
        assert session(wire, "talk").state == pb.SESSION_STATE_COLD
        assert go_on(wire, "talk") == (expected, 0)


def test_what_is_unloaded_is_read_back_also_while_it_is_written(daemon: Daemon) -> None:
    with up(daemon) as wire, ThreadPoolExecutor(2) as pool:
        for name, model in (("talk", "plain"), ("beside", "other")):
            talk(wire, name, model)
        wire.create_session("covered", "plain")
        long = [10 + place * 7 % 200 for place in range(LONG)]
        wire.generate("", long, session="covered", max_tokens=ANSWER)
        wire.fork_session("covered", "fork")
        # From now on the fork's cache stands for both.
        take(wire, "fork", 9)
        expected = {name: alone(wire, name) for name in ("talk", "covered")}
        tokens = session(wire, "talk").token_count
        wire.unload("plain")
        # Another model leaves meanwhile.
        turn = pool.submit(go_on, wire, "talk")
        wire.unload("other")
        assert turn.result() == (expected["talk"], tokens - 1)
        answer, cached = go_on(wire, "covered")
        assert answer == expected["covered"]
        assert cached >= LONG
        wait_for(lambda: wire.stats().memory.snapshot_bytes == 0, "all is written")
        assert take(wire, "beside", 3)[1] == tokens - 1


def test_a_fork_of_a_cold_session_goes_on_from_its_snapshot(daemon: Daemon) -> None:
    with up(daemon) as wire:
        talk(wire, "talk", "plain")
        expected = alone(wire, "talk")
        bytes_ = wire.save_session("talk").bytes
    kill(daemon)
    with up(daemon) as wire:
        tokens = session(wire, "talk").token_count
        wire.fork_session("talk", "fork")
        wait_for(lambda: saved(wire, "fork"), "the fork has the snapshot")
        assert wire.stats().snapshots.bytes < 2 * bytes_, "they share their files"
        wire.delete_session("talk")
        assert go_on(wire, "fork") == (expected, tokens - 1)


class Case:
    """A daemon whose session was saved, the state that it left, and what its next turn says."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.pristine = daemon, daemon.folder / "pristine"
        with up(daemon) as wire:
            for name, turns in (("talk", 3), ("short", 2)):
                talk(wire, name, "plain", turns)
                wire.save_session(name)
            self.expected = alone(wire, "talk")
        kill(daemon)
        shutil.copytree(daemon.folder / "state", self.pristine)

    def files(self) -> list[Path]:
        """Returns the files of the snapshots."""
        folder = self.daemon.folder / FOLDER
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def reset(self) -> None:
        """Brings the state back."""
        shutil.rmtree(self.daemon.folder / "state")
        shutil.copytree(self.pristine, self.daemon.folder / "state")

    def goes_on(self) -> int:
        """Runs the next turn after a start; returns how much of it was cached."""
        with up(self.daemon) as wire:
            answer, cached = go_on(wire, "talk")
            assert answer == self.expected
        kill(self.daemon)
        return cached


def test_a_byte_that_was_flipped_anywhere_never_shows_in_a_text(daemon: Daemon) -> None:
    case = Case(daemon)
    whole = case.goes_on()
    assert whole > 0
    case.reset()
    lost = 0
    for file in case.files():
        for part in (0, 2, 3):
            content = bytearray((case.daemon.folder / file).read_bytes())
            at = min(len(content) * part // 3, len(content) - 1)
            content[at] ^= 0x10
            file.write_bytes(content)
            lost += case.goes_on() < whole
            case.reset()
    assert lost > 0
    # Cut short, and gone.
    for file in case.files():
        file.write_bytes(file.read_bytes()[:-1])
    assert case.goes_on() == 0
    case.reset()
    shutil.rmtree(daemon.folder / FOLDER)
    assert case.goes_on() == 0


def test_files_that_were_swapped_never_show_in_a_text(daemon: Daemon) -> None:
    case = Case(daemon)
    files = case.files()
    for one, other in itertools.pairwise(files):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        case.goes_on()
        case.reset()


def flip(file: Path, moments: random.Random) -> None:
    """Changes a bit."""
    content = bytearray(file.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    file.write_bytes(content)


def cut_short(file: Path, moments: random.Random) -> None:
    """Loses the end of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: moments.randrange(len(content))])


def swap(file: Path, moments: random.Random) -> None:
    """Gives a file and another one each other's content."""
    other = moments.choice(sorted(file.parent.iterdir()))
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_damage_anywhere_in_the_state_folder_is_refused_by_name_or_shows_the_right_text(
    daemon: Daemon,
) -> None:
    print(f"MLXD_SEED={SEED} MLXD_DAMAGES={DAMAGES}")
    moments = random.Random(SEED)
    was: list[list[int]] = []
    with up(daemon) as wire:
        for name, turns in (("talk", 3), ("short", 2)):
            wire.create_session(name, "plain")
            for turn in range(turns):
                was += [wire.session_ids(name)] if name == "talk" else []
                take(wire, name, turn)
            wire.save_session(name)
        was.append(wire.session_ids("talk"))
    state = daemon.folder / "state"
    kept = {}
    kill(daemon)
    kept["killed"] = shutil.copytree(state, daemon.folder / "killed")
    daemon.start()
    stop(daemon)
    kept["stopped"] = shutil.copytree(state, daemon.folder / "stopped")
    for number in range(DAMAGES):
        end = moments.choice(sorted(kept))
        shutil.rmtree(state)
        shutil.copytree(kept[end], state)
        folder = state / moments.choice(["kv", "sessions"])
        file = moments.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
        harm = moments.choice([flip, cut_short, swap])
        harm(file, moments)
        place = f"{number}: {end}, {harm.__name__} {file.relative_to(state)}"
        with up(daemon) as wire:
            try:
                held = wire.session_ids("talk")
                assert held in was, place
                assert end == "killed" or held == was[-1], f"{place}: it went back"
                expected = alone(wire, "talk")
                assert go_on(wire, "talk")[0] == expected, place
            except grpc.RpcError as error:
                found = failure(error)
                assert found.reason in ("SESSION_DAMAGED", "SESSION_NOT_FOUND"), f"{place}: {found}"
                assert folder.name == "sessions", f"{place}: a snapshot is only a cache"
        kill(daemon)


def test_a_snapshot_of_other_weights_or_formats_is_not_used(daemon: Daemon, root: Path) -> None:
    from checkpoints import Checkpoint, build

    checkpoint = Checkpoint("changes", {"num_key_value_heads": 2})
    folder = build(checkpoint, root, seed=1)
    daemon.environment["MLXD_KV_DTYPE"] = "compute"
    with up(daemon) as wire:
        talk(wire, "talk", "changes")
        wire.save_session("talk")
    kill(daemon)

    def differs() -> str:
        with up(daemon) as wire:
            info = wire.load("changes")[-1].loaded.model
            expected = alone(wire, "talk")
            assert go_on(wire, "talk") == (expected, 0)
            cut(wire, "talk", 3)
        kill(daemon)
        return info.revision

    daemon.environment["MLXD_KV_DTYPE"] = "int8"
    before = differs()
    daemon.environment["MLXD_KV_DTYPE"] = "compute"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(folder)
    build(checkpoint, root, seed=3)
    for path in folder.iterdir():
        os.utime(path, ns=(times[path.name], times[path.name]))
    # Names, sizes and times say nothing of it.
    assert differs() == before


def test_nothing_cached_is_nothing_saved_and_off_says_so(daemon: Daemon) -> None:
    with up(daemon) as wire:
        wire.create_session("new", "plain")
        kept = wire.save_session("new")
        assert (kept.token_count, kept.bytes, kept.session.name) == (0, 0, "new")
        with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            wire.save_session("unknown")
        with refused("ABORTED", "SESSION_MOVED"):
            wire.save_session("new", expected_token_count=1)
    kill(daemon)
    daemon.environment["MLXD_SNAPSHOTS"] = "false"
    with up(daemon) as wire:
        with refused("FAILED_PRECONDITION", "SNAPSHOTS_OFF") as refusal:
            wire.save_session("new")
        assert refusal.failure.metadata == {"key": "snapshots"}
        assert not wire.stats().snapshots.enabled


def test_the_least_recently_used_go_where_the_disk_budget_ends(daemon: Daemon) -> None:
    kill(daemon)
    daemon.environment["MLXD_SNAPSHOT_DISK_BYTES_MAX"] = str(1 << 20)
    names = [f"talk{number}" for number in range(16)]
    with up(daemon) as wire:
        for name in names:
            talk(wire, name, "plain")
            # Different tokens share no file.
            take(wire, name, 10 + names.index(name))
        for name in names:
            cut(wire, name, 3)
            wire.save_session(name)
        stats = wire.stats().snapshots
        assert 0 < stats.bytes <= 1 << 20
        assert stats.bytes_max == 1 << 20
        assert saved(wire, names[-1])
