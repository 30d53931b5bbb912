#!/usr/bin/env bash
# The Python client's tests beside AbstractLLM 1.1.5, which imports from Python 3.12 on; says so where there is none.
# With an older Python the other tests are beside 1.1.1. Arguments go to pytest.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

newer() { # prints a Python that 1.1.5 runs on
  local python
  for python in "${PYTHON:-python3}" python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9].*/bin/python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then
      echo "$python"
      return
    fi
  done
}

python=$(newer)
if [ -z "$python" ]; then
  echo "host.sh: AbstractLLM 1.1.5 is not tried: no Python 3.12 found, set PYTHON" >&2
  exit 0
fi
python=$(PYTHON=$python "$here/venv.sh" host)
cd "$here/../../clients/python"
PYTHONPATH=src exec "$python" -m pytest "$@"
