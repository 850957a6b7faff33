"""Takes packages into the store that are not there yet: fetch, verify, unpack, cut, describe.

Cost: each archive is downloaded once, unpacked into a scratch directory (which needs room for a
batch of them), read and hashed; what is new is compressed and sent. Batches bound the room, and
what a batch stored stays when a later one fails, so that an interrupted push goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envstore.errors import NotFoundError
from envstore.resolver.compiler import Compiler, base_interpreter
from envstore.resolver.lock import CondaPackage, LocalPython, Package, PythonFacts
from envstore.resolver.packages.source import PackagesSource
from envstore.resolver.packages.unpacked import Unpacked
from envstore.resolver.scratch import scratch_directory
from envstore.resolver.workers import worker_processes
from envstore.store.filing import Progress, entries_of, scan, store_files
from envstore.store.known import KnownChunks
from envstore.store.manifest import Entry
from envstore.store.packages import (
    StoredPackage,
    describe_package,
    package_key,
    save_packages,
)
from envstore.store.packing import PackWriter
from envstore.store.repository import Repository
from envstore.store.source import Kind

RECIPE = "1"
"""Changes whenever the same archive would become another tree or other facts."""

_BATCH = 1 << 30
_WORTH_PROCESSES = 24 << 20


@dataclass(frozen=True, slots=True)
class Intake:
    """Where packages go: an open push, and a directory for archives and for what is unpacked."""

    repository: Repository
    known: KnownChunks
    writer: PackWriter
    downloads: Path
    progress: Progress
    local: Mapping[str, Path]
    """Archives that lie here, by their SHA-256 in hex: wheels that were built, say."""
    program: Path | None = None
    """The local interpreter to take, for a lock that has one."""


def label(package: Package) -> str:
    """Return what people call a package, ``numpy-2.1.3``."""
    if isinstance(package, LocalPython):
        return f"python-{package.version} (local)"
    return f"{package.name}-{package.version}"


def key_of(package: Package, python: PythonFacts | None, *, bytecode: bool) -> str:
    """Return the key under which ``package`` is stored for environments with this ``python``.

    What depends on no interpreter is the same in all of them.
    """
    if isinstance(package, CondaPackage) and not _needs_python(package):
        return package_key(package.sha256, f"any.{RECIPE}")
    if python is None:
        return package_key(package.sha256, f"none.{RECIPE}")
    variant = f"cp{python.version}"
    if python.site_packages != f"lib/python{python.minor}/site-packages":
        variant += "." + python.site_packages.replace("/", "_")
    plain = "" if bytecode else ".plain"
    return package_key(package.sha256, f"{variant}{plain}.{RECIPE}")


def _needs_python(package: CondaPackage) -> bool:
    return (
        package.name == "python"
        or package.noarch == "python"
        or any(need.split()[0] in ("python", "python_abi") for need in package.depends)
    )


def ingest(
    intake: Intake, packages: Sequence[tuple[str, Package]], compiler: Compiler
) -> dict[str, StoredPackage]:
    """Store ``packages``, given with their keys, and return what was stored, by key.

    Raises what fetching, unpacking and the store raise.
    """
    python = compiler.python
    stored: dict[str, StoredPackage] = {}
    for batch in _batches(packages):
        with scratch_directory(intake.downloads) as root:
            archives = _fetch_to_keep(intake, [package for _, package in batch], root)
            unpacked = _unpack_all(intake, batch, archives, root / "packages", python)
            program = _program(intake, compiler, batch, unpacked, root)
            source = PackagesSource(root / "packages", unpacked, python, program)
            try:
                found = _store(intake, batch, unpacked, source)
            finally:
                source.close()
        stored |= found
        for path in archives.values():
            if path.parent == root:
                (intake.downloads / path.name).unlink(missing_ok=True)
    return stored


def _program(
    intake: Intake,
    compiler: Compiler,
    batch: Sequence[tuple[str, Package]],
    unpacked: Sequence[Unpacked],
    root: Path,
) -> Path | None:
    """Return the interpreter for the bytecode, unpacking the environment's own if need be."""
    own, python = compiler.package, compiler.python
    if own is None or python is None or compiler.program is not None:
        return compiler.program
    for (_, package), found in zip(batch, unpacked, strict=True):
        if package == own:
            return found.root / "bin" / f"python{python.minor}"
    archive = _fetch_to_keep(intake, [own], root)[own.sha256]
    found = unpack(own, archive, root / "python", python, None)
    return found.root / "bin" / f"python{python.minor}"


def _fetch_to_keep(intake: Intake, packages: Sequence[Package], root: Path) -> dict[str, Path]:
    """Fetch archives and give them a second name, for another push may be done with them first."""
    while True:
        found = fetch(intake, packages)
        try:
            for sha256, path in found.items():
                if path.parent == intake.downloads:
                    found[sha256] = root / path.name
                    if not found[sha256].exists():
                        os.link(path, found[sha256])
        except FileNotFoundError:
            continue
        return found


