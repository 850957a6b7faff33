#!/usr/bin/env bash
# Adds what only the benchmarks need: the tools envstore is compared with, and plotting.
# Run by `make bench-setup`, after `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/system-packages.sh restic borgbackup casync zstd squashfuse squashfs-tools python3-pyfuse3 \
    iproute2 mount curl
stamp=.venv/.bench-$(sha256sum requirements-bench.lock | cut -c1-32)
[ -e "$stamp" ] && exit 0
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --require-hashes -r requirements-bench.lock ||
    .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements-bench.lock
touch "$stamp"
