"""The JSON Schema Test Suite, as two packages ship it, unpacked into the cache folder.

From npm `json-schema-test-suite`, whose newest draft is 4, and from the source distribution of
PyPI's `jsonschema`, which has draft 2020-12. Nothing of them is installed or run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from daemon import cache_folder


@dataclass(frozen=True)
class Suite:
    """A package with the suite, and the draft that is read."""

    package: str
    sha256: str
    tests: str
    download: tuple[str, ...]

    @property
    def is_available(self) -> bool:
        """Tells whether there is the program that downloads it, unless that is done."""
        return self.folder.exists() or shutil.which(self.download[0]) is not None

    @property
    def folder(self) -> Path:
        """Where its tests are once they are fetched; complete, because it is moved there."""
        return cache_folder() / "schema-suites" / f"{self.package}-{self.sha256[:12]}"

    def fetch(self) -> None:
        """Downloads and unpacks it, unless that is done."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.folder.exists():
                return
            with tempfile.TemporaryDirectory(dir=self.folder.parent) as made:
                subprocess.run(self.download, cwd=made, check=True, stdout=subprocess.DEVNULL)
                (archive,) = Path(made).iterdir()
                digest = hashlib.sha256(archive.read_bytes()).hexdigest()
                assert digest == self.sha256, f"{archive.name} has SHA-256 {digest}"
                self._unpack(archive, Path(made) / "tests")
                (Path(made) / "tests").rename(self.folder)

    def _unpack(self, archive: Path, out: Path) -> None:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or not path.is_relative_to(self.tests):
                    continue
                source = tar.extractfile(member)
                assert source
                target = out / path.relative_to(self.tests)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())

    def cases(self) -> dict[str, dict[str, Any]]:
        """Returns schemas with the values that are and are not valid for them, by name."""
        self.fetch()
        return {
            f"{file.relative_to(self.folder)}: {case['description']} ({number})": case
            for file in sorted(self.folder.rglob("*.json"))
            for number, case in enumerate(json.loads(file.read_text()))
        }


PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
SUITES = {
    "draft 4": Suite(
        "json-schema-test-suite-0.0.10",
        "0b54234c9ae1c164deefae9f45c1491f18852b6d5748c093279597b7ae0e328c",
        "package/tests/draft4",
        ("npm", "pack", "--silent", "json-schema-test-suite@0.0.10"),
    ),
    "draft 2020-12": Suite(
        "jsonschema-4.26.0",
        "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326",
        "jsonschema-4.26.0/json/tests/draft2020-12",
        (*PIP, "--no-deps", "--no-binary=jsonschema", "jsonschema==4.26.0"),
    ),
}
