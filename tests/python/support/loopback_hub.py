"""A model hub on loopback, with the shape of huggingface.co's API: what `mlxd pull` and Python's
huggingface_hub ask for. Large files are redirected to a second server, as its storage does.

Every request is recorded. Faults are functions that see a request first and may answer it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from daemon import binary

TOKEN = "hf_loopback_secret"
# A part of the storage's addresses that gives access to a file.
SIGNED = "signed-secret"
LFS = (".safetensors", ".model", ".bin", ".gguf")
BLOCK = 64 << 10
# Far beyond what a command takes on a busy machine with two cores.
COMMAND_S = 120.0


@dataclass
class Seen:
    """A request that was answered or is about to be."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Repo:
    """A repo at one commit."""

    files: dict[str, bytes]
    commit: str = ""
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.commit:
            digests = "".join(self.digest(name) for name in sorted(self.files))
            self.commit = hashlib.sha1(digests.encode()).hexdigest()
        self.refs.setdefault("main", self.commit)

    def is_large(self, name: str) -> bool:
        """Tells whether git has only a pointer of it."""
        return name.endswith(LFS)

    def git_hash(self, name: str) -> str:
        """Returns git's hash of a file."""
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def digest(self, name: str) -> str:
        """Returns the name of the file's blob in the cache."""
        if self.is_large(name):
            return hashlib.sha256(self.files[name]).hexdigest()
        return self.git_hash(name)

    def entry(self, name: str) -> dict[str, Any]:
        """Returns the file as the list of files has it."""
        size = len(self.files[name])
        entry: dict[str, Any] = {
            "type": "file",
            "oid": self.git_hash(name),
            "size": size,
            "path": name,
        }
        if self.is_large(name):
            entry["lfs"] = {"oid": self.digest(name), "size": size, "pointerSize": 134}
        return entry


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    name: str

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""

    def answer(self) -> None:
        headers = self.headers
        seen = Seen(
            self.name, self.command, self.path, headers.get("Range"), headers.get("Authorization")
        )
        with self.hub.lock:
            self.hub.seen.append(seen)
            faults = list(self.hub.faults)
        try:
            if not any(fault(self, seen) for fault in faults):
                self.route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        if self.name == "storage":
            found = self.hub.stored(path.lstrip("/"))
            self.content(*found) if found else self.reply(404)
            return
        resolve = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        cached = re.fullmatch(r"/api/resolve-cache/models/(.+)/([0-9a-f]{40})/(.+)", path)
        tree = re.fullmatch(r"/api/models/(.+)/tree/(.+)", path)
        info = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        if cached:
            repo = self.hub.repos[cached[1]]
            self.content(repo.files[cached[3]], self.file_headers(repo, cached[3]))
        elif resolve:
            self.resolve(resolve[1], resolve[2], resolve[3])
        elif tree:
            self.tree(tree[1], tree[2], parse_qs(address.query))
        elif info:
            self.info(info[1], info[2] or "main")
        else:
            self.reply(404)

    def repo_at(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.reply(404 if self.headers.get("Authorization") else 401, headers=headers)
            return None
        if repo.refs.get(revision, revision) != repo.commit:
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self.reply(404, headers=headers)
            return None
        return repo

    def info(self, name: str, revision: str) -> None:
        if repo := self.repo_at(name, revision):
            siblings = [{"rfilename": file} for file in sorted(repo.files)]
            self.reply(
                200,
                {
                    "id": name,
                    "sha": repo.commit,
                    "private": False,
                    "siblings": siblings,
                    "tags": [],
                },
            )

    def tree(self, name: str, revision: str, query: Mapping[str, list[str]]) -> None:
        if not (repo := self.repo_at(name, revision)):
            return
        entries = [repo.entry(file) for file in sorted(repo.files)]
        folders = {file.rsplit("/", 1)[0] for file in repo.files if "/" in file}
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page_entries
        headers = {}
        if end < len(entries):
            path = urlsplit(self.path).path
            link = f"{self.hub.endpoint}{path}?recursive=true&cursor={end}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.reply(200, entries[start:end], headers)

    def file_headers(self, repo: Repo, file: str) -> dict[str, str]:
        return {"ETag": f'"{repo.digest(file)}"', "X-Repo-Commit": repo.commit}

    def resolve(self, name: str, revision: str, file: str) -> None:
        if not (repo := self.repo_at(name, revision)):
            return
        if file not in repo.files:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        headers = self.file_headers(repo, file)
        if repo.is_large(file):
            digest = repo.digest(file)
            headers["X-Linked-Etag"] = f'"{digest}"'
            headers["X-Linked-Size"] = str(len(repo.files[file]))
            headers["Location"] = f"{self.hub.storage}/{digest}?Signature={SIGNED}"
            self.reply(302, headers=headers)
        else:
            path = f"/api/resolve-cache/models/{name}/{repo.commit}/{quote(file)}"
            self.reply(307, headers={**headers, "Location": path})

    def content(self, data: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end, status = 0, len(data), 200
        if asked and self.hub.ranges:
            start = int(asked[1])
            end = min(end, int(asked[2]) + 1 if asked[2] else end)
            if start >= len(data):
                self.reply(416, headers={"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send(data, start, end)

    def send(self, data: bytes, start: int, end: int) -> None:
        sent, limit = 0, self.hub.close_after_bytes
        while start < end:
            if limit is not None and sent >= limit:
                self.close_connection = True
                return
            block = data[start : min(end, start + BLOCK)]
            self.hub.serve(len(block))
            self.wfile.write(block)
            start += len(block)
            sent += len(block)

    def reply(
        self, status: int, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers with JSON, text or bytes."""
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """A server whose clients may be killed at any moment."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Keeps the tests' output clean."""


Fault = Callable[[Handler, Seen], bool]


class LoopbackHub:
    """The two servers; a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.page_entries = 1000
        self.ranges = True
        # Closes each connection after this many bytes of a file.
        self.close_after_bytes: int | None = None
        self.served_bytes = 0
        # Called once when this many bytes of files are served.
        self.alarm: tuple[int, Callable[[], None]] | None = None
        self.servers = [self._server("hub"), self._server("storage")]
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers
        )

    def _server(self, name: str) -> Server:
        handler = type(name, (Handler,), {"hub": self, "name": name})
        return Server(("127.0.0.1", 0), handler)

    def __enter__(self) -> LoopbackHub:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **refs: str) -> Repo:
        """Adds a repo, or a new commit of one."""
        self.repos[name] = Repo(dict(files), refs=dict(refs))
        return self.repos[name]

    def add_folder(self, name: str, folder: Path) -> Repo:
        """Adds a repo with the files of a folder."""
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*")}
        return self.add(name, {n: file.read_bytes() for n, file in files.items() if file.is_file()})

    def stored(self, digest: str) -> tuple[bytes, dict[str, str]] | None:
        """Returns a large file by its hash."""
        for repo in self.repos.values():
            for file in filter(repo.is_large, repo.files):
                if repo.digest(file) == digest:
                    return repo.files[file], {"ETag": f'"{digest}"'}
        return None

    def serve(self, count: int) -> None:
        """Counts bytes that go out."""
        with self.lock:
            self.served_bytes += count
            alarm = self.alarm if self.alarm and self.served_bytes >= self.alarm[0] else None
            if alarm:
                self.alarm = None
        if alarm:
            alarm[1]()

    def requests(self, text: str = "", server: str = "", method: str = "GET") -> list[Seen]:
        """Returns the requests whose path has a text."""
        with self.lock:
            found = [s for s in self.seen if text in s.path and s.method == method]
        return [s for s in found if server in ("", s.server)]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Returns variables with which a program uses this hub, and a cache under `home`."""
        left_out = ("MLXD_", "HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "HTTP", "http", "NO_COLOR")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        own = {"HF_HOME": str(home / "huggingface"), "HF_ENDPOINT": self.endpoint}
        # Python's tools ask other servers otherwise.
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return {**kept, **own, **quiet, "HOME": str(home), **more}

    def mlxd(self, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of ours to its end, with `environment`."""
        return subprocess.run(
            [str(binary()), *arguments],
            env=self.environment(home, **more),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )


class Held:
    """A fault: files of a name wait until they are let go."""

    def __init__(self, hub: LoopbackHub, text: str = ".safetensors") -> None:
        self.text = text
        self.asked = threading.Event()
        self.free = threading.Event()
        hub.faults.append(self)

    def __call__(self, _: Handler, seen: Seen) -> bool:
        if self.text in seen.path:
            self.asked.set()
            assert self.free.wait(COMMAND_S)
        return False
