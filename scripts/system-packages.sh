#!/usr/bin/env bash
# Installs the named Debian packages that are missing; does nothing, quickly, when none is.
# Usage: scripts/system-packages.sh PACKAGE...
set -euo pipefail

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "note: not a Debian system; make sure it has what Debian calls: $*" >&2
    exit 0
fi

missing=()
for package in "$@"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

give_up() {
    echo "error: $1; as root, run: apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
}

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || give_up "system packages are missing, and there is no sudo to install them"
    # Without a terminal sudo could not ask for the password.
    [ -t 0 ] || sudo -n true 2>/dev/null || give_up "system packages are missing, and sudo needs a password"
    as_root=(sudo)
fi

echo "installing system packages: ${missing[*]}"
# RUNLEVEL=1 keeps packages from starting services; another apt may hold the lock for a while.
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -o DPkg::Lock::Timeout=300)
"${apt[@]}" update || give_up "apt-get update failed"
"${apt[@]}" install --yes --no-install-recommends "${missing[@]}" || give_up "apt-get install failed"
