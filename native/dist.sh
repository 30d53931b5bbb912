#!/usr/bin/env bash
# Puts a deployable tree together: dist.sh <mlxd binary> <folder>
#
#   bin/mlxd                 finds its libraries through $ORIGIN/../lib
#   lib/libmlxc.so ...       mlx-c, the BLAS, and MLX's wheel as it was unpacked
#
# On macOS MLX is linked statically and bin/mlxd is all.
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
fi
rm -rf "$dist"
mv "$dist.new" "$dist"
du -sh "$dist"
