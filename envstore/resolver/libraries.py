"""What the ELF files of a composed environment are, from the facts of its stored packages."""

from __future__ import annotations

import os
from collections.abc import Sequence

from envstore.errors import EnvstoreError
from envstore.resolver.abi.check import check
from envstore.resolver.abi.facts import ElfFacts, from_json
from envstore.resolver.abi.findings import ERROR, Finding
from envstore.resolver.abi.host import AbiTarget
from envstore.resolver.abi.search import Tree
from envstore.resolver.compose import Composition, compose
from envstore.resolver.ingest import key_of, label
from envstore.resolver.lock import CondaPackage, Lock, PypiPackage, python_of
from envstore.store.packages import StoredPackage, load_packages
from envstore.store.repository import Repository
from envstore.store.source import Kind


class AbiError(EnvstoreError):
    """Libraries of an environment do not fit together; ``findings`` are all that is wrong."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        first = findings[0]
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        super().__init__(
            f"{first.line}{more}",
            hint=f"{first.hint or 'change what it is made of'}; or push with --allow-abi-errors",
        )
        self.findings = tuple(findings)


def tree_of(lock: Lock, packages: Sequence[StoredPackage], composed: Composition) -> Tree:
    """Return the ELF files and links of what ``composed`` made of the lock's ``packages``."""
    files: dict[str, tuple[str, ElfFacts]] = {}
    for number, (package, stored) in enumerate(zip(lock.packages, packages, strict=True)):
        name = label(package)
        elf = stored.facts.get("elf")
        for path, facts in (from_json(elf) if elf else {}).items():
            if composed.owners.get(os.fsencode(path)) == number:
                files[path] = name, facts
    links = {
        os.fsdecode(path): os.fsdecode(entry.target)
        for path, entry in composed.entries.items()
        if entry.kind is Kind.SYMLINK
    }
    return Tree(files, links)


def target_of(lock: Lock) -> AbiTarget:
    """Return where the environment of ``lock`` shall run."""
    cuda = lock.virtual.get("__cuda", "").partition("=")[0]
    return AbiTarget(lock.platform, lock.virtual.get("__glibc", "").partition("=")[0], cuda)


def versions_of(lock: Lock) -> dict[str, str]:
    """Return the versions of the lock's packages by name."""
    return {
        package.name: package.version
        for package in lock.packages
        if isinstance(package, CondaPackage | PypiPackage)
    }


def stored_tree(repository: Repository, lock: Lock) -> Tree | None:
    """Return the tree of a lock that was pushed, ``None`` if not all its packages are stored."""
    python = python_of(lock)
    warnings: list[str] = []
    for bytecode in (True, False):
        keys = [key_of(package, python, bytecode=bytecode) for package in lock.packages]
        found = load_packages(repository.objects, keys, warnings)
        packages = [package for package in found if package is not None]
        if len(packages) == len(keys):
            names = [label(package) for package in lock.packages]
            composed = compose([package.entries for package in packages], names)
            return tree_of(lock, packages, composed)
    return None


def check_libraries(
    lock: Lock, packages: Sequence[StoredPackage], composed: Composition
) -> list[Finding]:
    """Return what is to be known of the libraries; raises ``AbiError`` for what cannot work."""
    findings = check(tree_of(lock, packages, composed), target_of(lock), versions_of(lock))
    errors = [finding for finding in findings if finding.level == ERROR]
    if errors:
        raise AbiError(errors)
    return findings
