#!/usr/bin/env bash
# Tries a deployable tree as a stranger gets it: try_dist.sh <folder of dist.sh> <model folder>
#
# Another user runs it from another folder, without the builder's environment, and asks for an answer.
set -euo pipefail

dist=$1 model=$2
# Short: a socket's path has room for 103 bytes.
there=$(mktemp -d /tmp/mlxd-XXXXXX)
stranger=(sudo -u nobody env -i PATH=/usr/bin:/bin HOME="$there/home")

finish() {
  [ -z "${daemon:-}" ] || sudo kill "$daemon" 2> /dev/null || true
  [ ! -f "$there/log" ] || cat "$there/log"
  sudo rm -rf "$there"
}
trap finish EXIT

mkdir "$there/home" "$there/models"
cp -R "$dist" "$there/mlxd"
cp -R "$model" "$there/models/"
chmod -R a+rX "$there"
chmod a+rwx "$there/home"

mlxd=$there/mlxd/bin/mlxd socket=$there/home/s name=$(basename "$model")
cd /
"${stranger[@]}" "$mlxd" serve --socket "$socket" --model-root "$there/models" --model "$name" > "$there/log" 2>&1 &
daemon=$!
for _ in $(seq 600); do
  [ ! -S "$socket" ] || break
  kill -0 "$daemon" 2> /dev/null || sudo kill -0 "$daemon"
  sleep 0.2
done
answer=$("${stranger[@]}" "$mlxd" generate --address "unix://$socket" -m "$name" --max-tokens 5 "Hello")
echo "answer: $answer"
[ -n "$answer" ]
