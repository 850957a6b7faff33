#!/usr/bin/env bash
# Adds the engine that `make fuzz` prefers. Where it cannot be had, fuzzing goes on without it.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.fuzz-$(sha256sum <requirements-fuzz.lock | cut -c1-32)
[ -e "$stamp" ] && exit 0
if VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --quiet --require-hashes -r requirements-fuzz.lock ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-fuzz.lock; then
    touch "$stamp"
else
    echo "atheris cannot be installed here: inputs are changed at random instead" >&2
fi
