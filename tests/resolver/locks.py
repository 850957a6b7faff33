"""Locks of what the tests' own channels have, and pushes of them from machines of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from envstore.resolver.conda import solve
from envstore.resolver.lock import CondaPackage, Lock
from envstore.resolver.pushing import LockPush, Places, push_lock
from envstore.resolver.target import make_target
from envstore.store.refs import RefName
from tests.channel.conda import Channel
from tests.stores import Store


def conda_lock(channel: Channel, *specs: str, cache: Path) -> Lock:
    """Return the lock of conda packages for this machine, which need not have been resolved."""
    target = make_target(None)
    packages = solve(specs, [channel.url], target, cache=cache)
    return Lock(target.platform, packages, dict(target.virtual))


def listed_lock(channel: Channel, *names: str) -> Lock:
    """Return the lock of just these packages, in this order, whatever they depend on."""
    packages = []
    for name in names:
        package = channel.package(name)
        about = package.about
        packages.append(
            CondaPackage(
                about.name,
                about.version,
                about.build,
                about.subdir,
                channel.package_url(name),
                str(package.record["sha256"]),
                int(str(package.record["size"])),
                depends=tuple(about.depends),
                noarch=about.noarch or "",
            )
        )
    return Lock("linux-64", tuple(packages), {"__glibc": "2.36"})


def push(
    store: Store,
    lock: Lock,
    machine: Path,
    ref: str = "env",
    *,
    local: Mapping[str, Path] | None = None,
    check_abi: bool = True,
    run_scripts: bool = True,
    phases: list[str] | None = None,
) -> LockPush:
    """Push ``lock`` from a machine that keeps what it keeps below ``machine``."""
    seen: list[str] = [] if phases is None else phases
    return push_lock(
        store.repository,
        lock,
        RefName.parse(ref),
        Places(machine / "pending", machine / "archives", local or {}),
        check_abi=check_abi,
        run_scripts=run_scripts,
        progress=lambda phase, done, total: seen.append(phase),
    )


def requests_for(names: Sequence[str], kind: str) -> list[str]:
    """Return those of the object keys ``names`` that are of a kind."""
    return [name for name in names if name.startswith(f"{kind}/")]
