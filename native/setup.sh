#!/usr/bin/env bash
# Prepares MLX for `cargo build` on Linux, in place of mlx-sys's build script, which knows macOS only.
#
# From PyPI: MLX's own wheel (libmlx.so, headers), OpenBLAS, libclang. Compiled here: mlx-c from the
# sources in the mlx-sys crate, the BLAS shim, the bindings. The result lies in a cache folder outside
# the clone, named after everything that it depends on, so that clones share it and nothing goes stale.
# Then .cargo/mlx-linux.toml tells Cargo to link it instead of running the build script, and the link
# .cargo/mlx-linux tells the loader where it is (a fixed path: a new native/ does not rebuild the crates).
#
#   MLXD_CACHE   cache folder (default ${XDG_CACHE_HOME:-~/.cache}/mlxd)
#   FLAVOR       cpu (default) or cuda-13
set -euo pipefail

OPENBLAS=0.3.34.481.3
LIBCLANG=18.1.1
RUST_MIN=1.94

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
native=$repo/native
cache=${MLXD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mlxd}
flavor=${FLAVOR:-cpu}
cxx=${CXX:-g++}
cc=${CC:-gcc}

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}
need() { command -v "$1" >/dev/null || die "$1 is missing: $2"; }

check_prerequisites() {
  need cargo "install Rust $RUST_MIN or later from https://rustup.rs"
  local rust
  rust=$(rustc -V | cut -d' ' -f2)
  [ "$(printf '%s\n' "$RUST_MIN" "${rust%%-*}" | sort -V | head -n1)" = "$RUST_MIN" ] ||
    die "Rust $rust is too old, $RUST_MIN or later is needed: rustup update stable"
  if [ "$(uname -s)" = Darwin ]; then
    xcrun --find metal >/dev/null 2>&1 || die "Xcode with the Metal tools is missing: install Xcode from the App Store"
    need cmake "brew install cmake"
    return
  fi
  need "$cxx" "apt install g++ (or your distribution's package)"
  need "$cc" "apt install gcc (or your distribution's package)"
  need make "apt install make (or your distribution's package)"
  need git "apt install git (or your distribution's package)"
  need python3 "apt install python3 python3-venv (or your distribution's package)"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$(python3 -V) is too old, Python 3.10 or later is needed"
  python3 -c 'import venv, ensurepip' 2>/dev/null ||
    die "Python's venv module is missing: apt install python3-venv (or your distribution's package)"
  case $flavor in cpu | cuda-13) ;; *) die "FLAVOR=$flavor is not known: cpu or cuda-13" ;; esac
}

# Where Cargo keeps the sources of mlx-sys, downloaded if they are not there yet.
mlx_sys_dir() {
  local manifest
  manifest=$(cd "$repo" && cargo metadata --format-version 1 --filter-platform "$triple" |
    grep -o '"manifest_path":"[^"]*/mlx-sys-[^"]*"') || die "cargo does not find the crate mlx-sys (no network?)"
  manifest=${manifest#*:\"}
  dirname "${manifest%\"}"
}

# Locks an open descriptor until this shell closes it; fails at once if it is held, unless told to wait.
lock() {
  python3 -c 'import fcntl, sys
fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX if sys.argv[2:] else fcntl.LOCK_EX | fcntl.LOCK_NB)' "$@" 2>/dev/null
}

