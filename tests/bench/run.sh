#!/usr/bin/env bash
# Runs compare.py with the test environment; arguments are compare.py's.
#
#   MLXD_BLAS_PLAIN  libmlxd_blas_plain.so: OpenBLAS with renamed symbols
#   MLXD_BLAS        libmlxd_blas.so: the daemon's shim, sgemv at one row
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$here/../../clients/python/src
exec "$("$here/../venv.sh" test)" "$here/compare.py" "$@"
