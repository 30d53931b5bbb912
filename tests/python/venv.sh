#!/usr/bin/env bash
# Makes a Python environment in the cache folder and prints its interpreter:
#
#   tests/python/venv.sh test    the oracle, the gRPC tools, pytest, linters
#   tests/python/venv.sh demo    what `make demo` needs
#   tests/python/venv.sh host    the Python client's tests, for Python 3.12: host.sh
#
# Keyed by Python and requirements, so a second call only prints. Two callers at
# once are safe. Nothing of the clone is in it: callers set PYTHONPATH.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=${1:-}
requirements="$here/requirements-$kind.txt"
if [[ $# -ne 1 || ! -f $requirements ]]; then
  echo "usage: tests/python/venv.sh test|demo|host" >&2
  exit 2
fi

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "venv.sh: $python not found: install Python 3.10 or newer, or set PYTHON" >&2
  exit 1
fi
if ! version=$("$python" -c '
import platform, sys
print(f"{sys.implementation.name}-{platform.python_version()}-{platform.machine()}")
sys.exit(sys.version_info < (3, 10))'); then
  echo "venv.sh: $python is $version; Python 3.10 or newer is needed" >&2
  exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  echo "venv.sh: $python has no venv module: install it (Debian: apt install python3-venv)" >&2
  exit 1
fi

key=$("$python" -c '
import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:12])' "$requirements")
root=${MLXD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mlxd}/venvs
venv="$root/$kind-$version-$key"

if [[ ! -f $venv/ready ]]; then
  mkdir -p "$root"
  # The lock belongs to descriptor 9, which this shell keeps open; Python takes
  # it because macOS has no flock(1).
  exec 9>"$venv.lock"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if [[ ! -f $venv/ready ]]; then
    echo "venv.sh: installing Python packages ($kind) into $venv" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv" >&2
    progress=(--quiet)
    [[ -t 2 ]] && progress=(--progress-bar on)
    "$venv/bin/python" -m pip install --disable-pip-version-check "${progress[@]}" \
      --requirement "$requirements" >&2
    touch "$venv/ready"
  fi
  exec 9>&-
fi
echo "$venv/bin/python"
