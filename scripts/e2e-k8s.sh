#!/usr/bin/env bash
# Tries envstore on a real Kubernetes of one node, which is made on this machine and removed after.
# Usage: scripts/e2e-k8s.sh [PYTEST OPTIONS]; run by `make e2e-k8s`, as root.
#
# The programs of Kubernetes 1.20 are those in ENVSTORE_K8S_BIN, or are built from Debian's sources once
# and kept in CACHE, like the image's parts. Everything else is below /var/lib/envstore-e2e while it runs.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" -eq 0 ] || { echo "error: a cluster takes root: sudo make e2e-k8s" >&2; exit 1; }
export CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/envstore-image}
binaries=${ENVSTORE_K8S_BIN:-$CACHE/kubernetes-1.20.2}

scripts/system-packages.sh busybox-static containerd containernetworking-plugins etcd-server iproute2 openssl runc
scripts/build-kubernetes.sh "$binaries"
scripts/build-image.sh envstore:e2e "$CACHE/envstore-e2e.tar"

ENVSTORE_E2E_BINARIES=$binaries ENVSTORE_E2E_IMAGE=$CACHE/envstore-e2e.tar ENVSTORE_E2E_ROOT=$CACHE/bookworm.tar \
    exec .venv/bin/pytest -o cache_dir="$PWD/.pytest_cache/e2e" --verbose tests/e2e "$@"
