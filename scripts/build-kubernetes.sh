#!/usr/bin/env bash
# Builds Kubernetes 1.20 for a cluster on this machine from Debian's source package, with Debian's Go.
# Usage: scripts/build-kubernetes.sh DIRECTORY
#
# DIRECTORY gets kubelet, kube-apiserver, kube-controller-manager and kube-scheduler, those that it has are
# not built again. Takes 6 minutes of one core (JOBS=N uses more), 2 GB in TMPDIR meanwhile, root to
# install what it takes, and a Debian with access to its sources.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p "$1"
target=$(realpath "$1")
missing=()
for program in kubelet kube-apiserver kube-controller-manager kube-scheduler; do
    [ -x "$target/$program" ] || missing+=("$program")
done
[ ${#missing[@]} -gt 0 ] || exit 0

scripts/system-packages.sh golang-go dpkg-dev
work=$(mktemp -d "${TMPDIR:-/tmp}/envstore-kubernetes-XXXXXX")
# Go keeps what it downloads unwritable; nothing is downloaded here, but who knows.
trap 'chmod -R u+w "$work"; rm -rf --one-file-system "$work"' EXIT

# Sources of packages, for this once only: what this machine asks its mirrors for stays as it is.
mkdir -p "$work"/apt/{lists/partial,archives/partial} "$work/source"
mirror=$(apt-get indextargets --format '$(SITE) $(CREATED_BY) $(ORIGIN) $(CODENAME)' 'Created-By: Packages' 'Codename: bookworm' |
    awk '$3 == "Debian" { print $1; exit }')
[ -n "$mirror" ] || { echo "error: the sources of Kubernetes 1.20 are in Debian 12, which this is not" >&2; exit 1; }
echo "deb-src $mirror bookworm main" >"$work/apt/sources.list"
apt=(apt-get -qq -o "Dir::Etc::SourceList=$work/apt/sources.list" -o Dir::Etc::SourceParts=-
    -o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work/source" && "${apt[@]}" source --download-only kubernetes)

# In GOPATH mode, as the package's own vendor directory does not satisfy its go.mod.
export GOPATH=$work/go GOCACHE=$work/cache GO111MODULE=off GOFLAGS= GOTOOLCHAIN=local CGO_ENABLED=0
export GOMAXPROCS=${JOBS:-1}
tree=$GOPATH/src/k8s.io/kubernetes
mkdir -p "$tree"
tar --extract --file "$work"/source/kubernetes_*.orig.tar.gz --strip-components 1 --directory "$tree"
cd "$tree"

echo "building Kubernetes: ${missing[*]}"
# Nothing here asks a cloud for anything, or Docker.
build() {
    nice -n 10 go build -p "$GOMAXPROCS" -tags providerless,dockerless "$@"
}

# The API's description is the one generated file that the package does not hold.
describe_api() {
    local packages
    build -o "$work/openapi-gen" k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen
    packages=$(grep --recursive --files-with-matches --include '*.go' '+k8s:openapi-gen=' staging/src/k8s.io pkg cmd |
        grep -vE 'zz_generated|/testdata/|_examples|staging/src/k8s.io/(code-generator|sample-apiserver)/' |
        xargs --max-args 1 dirname | LC_ALL=C sort --unique |
        sed -e 's#^staging/src/#k8s.io/kubernetes/vendor/#' -e 's#^\(pkg\|cmd\)/#k8s.io/kubernetes/\1/#' |
        paste --serial --delimiters ,)
    "$work/openapi-gen" --input-dirs "$packages" --output-package k8s.io/kubernetes/pkg/generated/openapi \
        --output-file-base zz_generated.openapi --report-filename "$work/violations" \
        --go-header-file vendor/k8s.io/code-generator/hack/boilerplate.go.txt
}
[[ " ${missing[*]} " != *" kube-apiserver "* ]] || describe_api

version=v1.20.2
flags="-s -w"
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    name=k8s.io/kubernetes/vendor/$package
    flags+=" -X $name.gitVersion=$version -X $name.gitMajor=1 -X $name.gitMinor=20 -X $name.gitTreeState=clean"
done
for program in "${missing[@]}"; do
    build -ldflags "$flags" -o "$work/$program" "k8s.io/kubernetes/cmd/$program"
    mv "$work/$program" "$target/$program"
    echo "  $program"
done
