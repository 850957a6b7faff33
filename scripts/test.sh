#!/usr/bin/env bash
# Runs the tests. With arguments they go to pytest; without, all tests run in two halves at once,
# as most of them wait for processes more than they compute. Whatever fails in either fails.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -eq 0 ] || exec .venv/bin/pytest "$@"

half() {
    local name=$1
    shift
    .venv/bin/pytest -o cache_dir="$PWD/.pytest_cache/$name" "$@"
}

said=$(mktemp)
trap 'kill %1 2>/dev/null; rm -f "$said"' EXIT
half rest tests --ignore=tests/cli --ignore=tests/fuse >"$said" 2>&1 &
half mounts tests/cli tests/fuse
first=$?
wait %1
second=$?
cat "$said"
exit $((first ? first : second))
