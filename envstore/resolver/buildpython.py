"""The environment's own interpreter on this machine's disk, to build wheels with."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Sequence
from pathlib import Path

from envstore.resolver.channels import make_client
from envstore.resolver.conda import records_of
from envstore.resolver.lock import CondaPackage
from envstore.resolver.rattler_call import call

_DONE = ".complete"


def conda_interpreter(packages: Sequence[CondaPackage], directory: Path) -> Path:
    """Return the interpreter among ``packages``, installed below ``directory`` with its needs.

    It stays there for the next time. ``packages`` must hold ``python`` and must run here. Raises
    what fetching raises.
    """
    import rattler

    wanted = _needed(packages, "python")
    digests = "".join(sorted(package.sha256 for package in wanted))
    prefix = directory / hashlib.sha256(digests.encode()).hexdigest()[:32]
    program = prefix / "bin" / "python"
    directory.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (prefix / _DONE).exists():
            return program
        records = records_of(wanted)
        client = make_client()
        call(
            lambda: rattler.install(
                records,
                prefix,
                cache_dir=directory / "packages",
                client=client,
                show_progress=False,
                execute_link_scripts=False,
            )
        )
        (prefix / _DONE).touch()
    return program


def _needed(packages: Sequence[CondaPackage], name: str) -> list[CondaPackage]:
    """Return the package called ``name`` and everything it depends on, in their order."""
    by_name = {package.name: package for package in packages}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        package = by_name.get(waiting.pop())
        if package is None or package.name in found:
            continue
        found.add(package.name)
        for text in package.depends:
            waiting.extend(text.split()[:1])
    return [package for package in packages if package.name in found]