def fetch(intake: Intake, packages: Sequence[Package]) -> dict[str, Path]:
    """Return where the archives of ``packages`` lie, by SHA-256, downloading what is missing.

    Raises ``NotFoundError`` for what was built on another machine.
    """
    from envstore.resolver.packages.download import Archive, fetch_archives

    found = {}
    wanted = []
    for package in packages:
        if isinstance(package, LocalPython):
            continue
        path = intake.local.get(package.sha256)
        if path is not None:
            found[package.sha256] = path
        elif not package.url:
            raise NotFoundError(
                f"the wheel of {label(package)} was built on another machine and is not stored",
                hint="push this lock from there once, or lock again",
            )
        else:
            wanted.append(Archive(package.url, package.sha256, package.size, label(package)))
    if wanted:
        found |= fetch_archives(
            wanted,
            intake.downloads,
            progress=lambda done, total: intake.progress("download", done, total),
        )
    return found


def _batches(packages: Sequence[tuple[str, Package]]) -> Iterator[list[tuple[str, Package]]]:
    batch: list[tuple[str, Package]] = []
    room = _BATCH
    for key, package in packages:
        size = 0 if isinstance(package, LocalPython) else package.size
        if batch and size > room:
            yield batch
            batch, room = [], _BATCH
        batch.append((key, package))
        room -= size
    if batch:
        yield batch


def _unpack_all(
    intake: Intake,
    batch: Sequence[tuple[str, Package]],
    archives: Mapping[str, Path],
    root: Path,
    python: PythonFacts | None,
) -> list[Unpacked]:
    root.mkdir()
    jobs = []
    for number, (_, package) in enumerate(batch):
        archive = None if isinstance(package, LocalPython) else archives[package.sha256]
        jobs.append((package, archive, root / str(number), python, intake.program))
    sizes = [archive.stat().st_size if archive else 0 for _, archive, *_ in jobs]
    total, done = sum(sizes), 0
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    intake.progress("unpack", 0, total)
    found = []
    if total < _WORTH_PROCESSES or workers < 2:
        for job, size in zip(jobs, sizes, strict=True):
            found.append(unpack(*job))
            done += size
            intake.progress("unpack", done, total)
        return found
    with worker_processes(workers) as pool:
        # The interpreter and what is large first, so that no processor waits for the last one.
        order = sorted(range(len(jobs)), key=lambda at: -(sizes[at] or 1 << 62))
        tasks = {at: pool.submit(unpack, *jobs[at]) for at in order}
        for number, size in enumerate(sizes):
            found.append(tasks[number].result())
            done += size
            intake.progress("unpack", done, total)
    return found


def unpack(
    package: Package,
    archive: Path | None,
    into: Path,
    python: PythonFacts | None,
    program: Path | None,
) -> Unpacked:
    """Unpack one package below ``into``; its facts also say what its ELF files need and give."""
    from envstore.resolver.abi.facts import elf_facts, to_json

    into.mkdir()
    if isinstance(package, LocalPython):
        from envstore.resolver.packages.interpreter import unpack_interpreter

        program = program or base_interpreter()
        found, unpacked = unpack_interpreter(program, into)
        if found.sha256 != package.sha256:
            raise NotFoundError(
                f"{program} is not the Python {package.version} that was locked, "
                "and that one is not stored",
                hint="push this lock once where it was made, with the same --python if one was "
                "named, or lock again with --upgrade",
            )
    elif isinstance(package, CondaPackage):
        from envstore.resolver.packages.conda_archive import unpack_conda

        assert archive is not None  # noqa: S101 - for the type checker
        unpacked = unpack_conda(archive, into, package, python)
    else:
        from envstore.resolver.packages.wheel import unpack_wheel

        assert archive is not None and python is not None  # noqa: S101, PT018
        unpacked = unpack_wheel(archive, into, package, python)
    elf = {}
    for entry in unpacked.entries:
        name = entry.path.rpartition(b"/")[2]
        if entry.kind is Kind.FILE and (entry.executable or b".so" in name):
            facts = elf_facts(unpacked.root / os.fsdecode(entry.path))
            if facts is not None:
                elf[os.fsdecode(entry.path)] = facts
    if not elf:
        return unpacked
    return replace(unpacked, facts={**unpacked.facts, "elf": to_json(elf)})


def _store(
    intake: Intake,
    batch: Sequence[tuple[str, Package]],
    unpacked: Sequence[Unpacked],
    source: PackagesSource,
) -> dict[str, StoredPackage]:
    tree = scan(source)
    store_files(source, tree, intake.known, intake.writer, intake.progress)
    while not intake.known.forget_lost(tree.chunks()):
        store_files(source, tree, intake.known, intake.writer, intake.progress)
    intake.writer.flush()
    entries: list[list[Entry]] = [[] for _ in batch]
    for entry in entries_of(source, tree):
        number, _, path = entry.path.partition(b"/")
        if path:
            entries[int(number)].append(replace(entry, path=path))
    stored = {
        key: describe_package(entries[number], unpacked[number].facts, intake.known.index)
        for number, (key, _) in enumerate(batch)
    }
    save_packages(intake.repository.objects, list(stored.items()))
    return stored
