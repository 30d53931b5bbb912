#!/usr/bin/env bash
# Puts a deployable tree together: dist.sh <mlxd binary> <folder>
#
#   bin/mlxd                 finds its libraries through $ORIGIN/../lib
#   lib/libmlxc.so ...       mlx-c, the BLAS, and MLX's wheel as it was unpacked
#
# On macOS MLX is linked statically; bin/mlx.metallib, its kernels, is all that is needed besides.
set -euo pipefail

binary=$1 dist=$2
libraries=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cargo/mlx-linux/lib

rm -rf "$dist.new"
mkdir -p "$dist.new/bin"
cp "$binary" "$dist.new/bin/mlxd"
if [ "$(uname -s)" = Linux ]; then
  cp -r "$libraries" "$dist.new/lib"
  # The benchmarks' peer, and CMake and Python files of the wheel. The headers stay: CUDA compiles
  # kernels at run time.
  rm -rf "$dist.new"/lib/{libmlxd_blas_plain.so,mlx/share,mlx/*.py}
else
  # MLX looks for its kernels beside the binary, then where they were built. That path, in the builder's home, is
  # compiled in.
  kernels=$(LC_ALL=C grep -aoE '/[[:print:]]*/mlx\.metallib' "$binary" | sed -n 1p || true)
  if [ ! -f "$kernels" ]; then
    echo "dist.sh: no MLX kernels at ${kernels:-the path compiled into $binary: it has none}" >&2
    exit 1
  fi
  cp "$kernels" "$dist.new/bin/mlx.metallib"
fi
rm -rf "$dist"
mv "$dist.new" "$dist"
du -sh "$dist"
