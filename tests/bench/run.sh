#!/usr/bin/env bash
# Runs benches with the test environment: compare (the default), tiny,
# neighbours, fairness, foreign, sessions, structured, soak, architectures, or
# all but the last; further arguments are theirs.
#
#   tests/bench/run.sh neighbours --rounds 3 --check --json result.json
#
#   MLXD_BIN         the daemon; else cargo's release build
#   MLXD_BLAS_PLAIN  libmlxd_blas_plain.so, which goes under mlx-lm: OpenBLAS
#                    with renamed symbols
#   MLXD_BLAS        libmlxd_blas.so: the daemon's own, for compare --our-blas
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
libraries=$here/../../.cargo/mlx-linux/lib
export MLXD_BLAS_PLAIN=${MLXD_BLAS_PLAIN:-$libraries/libmlxd_blas_plain.so}
export MLXD_BLAS=${MLXD_BLAS:-$libraries/libmlxd_blas.so}
export PYTHONPATH=$here:$here/../python/support:$here/../../clients/python/src
python=$("$here/../python/venv.sh" test)

bench=compare
if [[ $# -gt 0 && $1 != -* ]]; then
  bench=$1
  shift
fi
if [[ $bench != all ]]; then
  exec "$python" "$here/$bench.py" "$@"
fi
status=0
for bench in compare tiny neighbours fairness foreign sessions structured soak; do
  "$python" "$here/$bench.py" "$@" || status=1
done
exit "$status"
