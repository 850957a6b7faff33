#!/usr/bin/env bash
# Adds what only the tests and benchmarks of checkpoints need: the frameworks that they plug into.
# Run by `make frameworks`, after `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
stamp=.venv/.frameworks-$(cat requirements-frameworks.lock scripts/setup-frameworks.sh | sha256sum | cut -c1-32)
[ -e "$stamp" ] && exit 0
echo "installing torch and the frameworks that requirements-frameworks.lock pins"
rm -f .venv/.frameworks-*
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --quiet --no-deps --require-hashes -r requirements-frameworks.lock ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-frameworks.lock
# Not by a lock: which of its builds fits (CPU or some CUDA) is decided by where pip is set up to look, and each
# has other hashes and needs. What they share is in the lock, and stays as it is.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==$torch"
.venv/bin/python -W ignore -c 'import torch'
touch "$stamp"
