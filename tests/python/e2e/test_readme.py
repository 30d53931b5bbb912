"""Every code block of the documentation runs, or its rule here says what is checked instead.

Blocks name their language. Python blocks of one document run one after the other in one process,
shell blocks line by line, against a daemon that serves the default model. A command without a rule
fails.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoints import Checkpoint, build
from daemon import REPOSITORY, Daemon, binary, default_model, wait_for
from loopback_hub import LoopbackHub

COMMAND_S = 240.0
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/**/*.md", "clients/*/*.md", "src/**/*.md", "tests/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
SHELL = {"sh", "bash", "console"}
# Not run: `text` is a picture or what a program printed.
INERT = {"text", "mermaid"}
# `cargo test --doc` compiles them.
DOC_TESTED = {Path("clients/rust/README.md")}


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, the line of its fence, its language and its text."""

    document: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Place:
    """Where commands run: a home folder with `models` in it, and the daemon's address."""

    home: Path
    environment: dict[str, str]

    def run(self, words: list[str], typed: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; without a typed line there is nothing on stdin."""
        stdin = {"input": typed} if typed else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            words,
            cwd=self.home,
            env=self.environment,
            **stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )


def blocks(document: Path) -> Iterator[Block]:
    """Yields a document's fenced blocks."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        language = re.split(r"[,\s]", found[1])[0]
        yield Block(document, line, language, found[2])


def commands(block: Block) -> Iterator[list[str]]:
    """Yields the words of a shell block's commands, without comments and what was printed."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        words = shlex.split(line, comments=True)
        while "&&" in words:
            end = words.index("&&")
            yield words[:end]
            words = words[end + 1 :]
        if words:
            yield words


ALL = [block for document in DOCUMENTS for block in blocks(document)]
COMMANDS = [
    pytest.param(words, id=f"{block.document}:{block.line}:{' '.join(words)[:60]}")
    for block in ALL
    if block.language in SHELL
    for words in commands(block)
]


@pytest.fixture(scope="module")
def place(real_daemon: tuple[Daemon, str]) -> Iterator[Place]:
    """A home folder of a person who has the default model in ~/models, beside the shared daemon."""
    daemon, _ = real_daemon
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(default_model().parent)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLXD_", "XDG_"))}
        environment |= {"HOME": folder, "MLXD_ADDRESS": f"unix://{daemon.socket}"}
        environment["PYTHONPATH"] = str(REPOSITORY / "clients" / "python" / "src")
        yield Place(home, environment)


# Rules for commands


def serve(place: Place, words: list[str]) -> None:
    """Starts a second daemon on the default socket, which SIGTERM ends."""
    process = subprocess.Popen(
        words, cwd=place.home, env=place.environment, stderr=subprocess.PIPE, text=True
    )
    socket = place.home / ".mlxd" / "mlxd.sock"
    try:
        wait_for(lambda: process.poll() is not None or socket.exists(), f"{socket} appears")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=COMMAND_S)
    finally:
        process.kill()
    assert process.returncode == 0, log


def chat(place: Place, words: list[str]) -> None:
    """Types two lines."""
    done = place.run([*words, "--max-tokens", "8"], typed="Hello.\n/stats\n")
    assert done.returncode == 0, done.stderr


def bench(place: Place, words: list[str]) -> None:
    """Measures little: the options are what is shown, not the numbers."""
    for option, value in (("--requests", "2"), ("--output-tokens", "2"), ("--long-prefill", "40")):
        if option in words:
            words[words.index(option) + 1] = value
        elif option != "--long-prefill":
            words += [option, value]
    runs(place, words)


def load(place: Place, words: list[str]) -> None:
    """Loads the named repository from a Hugging Face cache, on a daemon of its own."""
    repository = next(word for word in words[2:] if not word.startswith("-"))
    pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")
    if "/" not in repository:
        return runs(place, words)
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder:
        cached = Path(folder) / "hub" / f"models--{repository.replace('/', '--')}"
        build(Checkpoint("0" * 40), cached / "snapshots")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        with Daemon([], environment={"HF_HOME": folder}) as daemon:
            environment = {**place.environment, "MLXD_ADDRESS": f"unix://{daemon.socket}"}
            runs(Place(place.home, environment), words)
    return None


def pull(place: Place, words: list[str]) -> None:
    """Downloads the named repository from a hub on loopback."""
    repository = next(word for word in words[2:] if not word.startswith("-"))
    words = [word.replace("@revision", "@main") for word in words]
    with LoopbackHub() as hub, tempfile.TemporaryDirectory(prefix="mlxd-") as folder:
        files = {"config.json": b"{}", "model.safetensors": bytes(1000)}
        hub.add(repository.partition("@")[0], files)
        runs(Place(place.home, hub.environment(Path(folder))), words)


def convert(place: Place, words: list[str]) -> None:
    """This machine has no model of the name shown: that must be its only complaint."""
    assert not (place.home / words[2]).exists()
    done = place.run(words)
    assert done.returncode == 1, done.stderr
    assert words[2] in done.stderr


def generate(place: Place, words: list[str]) -> None:
    """Runs as it stands, and ends however the model answers."""
    assert "--max-tokens" in words, "bound the example: a sampled answer may be long"
    runs(place, words)


def runs(place: Place, words: list[str]) -> None:
    """Runs as it stands."""
    done = place.run(words)
    assert done.returncode == 0, done.stderr


def exists(place: Place, words: list[str]) -> None:
    """test_run.py runs it in a terminal: the options must be known."""
    runs(place, [*words, "--help"])


def sessions(place: Place, words: list[str]) -> None:
    """A session that is exported is made first; a watch would not end by itself."""
    if words[2:3] == ["watch"]:
        return exists(place, words)
    if words[2:3] == ["export"]:
        model = ["-m", default_model().name, "--session", words[3]]
        chat(place, [words[0], "chat", *model])
    return runs(place, words)


MLXD: dict[str, Callable[[Place, list[str]], None]] = {
    "bench": bench,
    "chat": chat,
    "convert": convert,
    "generate": generate,
    "list": runs,
    "load": load,
    "ps": runs,
    "pull": pull,
    "run": exists,
    "serve": serve,
    "sessions": sessions,
    "unload": runs,
}


def mlxd(place: Place, words: list[str]) -> None:
    """The program under test, with `~` expanded as a shell does."""
    home = str(place.home)
    given = [re.sub(r"^~(?=/|$)", home, word) for word in words[1:]]
    MLXD[words[1]](place, [str(binary()), *given])


def make(_: Place, words: list[str]) -> None:
    """`make` builds, fetches or tests everything: its targets must exist."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in (word for word in words[1:] if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"


def pip(_: Place, words: list[str]) -> None:
    """It would change the environment: the folder and the extras that it names must exist."""
    assert words[1] == "install"
    for word in (word for word in words[2:] if not word.startswith("-")):
        path, _, extras = word.rstrip("]").partition("[")
        folder = REPOSITORY / "clients" / "python" if path == "." else REPOSITORY / path
        project = (folder / "pyproject.toml").read_text()
        for extra in filter(None, extras.split(",")):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"no extra {extra}"


def python(_: Place, words: list[str]) -> None:
    """Scripts of ours, which other tests run: the file must exist."""
    script = next(word for word in words[1:] if word.endswith(".py"))
    assert any((folder / script).exists() for folder in (REPOSITORY, REPOSITORY / "clients/python"))


def cargo(_: Place, words: list[str]) -> None:
    """Builds are what `make test` is made of: the package and the test that it names must exist."""
    manifests = [REPOSITORY, REPOSITORY / "clients" / "rust"]
    for option, value in pairwise(words):
        if option in {"-p", "--package"}:
            named = f'name = "{value}"'
            assert any(named in (folder / "Cargo.toml").read_text() for folder in manifests)
        if option == "--test":
            tests = [folder / "tests" / value for folder in manifests]
            assert any(t.with_suffix(".rs").exists() or (t / "main.rs").exists() for t in tests)


def script(_: Place, words: list[str]) -> None:
    """A script of the repository: it must exist and be executable."""
    assert os.access(REPOSITORY / words[0], os.X_OK), f"no program {words[0]}"


def checked_elsewhere(_: Place, _words: list[str]) -> None:
    """tests/python/run.sh runs these on the client."""


def changes_only_the_shell(_: Place, _words: list[str]) -> None:
    """A folder, a variable, or a copy of this repository."""


RULES: dict[str, Callable[[Place, list[str]], None]] = {
    "cargo": cargo,
    "cd": changes_only_the_shell,
    "export": changes_only_the_shell,
    "git": changes_only_the_shell,
    "make": make,
    "mlxd": mlxd,
    "mypy": checked_elsewhere,
    "pip": pip,
    "pytest": checked_elsewhere,
    "python": python,
    "python3": python,
    "ruff": checked_elsewhere,
}


@pytest.mark.real
@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_documentation_works(place: Place, words: list[str]) -> None:
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    name = words[0]
    rule = RULES.get(name) or (script if name.startswith(("tests/", "native/", ".ci/")) else None)
    assert rule, f"no rule for {name}: add one that runs or checks it"
    rule(place, list(words))


@pytest.mark.real
@pytest.mark.parametrize(
    "document", sorted({block.document for block in ALL if block.language == "python"}), ids=str
)
def test_the_python_of_a_document_runs(place: Place, document: Path) -> None:
    pytest.importorskip("abstractllm", reason="the abstractllm package is not installed")
    # Blank lines keep the line numbers of the document.
    texts = [b for b in blocks(document) if b.language == "python"]
    program = ""
    for block in texts:
        program += "\n" * (block.line - program.count("\n")) + block.text
    done = place.run([sys.executable, "-c", program])
    assert done.returncode == 0, f"{document}:\n{done.stderr}"


def test_every_example_that_generates_says_how_much() -> None:
    """Some small models never end by themselves."""
    silent, examples = [], 0
    for block in ALL:
        if block.language != "python":
            continue
        for call in ast.walk(ast.parse(block.text)):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr not in ("chat", "generate", "stream"):
                continue
            examples += 1
            if "max_tokens" not in [argument.arg for argument in call.keywords]:
                silent.append(f"{block.document}:{block.line + call.lineno}")
    assert examples > 5
    assert not silent


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.document}:{block.line}")
def test_a_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    if block.language == "toml":
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
        known = tomllib.loads((REPOSITORY / "deploy" / "mlxd.example.toml").read_text())
        given = tomllib.loads(block.text)
        # The daemon's own tests read sections of models.
        given.pop("model", None)
        for key, value in given.items():
            assert type(value) is type(known[key]), f"{key} is not a key of this type"
    elif block.language == "rust":
        assert block.document in DOC_TESTED, "cargo does not compile the Rust of this document"
    else:
        assert block.language in SHELL | INERT | {"python"}, "name the block's language"
