#!/usr/bin/env bash
# Makes this checkout ready to use: system packages, then .venv with everything that
# requirements.lock pins and envstore itself. Run by `make setup`; safe to repeat, fast when done.
set -euo pipefail
cd "$(dirname "$0")/.."

# Whatever changes what .venv should hold changes this key. The folder is part of it because the
# programs in .venv/bin name it.
key=$( (pwd -P && cat pyproject.toml requirements.lock requirements-build.lock scripts/setup.sh \
    hatch_build.py envstore/csi/proto/*.proto) | sha256sum | cut -c1-32)
stamp=.venv/.setup-$key

made_for() { cat .venv/.made-for 2>/dev/null || true; }

choose_python() {
    scripts/find-python.sh && return
    if [ -z "${PYTHON:-}" ]; then
        scripts/system-packages.sh python3 python3-dev python3-venv >&2
        scripts/find-python.sh && return
    fi
    scripts/find-python.sh --private && return
    echo "error: ${PYTHON:-what this machine calls python3} is no Python >= 3.11 with venv and the C headers;" \
        "name one that is: make setup PYTHON=/path/to/python3" >&2
    return 1
}

make_venv() {
    local python want
    # Whoever chose an interpreter once keeps it until .venv goes.
    if [ -z "${PYTHON:-}" ] && [[ "$(made_for)" == "$(pwd -P) "* ]] && .venv/bin/python -I -m pip --version &>/dev/null; then
        return
    fi
    python=$(choose_python)
    want="$(pwd -P) $python"
    if [ "$(made_for)" != "$want" ] || ! .venv/bin/python -I -m pip --version &>/dev/null; then
        echo "making .venv with $python"
        "$python" -m venv --clear .venv
        echo "$want" >.venv/.made-for
    fi
}

install_locked() {
    # A slow line must not make the largest wheel (an S3 server, for the tests) fail.
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}
    export VIRTUAL_ENV=$PWD/.venv
    # uv itself comes from the lock too, by its hash.
    awk '/^[^ ]/ { wanted = /^uv==/ } wanted' requirements.lock >.venv/uv.lock
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r .venv/uv.lock
    echo "installing what requirements.lock pins"
    if .venv/bin/uv pip sync --require-hashes --compile-bytecode \
        --build-constraints requirements-build.lock requirements.lock; then
        .venv/bin/uv pip install --quiet --no-deps --build-constraints requirements-build.lock --editable .
    else
        # uv does not read pip's configuration, so it may not know the way to a site's own mirror.
        # pip does not take build constraints everywhere: what it builds with is its newest.
        echo "uv failed, as said above; trying the same lock with pip" >&2
        .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    fi
}

if [ -e "$stamp" ] && [ -z "${PYTHON:-}" ] && .venv/bin/python -I -c '' 2>/dev/null &&
    command -v fusermount3 >/dev/null; then
    exit 0
fi
# fuse3 mounts; the tests have erofs-utils check our images, and runc start containers of busybox
# that use volumes as a kubelet's containers do; spin checks the model of the store's protocol; the rest compiles pyfuse3 (gcc by itself only recommends the C library's headers).
scripts/system-packages.sh fuse3 erofs-utils runc busybox-static spin ca-certificates gcc libc6-dev libfuse3-dev pkg-config
make_venv
rm -f .venv/.setup-* .venv/.bench-* .venv/.frameworks-*
install_locked
.venv/bin/envstore --help >/dev/null
touch "$stamp"
echo "ready: .venv/bin/envstore"
