#!/usr/bin/env bash
# Adds what only the benchmarks need: the tools envstore is compared with, and plotting.
# Run by `make bench-setup`, after `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/system-packages.sh restic borgbackup casync zstd squashfuse squashfs-tools python3-pyfuse3 \
    iproute2 mount curl
stamp=.venv/.bench-$(cat requirements-bench.lock requirements-peers.lock | sha256sum | cut -c1-32)
[ -e "$stamp" ] && exit 0
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --require-hashes -r requirements-bench.lock ||
    .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements-bench.lock
# What speaks S3 beside us wants another botocore than we do, but the same torch.
.venv/bin/python -m venv --clear .venv/peers
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$(.venv/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
VIRTUAL_ENV=$PWD/.venv/peers .venv/bin/uv pip install --no-deps --require-hashes -r requirements-peers.lock ||
    .venv/peers/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements-peers.lock
touch "$stamp"
