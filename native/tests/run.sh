#!/usr/bin/env bash
# Builds and runs the tests of the BLAS shim and the operations against the library that setup.sh has made, on every
# kernel set that this CPU has; with one thread and with four, whatever the number of cores. Linux only.
set -euo pipefail

[ "$(uname -s)" = Linux ] || exit 0
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
library=$tests/../../.cargo/mlx-linux/lib

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for test in pool_test blas_test ops_test; do
  "${CC:-gcc}" -std=gnu17 -O2 -Wall -Wextra -o "$folder/$test" "$tests/$test.c" "$library/libmlxd_blas.so" \
    -Wl,-rpath,"$library" -Wl,-rpath-link,"$library" -lm -pthread
  [ "$test" != pool_test ] || OPENBLAS_NUM_THREADS=4 env -u MLXD_CPU_THREADS "$folder/$test"
  for threads in 1 4; do
    echo "$test with $threads threads"
    MLXD_CPU_THREADS=$threads "$folder/$test"
  done
done
