#!/usr/bin/env bash
# The Python side of `make test`: lint and types of the Python client, then its
# tests, the parity tests and the end-to-end tests against the release build
# (MLXD_BIN, else target/release/mlxd). Arguments go to the pytest of the latter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
client=$here/../../clients/python
python=$("$here/venv.sh" test)

(cd "$client" && "$python" -m ruff check --quiet . && "$python" -m ruff format --quiet --check .)
(cd "$client" && "$python" -m mypy --no-error-summary)
(cd "$here/.." && "$python" -m ruff check --quiet . && "$python" -m ruff format --quiet --check .)

# For the processes that tests start; pytest's own path is in its configuration.
export PYTHONPATH=$client/src:$here/support
# By itself: its tests have a home folder of their own, where no cache is.
(cd "$client" && "$python" -m pytest)
if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  "$here/host.sh"
fi
exec "$python" -m pytest --config-file "$here/pytest.ini" --rootdir "$here" \
  "$here/parity" "$here/e2e" "$@"
