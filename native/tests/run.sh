#!/usr/bin/env bash
# Builds and runs the tests of the BLAS shim against the library that setup.sh has made. Linux only.
set -euo pipefail

[ "$(uname -s)" = Linux ] || exit 0
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
library=$tests/../../.cargo/mlx-linux/lib

test=$(mktemp)
trap 'rm -f "$test"' EXIT
"${CC:-gcc}" -std=gnu17 -O2 -Wall -Wextra -o "$test" "$tests/blas_test.c" "$library/libmlxd_blas.so" \
  -Wl,-rpath,"$library" -Wl,-rpath-link,"$library" -lm -pthread
"$test"
