"""Regenerates the synchronous client from the asyncio one; `--check` only compares.

Each module of src/mlxd/aio but `__init__` becomes the module of the same name in src/mlxd: `async`
and `await` are dropped, NAMES and SENTENCES are replaced, a statement or `except` whose first line
ends in `# async only` is left out, and ruff sorts the imports and formats. docs/decisions/0030 says
why the asyncio client is the source.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ASYNC = PACKAGE / "src" / "mlxd" / "aio"
SYNC = PACKAGE / "src" / "mlxd"
MARK = "# async only"
NAMES = {
    "AioLink": "SyncLink",
    "AsyncClient": "Client",
    "AsyncConnection": "Connection",
    "AsyncExportStream": "ExportStream",
    "AsyncGenerateStream": "GenerateStream",
    "AsyncIterator": "Iterator",
    "AsyncSession": "Session",
    "AsyncSessionCalls": "SessionCalls",
    "AsyncStream": "Stream",
    "StopAsyncIteration": "StopIteration",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "aiter": "iter",
    "anext": "next",
}
SENTENCES = {
    "The asyncio client. It can be made before an event loop runs, and used in several.": (
        "The synchronous client. Several threads may share one Client, which is one connection."
    ),
    "An asynchronous iterator over": "An iterator over",
}


def without_async_only(source: str) -> str:
    """Returns the source without the statements and handlers that are marked."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.stmt, ast.ExceptHandler)):
            continue
        if lines[node.lineno - 1].rstrip().endswith(MARK):
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
    return "".join(lines)


def synchronous(source: str) -> str:
    """Returns the synchronous module, not yet formatted.

    Raises:
        SystemExit: a name that looks asynchronous is left.
    """
    lines = without_async_only(source).splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO("".join(lines)).readline))
    for token in reversed(tokens):
        (row, start), (_, end) = token.start, token.end
        if token.type == tokenize.NAME and token.string in {"async", "await"}:
            lines[row - 1] = lines[row - 1][:start] + lines[row - 1][end:].lstrip()
        elif token.type == tokenize.NAME and token.string in NAMES:
            lines[row - 1] = lines[row - 1][:start] + NAMES[token.string] + lines[row - 1][end:]
    text = "".join(lines).replace("from mlxd.aio.", "from mlxd.")
    for old, new in SENTENCES.items():
        text = text.replace(old, new)
    if left := re.search(r"(?i)\w*(async|aio)\w*", text):
        raise SystemExit(f"generate_sync.py: {left.group()} is left; add a rule")
    return text


def ruff(arguments: list[str], source: str) -> str:
    """Runs ruff on a source with this package's settings."""
    command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "--stdin-filename", "x.py", "-"]
    done = subprocess.run(
        command, cwd=PACKAGE, input=source, capture_output=True, text=True, check=True
    )
    return done.stdout


def generated() -> dict[str, str]:
    """Returns the synchronous modules by file name."""
    modules = {}
    for path in sorted(ASYNC.glob("*.py")):
        if path.name != "__init__.py":
            header = f"# Generated from aio/{path.name} by scripts/generate_sync.py; do not edit.\n"
            text = header + synchronous(path.read_text(encoding="utf-8"))
            text = ruff(["check", "--select=I", "--fix"], text)
            modules[path.name] = ruff(["format"], text)
    return modules


def differences() -> list[str]:
    """Returns the names of committed modules that the generator would write differently."""

    def committed(name: str) -> str | None:
        path = SYNC / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    return [name for name, text in generated().items() if committed(name) != text]


def main() -> None:
    """Regenerates, or with `--check` exits 1 when a committed module is stale."""
    if sys.argv[1:] == ["--check"]:
        if stale := differences():
            raise SystemExit(f"stale, run scripts/generate_sync.py: {', '.join(stale)}")
        return
    for name, text in generated().items():
        (SYNC / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
