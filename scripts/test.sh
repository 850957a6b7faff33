#!/usr/bin/env bash
# Runs the tests. With arguments they go to pytest; without, all tests run in two halves at once,
# as most of them wait for processes more than they compute. Up to three that failed beside the
# others are then run once more, with nothing else going on, and must pass: what they measure, who
# is first and who is killed when, a busy machine can upset. Each of them is named at the end.
set -uo pipefail
cd "$(dirname "$0")/.."

[ $# -eq 0 ] || exec .venv/bin/pytest "$@"

mounts=(tests/cli tests/fuse)
rest=(tests --ignore=tests/cli --ignore=tests/fuse)

half() {
    local name=$1
    shift
    .venv/bin/pytest -o cache_dir="$PWD/.pytest_cache/$name" "$@"
}

failed() {
    .venv/bin/python -c 'import json, sys; print("\n".join(json.load(open(sys.argv[1]))))' \
        ".pytest_cache/$1/v/cache/lastfailed"
}

again() {
    local name=$1 status=$2 names
    shift 2
    [ "$status" -eq 1 ] || return "$status"
    names=$(failed "$name") || return 1
    [ "$(wc -l <<<"$names")" -le 3 ] || return 1
    printf '\n=== failed beside others, and run once more alone:\n%s\n' "$names"
    half "$name" --last-failed "$@"
}

rm -rf .pytest_cache/mounts .pytest_cache/rest
said=$(mktemp)
trap 'kill %1 2>/dev/null; rm -f "$said"' EXIT
half rest "${rest[@]}" >"$said" 2>&1 &
half mounts "${mounts[@]}"
first=$?
wait %1
second=$?
cat "$said"
status=0
again mounts "$first" "${mounts[@]}" || status=1
again rest "$second" "${rest[@]}" || status=1
exit "$status"