# Everything that the result depends on, in one short hash.
cache_key() {
  {
    echo "$flavor $mlx $OPENBLAS $LIBCLANG $triple ${sys##*/}"
    "$cxx" -dumpfullversion -dumpmachine
    (cd "$native" && sha256sum setup.sh *.c *.cpp *.h *.inc bindgen/Cargo.* bindgen/src/*)
  } | sha256sum | cut -c1-12
}

pip() {
  local progress=(--quiet)
  [ ! -t 2 ] || progress=(--progress-bar on)
  "$tmp/venv/bin/python" -m pip --disable-pip-version-check install "${progress[@]}" --only-binary=:all: "$@" >&2 ||
    die "pip could not install ${*: -1}"
}

fetch_wheels() {
  python3 -m venv "$tmp/venv"
  pip --no-deps --target "$tmp/clang" "libclang==$LIBCLANG"
  pip --no-deps --target "$tmp/openblas" "scipy-openblas32==$OPENBLAS"
  # The CPU wheel stands alone; the CUDA wheel needs NVIDIA's, which its rpath expects beside it.
  if [ "$flavor" = cpu ]; then
    pip --no-deps --target "$tmp/lib" "mlx-$flavor==$mlx"
  else
    pip --target "$tmp/lib" "mlx-$flavor==$mlx"
  fi
  mv "$tmp/openblas/scipy_openblas32/lib/libscipy_openblas.so" "$tmp/lib/"
}

build_blas() {
  local flags=(-std=gnu17 -O3 -fPIC -shared -Wall -Wextra -pthread "-Wl,-rpath,\$ORIGIN" -L"$tmp/lib")
  "$cc" "${flags[@]}" -Wl,-soname,libmlxd_blas.so -o "$tmp/lib/libmlxd_blas.so" "$native"/blas_*.c \
    "$native"/{cpu_ops,kernel_set}.c -lscipy_openblas -lm
  "$cc" "${flags[@]}" -DMLXD_BLAS_PLAIN -Wl,-soname,libmlxd_blas_plain.so -o "$tmp/lib/libmlxd_blas_plain.so" \
    "$native/blas_shim.c" -lscipy_openblas
  # A symbol that the shim forgets would quietly come from the reference BLAS.
  local missing
  missing=$(comm -23 <(symbols --undefined-only "$tmp/lib/mlx/lib/libmlx.so" | grep -E '^cblas_|^[a-z]+_$') \
    <(symbols --defined-only "$tmp/lib/libmlxd_blas.so"))
  [ -z "$missing" ] || die "native/blas_shim.c does not forward: $missing"
}

symbols() { nm -D "$@" | awk '{ print $NF }' | LC_ALL=C sort -u; }

# mlx-c as a shared library: it names the BLAS before libmlx.so, which fixes the loader's search order for
# every program that links it. Its files are compiled as one, since nearly all their time goes to MLX's headers.
build_mlx_c() {
  printf '#include "%s"\n' "$sys"/src/mlx-c/mlx/c/*.cpp "$native/linux_compat.cpp" "$native/mlx_ops.cpp" >"$tmp/mlx_c.cpp"
  "$cxx" -std=c++20 -O2 -fPIC -w -include "$native/format_compat.h" -I"$tmp/lib/mlx/include" -I"$sys/src/mlx-c" -I"$native" \
    -shared -Wl,-soname,libmlxc.so -Wl,-rpath,"\$ORIGIN:\$ORIGIN/mlx/lib" -Wl,--no-as-needed \
    -o "$tmp/lib/libmlxc.so" "$tmp/mlx_c.cpp" -L"$tmp/lib" -L"$tmp/lib/mlx/lib" -lmlxd_blas -lmlx ||
    die "mlx-c did not compile"
}

build() {
  say "preparing MLX $mlx ($flavor) in $dest: once, about a minute"
  rm -rf "$cache"/native/.build-* # left behind by a killed run; ours is the only one, we hold the lock
  tmp=$(mktemp -d "$cache/native/.build-XXXXXX")
  trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$tmp"' EXIT
  say "1/3 fetching MLX, OpenBLAS and libclang from PyPI"
  MLX_SYS_DIR=$sys CARGO_TARGET_DIR=$tmp/bindgen \
    cargo build --locked --manifest-path "$native/bindgen/Cargo.toml" >"$tmp/bindgen.log" 2>&1 &
  local bindgen=$!
  fetch_wheels
  say "2/3 compiling mlx-c, the BLAS shim and the operations"
  build_blas
  build_mlx_c
  say "3/3 generating the bindings"
  wait "$bindgen" || {
    cat "$tmp/bindgen.log" >&2
    die "the bindings generator did not build"
  }
  mkdir "$tmp/out"
  LIBCLANG_PATH=$tmp/clang/clang/native BINDGEN_EXTRA_CLANG_ARGS="-I$("$cc" -print-file-name=include)" \
    "$tmp/bindgen/debug/mlx-bindgen" "$sys/src/mlx-c" "$tmp/out/bindings.rs" || die "bindgen failed"
  mkdir -p "$tmp/include/mlx"
  cp -r "$sys/src/mlx-c/mlx/c" "$tmp/include/mlx/c"
  rm -rf "$tmp"/{venv,clang,openblas,bindgen,bindgen.log,mlx_c.cpp} "$tmp"/lib/{bin,*.dist-info}
  chmod 755 "$tmp"
  mv "$tmp" "$dest"
}

write_cargo_config() {
  ln -sfn "$dest" "$repo/.cargo/mlx-linux"
  local config=$repo/.cargo/mlx-linux.toml rpath="-Wl,-rpath,\$ORIGIN/../lib:$repo/.cargo/mlx-linux/lib"
  local new
  new=$(
    cat <<TOML
# Written by native/setup.sh.
[target.$triple]
rustflags = ["-C", "link-arg=$rpath"]
rustdocflags = ["-C", "link-arg=$rpath"]

[target.$triple.mlx]
rustc-link-lib = ["dylib=mlxc"]
rustc-link-search = ["native=$dest/lib"]
rustc-env = { OUT_DIR = "$dest/out" }
include = "$dest/lib/mlx/include:$dest/include"
version = "$mlx"
TOML
  )
  [ "$(cat "$config" 2>/dev/null)" = "$new" ] || printf '%s\n' "$new" >"$config"
}

main() {
  check_prerequisites
  [ "$(uname -s)" = Linux ] || return 0 # macOS: mlx-sys's build script does it all
  triple=$(rustc -vV | sed -n 's/^host: //p')
  sys=$(mlx_sys_dir)
  mlx=$(sed -n 's/.*GIT_TAG v\([0-9.]*\).*/\1/p' "$sys/src/mlx-c/CMakeLists.txt")
  dest=$cache/native/mlx-$mlx-$flavor-$(cache_key)
  if [ ! -d "$dest" ]; then
    mkdir -p "$cache/native"
    exec 9>"$cache/native/.lock"
    lock 9 || { say "another set-up is running, waiting for it" && lock 9 wait; }
    [ -d "$dest" ] || build
    exec 9>&-
  fi
  write_cargo_config
  say "MLX $mlx ($flavor) is ready in $dest"
}

main
