#!/usr/bin/env bash
# Runs the tests. With arguments they go to pytest; without, all tests run in five parts at once,
# as most of them wait for processes more than they compute. Whatever fails in any of them fails.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -eq 0 ] || exec .venv/bin/pytest "$@"

part() {
    local name=$1
    shift
    .venv/bin/pytest -o cache_dir="$PWD/.pytest_cache/$name" "$@"
}

faults=(tests/confinement tests/fuzz tests/kills tests/model tests/soak)
said=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$said"' EXIT
part commands tests/cli >"$said/1" 2>&1 &
commands=$!
part mounts tests/fuse >"$said/2" 2>&1 &
mounts=$!
part checkpoints tests/checkpoint tests/csi >"$said/3" 2>&1 &
checkpoints=$!
part faults "${faults[@]}" >"$said/4" 2>&1 &
killed=$!
part rest tests --ignore=tests/cli --ignore=tests/fuse --ignore=tests/csi --ignore=tests/checkpoint \
    "${faults[@]/#/--ignore=}"
failed=$?
wait $commands || failed=$?
cat "$said/1"
wait $mounts || failed=$?
cat "$said/2"
wait $checkpoints || failed=$?
cat "$said/3"
wait $killed || failed=$?
cat "$said/4"
exit $failed
