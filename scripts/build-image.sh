#!/usr/bin/env bash
# Builds the image of envstore's containers and writes it to an archive.
# Usage: scripts/build-image.sh [NAME[:TAG] [ARCHIVE]]
#
# Python packages are fetched by this machine's pip, from wherever it is set up to, and checked by their
# hashes; building itself asks no index. The base is BASE, or without it a Debian 12 that debootstrap makes
# once and CACHE keeps (it takes root, as building does). The archive is what `docker load`, `podman load`
# and `ctr images import` read.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-envstore:$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' envstore/__init__.py)}
archive=${2:-build/envstore-image.tar}
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/envstore-image}
suite=bookworm
python=3.11 # that suite's

[[ $name == */* ]] || name=localhost/$name
[[ $name == *:* ]] || name=$name:latest
[ "$(id -u)" -eq 0 ] || { echo "error: building an image takes root: sudo scripts/build-image.sh" >&2; exit 1; }
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || missing=1
done
[ -z "${missing:-}" ] || scripts/system-packages.sh buildah debootstrap
mkdir -p "$cache" "$(dirname "$archive")"

work=$(mktemp -d "${TMPDIR:-/tmp}/envstore-image-XXXXXX")
# Layers are kept in a store of their own in the cache, for the next time.
builder=(buildah --root "$cache/store" --runroot "$work/run" --storage-driver "${STORAGE_DRIVER:-overlay}")
clean_up() {
    # An interrupted build leaves mounts.
    awk -v store="$cache/store/" 'index($5, store) == 1 { print $5 }' /proc/self/mountinfo | sort --reverse |
        xargs --no-run-if-empty umount --lazy
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
"${builder[@]}" rm --all >/dev/null # what an earlier one was building

# With what interpreters need that lie in a volume, as the same base runs the pods of `make e2e-k8s`.
make_base() {
    local root=$work/base mirror
    echo "making a Debian $suite to build upon; it is kept in $cache"
    debootstrap --variant=minbase --include=libexpat1 "$suite" "$root" ${MIRROR:+"$MIRROR"} >"$work/debootstrap.log" ||
        { tail -5 "$work/debootstrap.log" >&2; exit 1; }
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
    printf 'deb %s %s main\n' "$mirror" "$suite" "$mirror" "$suite-updates" "$mirror-security" "$suite-security" \
        >"$root/etc/apt/sources.list"
    # What slim images leave out, now and whenever something is installed.
    printf 'path-exclude /usr/share/%s/*\n' doc man info locale groff lintian >"$root/etc/dpkg/dpkg.cfg.d/slim"
    chroot "$root" sh -c 'apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes upgrade' >>"$work/debootstrap.log" 2>&1 ||
        { tail -5 "$work/debootstrap.log" >&2; exit 1; }
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* \
        "$root"/usr/share/{doc,man,info,locale,groff,lintian}/*
    tar --create --numeric-owner --one-file-system --directory "$root" --file "$work/base.tar" .
    mv "$work/base.tar" "$cache/$suite.tar"
    rm -rf --one-file-system "$root"
}

if [ -z "${BASE:-}" ]; then
    [ -e "$cache/$suite.tar" ] || make_base
    BASE=localhost/debian:$suite-slim
    if ! "${builder[@]}" inspect --type image "$BASE" &>/dev/null; then
        from=$("${builder[@]}" from scratch)
        "${builder[@]}" add --quiet "$from" "$cache/$suite.tar" / >/dev/null
        "${builder[@]}" commit --quiet --rm "$from" "$BASE" >/dev/null
    fi
fi

context=$work/context
wheels=$cache/wheels-$(cat requirements-image.lock requirements-build.lock | sha256sum | cut -c1-16)
mkdir "$context"
if [ ! -d "$wheels" ]; then
    echo "fetching what requirements-image.lock pins"
    for lock in requirements-image.lock requirements-build.lock; do
        .venv/bin/python -m pip download -qq --disable-pip-version-check --no-deps --require-hashes \
            --python-version "$python" --dest "$work/wheels" --requirement "$lock"
    done
    mv "$work/wheels" "$wheels"
fi
cp -r "$wheels" "$context/wheels"
cp -r Containerfile pyproject.toml hatch_build.py README.md LICENSE requirements-image.lock requirements-build.lock "$context"
tar --create --exclude=__pycache__ --exclude='*_pb2*' envstore | tar --extract --directory "$context"

echo "building $name"
build() {
    "${builder[@]}" bud --quiet --layers --pull-never --isolation chroot --build-arg BASE="$BASE" "$@" "$context" >"$work/build.log" 2>&1 ||
        { tail -30 "$work/build.log" >&2; exit 1; }
}
build --target packages --tag localhost/envstore-packages
build --tag "$name"
"${builder[@]}" rmi --prune --force >/dev/null # of what only earlier images were made of
rm -f "$archive"
"${builder[@]}" push --quiet "$name" "docker-archive:$archive:$name"
echo "$name: $(du --apparent-size -h "$archive" | cut -f1) in $archive"
