"""Pushes a lock: packages -> stored packages -> composition -> manifest -> snapshot -> ref.

Nothing is resolved and nothing installed. A package that is stored already costs one small
request; of the others each is fetched once. As in every push nothing is visible before the ref
moves, last.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from envstore.errors import CorruptError
from envstore.resolver import ingest, postlink
from envstore.resolver.compiler import Compiler
from envstore.resolver.compose import Composition, compose
from envstore.resolver.libraries import check_libraries
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, Package
from envstore.resolver.lockfile import encode_lock
from envstore.resolver.packages.generated import generate
from envstore.resolver.packages.identity import is_of
from envstore.resolver.packages.memory import MemorySource
from envstore.resolver.scratch import scratch_directory
from envstore.resolver.target import own_platform
from envstore.store.damage import damaged_packs
from envstore.store.describing import store_manifest
from envstore.store.digest import digest
from envstore.store.filing import Progress, entries_of, scan, silent, store_files
from envstore.store.healing import heal_after
from envstore.store.index import DedupIndex
from envstore.store.known import KnownChunks, find_orphans
from envstore.store.locks import save_lock
from envstore.store.manifest import HOLE, Entry, sort_key
from envstore.store.packages import (
    StoredPackage,
    describe_package,
    load_packages,
    package_key,
    save_packages,
)
from envstore.store.packing import PackWriter
from envstore.store.pull import pull
from envstore.store.push import PushOptions, PushResult
from envstore.store.refs import Ref, RefName, move_ref, try_read
from envstore.store.repository import Repository
from envstore.store.sessions import writing
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import DirectorySource, Source

COMPOSER = "1"
"""Changes whenever the same lock would become another manifest."""

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class LockPush:
    """What pushing a lock did: what every push tells, and how many packages were new.

    ``downloaded_bytes`` are those of archives.
    """

    result: PushResult
    packages: int
    new_packages: int
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class Places:
    """Directories and programs of this machine that a push of a lock uses.

    ``downloads`` holds archives until they are stored; ``local`` are archives that lie here, by
    SHA-256; ``python`` is the interpreter to take for a lock with a local one.
    """

    state: Path
    downloads: Path
    local: Mapping[str, Path] = field(default_factory=dict)
    python: Path | None = None


def push_lock(
    repository: Repository,
    lock: Lock,
    ref: RefName,
    places: Places,
    *,
    options: PushOptions | None = None,
    check_abi: bool = True,
    run_scripts: bool = True,
    progress: Progress = silent,
) -> LockPush:
    """Store the environment of ``lock`` and point ``ref`` at it.

    With ``check_abi`` an environment whose libraries do not fit together is refused; with
    ``run_scripts`` the packages' post-link scripts are run (see ``postlink``). Raises
    ``UsageError``, ``NotFoundError`` (an archive is gone), ``CorruptError`` (an archive is not
    what was locked), ``ConflictError`` (the ref was moved meanwhile) and the errors of the store.
    """
    return _LockPush(repository, lock, ref, places, options or PushOptions(), progress).run(
        check_abi=check_abi, run_scripts=run_scripts
    )


class _LockPush:
    """One push of one lock; its methods are the steps."""

    def __init__(
        self,
        repository: Repository,
        lock: Lock,
        ref: RefName,
        places: Places,
        options: PushOptions,
        progress: Progress,
    ) -> None:
        self._repository, self._lock, self._ref = repository, lock, ref
        self._places, self._options, self._progress = places, options, progress
        self._started = time.monotonic()
        traffic = repository.objects.traffic
        self._requests, self._sent = traffic.requests, traffic.bytes_out
        self._known = KnownChunks(repository, DedupIndex())
        self._warnings: list[str] = []
        self._downloaded = self._read = 0
        self._new: set[str] = set()
        self._compiler = Compiler(lock, places.python)
        if self._compiler.trouble:
            self._warnings.append(self._compiler.trouble)

    def run(self, *, check_abi: bool, run_scripts: bool) -> LockPush:
        """See ``push_lock``."""
        data = encode_lock(self._lock)
        expected = try_read(self._repository.objects, self._ref)
        base = expected[0].snapshot if expected else None
        before = self._known.base(base) if base else None
        current = before is not None and self._is_current(before, digest(data))
        # Of what is known to be damaged every byte may be wanted once more.
        if base and before and current and not damaged_packs(self._repository.objects):
            return self._done(base, before, unchanged=True)
        with writing(self._repository, f"push {self._ref}") as (_, inside):
            self._repository = inside
            self._known.use(inside)
            return self._store(expected, data, check_abi=check_abi, run_scripts=run_scripts)

    def _store(
        self,
        expected: tuple[Ref, str] | None,
        data: bytes,
        *,
        check_abi: bool,
        run_scripts: bool,
    ) -> LockPush:
        """Store the environment of the lock that ``data`` is, and move the ref."""
        objects = self._repository.objects
        base = expected[0].snapshot if expected else None
        keys = [
            ingest.key_of(package, self._compiler.python, bytecode=self._compiler.able)
            for package in self._lock.packages
        ]
        stored = self._look_up(keys, [*([base] if base else []), *self._options.parents])
        state = self._places.state
        orphans = find_orphans(self._repository, state)
        self._known.index.add_packs(orphans)
        writer = PackWriter(objects, self._known.index, pending=state, level=self._options.level)
        try:
            writer.adopt(orphans)
            self._complete(writer, keys, stored)
            packages = [stored[key] for key in keys]
            for asked, package in zip(self._lock.packages, packages, strict=True):
                if not is_of(package.facts, asked):
                    raise CorruptError(
                        f"the lock names the archive of another package for {ingest.label(asked)}"
                    )
            composed = self._compose(packages)
            if check_abi:
                self._check_abi(composed, packages)
            entries = self._with_generated(writer, composed, packages)
            if run_scripts:
                entries = self._with_scripts(writer, entries, packages, data)
            root = store_manifest(
                self._repository, entries, self._known, writer, progress=self._progress
            )
        finally:
            writer.close()
        snapshot = Snapshot(
            "env",
            root.digest,
            root.files,
            root.logical,
            _now(),
            (base,) if base else (),
            lock=save_lock(objects, data),
            message=self._options.message,
            attributes=self._attributes(),
        )
        name = save_snapshot(objects, snapshot)
        moved = move_ref(objects, self._ref, name, expected)
        if self._repository.witness is not None:
            self._repository.witness.saw(self._ref, moved)
        self._known.warnings += heal_after(self._repository, self._known.index)
        return self._done(name, snapshot, unchanged=False, writer=writer)

    def _is_current(self, before: Snapshot, lock: bytes) -> bool:
        return before.lock == lock and before.attributes.get("composer") == self._composer()

    def _composer(self) -> str:
        """Return what besides the lock decides the manifest."""
        return f"{COMPOSER}.{ingest.RECIPE}" + ("" if self._compiler.able else ".plain")

    def _look_up(self, keys: Sequence[str], bases: Sequence[bytes]) -> dict[str, StoredPackage]:
        """Return the packages that are stored, and learn where their chunks lie."""
        self._progress("look", 0, 0)
        with ThreadPoolExecutor(1) as pool:
            learned = pool.submit(self._known.learn_snapshots, bases)
            found = load_packages(self._repository.objects, keys, self._warnings)
            learned.result()
        stored = {}
        for key, package, asked in zip(keys, found, self._lock.packages, strict=True):
            if package is not None and not is_of(package.facts, asked):
                self._warnings.append(f"a package is stored again: {key} is of another one")
            elif package is not None:
                stored[key] = package
                package.learn(self._known.index)
        self._drop_lost(stored)
        return stored

    def _drop_lost(self, stored: dict[str, StoredPackage]) -> None:
        """Take packages for absent whose chunks are gone, doomed or damaged."""
        for key, package in list(stored.items()):
            if any(self._lost(name) for name in package.chunks()):
                del stored[key]

    def _complete(
        self, writer: PackWriter, keys: Sequence[str], stored: dict[str, StoredPackage]
    ) -> None:
        """Ingest what is not stored, and what was but lost its bytes."""
        intake = ingest.Intake(
            self._repository,
            self._known,
            writer,
            self._places.downloads,
            self._tell,
            self._places.local,
            self._places.python,
        )
        packages = dict(zip(keys, self._lock.packages, strict=True))
        while True:
            missing = [(key, package) for key, package in packages.items() if key not in stored]
            if missing:
                if not self._new:
                    self._known.learn_segments()
                self._new.update(key for key, _ in missing)
                with self._interpreter(writer, packages, stored):
                    stored |= ingest.ingest(intake, missing, self._compiler)
            chunks = (name for package in stored.values() for name in package.chunks())
            if self._known.forget_lost(chunks):
                return
            self._drop_lost(stored)

    @contextmanager
    def _interpreter(
        self,
        writer: PackWriter,
        packages: Mapping[str, Package],
        stored: Mapping[str, StoredPackage],
    ) -> Iterator[None]:
        """Have a stored interpreter make the bytecode if no program here is of its version."""
        own, python = self._compiler.package, self._compiler.python
        found = [stored[key] for key in stored if isinstance(packages[key], LocalPython)]
        if not isinstance(own, LocalPython) or python is None or not found:
            yield
            return
        with scratch_directory(self._places.downloads) as scratch:
            entries = sorted(found[0].entries, key=lambda entry: sort_key(entry.path))
            self._write_out(writer, entries, scratch / "python")
            self._compiler.program = scratch / "python" / "bin" / f"python{python.minor}"
            try:
                yield
            finally:
                self._compiler.program = None

    def _lost(self, chunk: bytes) -> bool:
        return chunk != HOLE and self._known.index.find(chunk) is None

    def _tell(self, phase: str, done: int, total: int) -> None:
        if phase == "download":
            self._downloaded = max(self._downloaded, done)
        if phase == "read":
            self._read = max(self._read, done)
        self._progress(phase, done, total)

    def _compose(self, packages: Sequence[StoredPackage]) -> Composition:
        names = [ingest.label(package) for package in self._lock.packages]
        composed = compose([package.entries for package in packages], names)
        clobbers = composed.clobbers
        for clobber in clobbers[:_MOST_NAMED]:
            winner, loser = names[clobber.winner], names[clobber.loser]
            path = os.fsdecode(clobber.path)
            self._warnings.append(f"{path} is in {loser} and in {winner}, whose is kept")
        if len(clobbers) > _MOST_NAMED:
            self._warnings.append(f"{len(clobbers) - _MOST_NAMED} more paths are in two packages")
        return composed

    def _check_abi(self, composed: Composition, packages: Sequence[StoredPackage]) -> None:
        self._progress("check", 0, 0)
        findings = check_libraries(self._lock, packages, composed)
        if findings:
            self._warnings.append(
                f"{len(findings)} things about libraries to know of: envstore check {self._ref}"
            )

    def _with_generated(
        self, writer: PackWriter, composed: Composition, packages: Sequence[StoredPackage]
    ) -> list[Entry]:
        """Return all entries, with the files that belong to the environment itself."""
        files = generate(self._lock, [package.facts for package in packages])
        for entry in self._stored(writer, MemorySource(files)):
            composed.add(-1, entry)
        return composed.sorted()

    def _stored(self, writer: PackWriter, source: Source) -> list[Entry]:
        """Store the files of ``source`` and return its entries."""
        tree = scan(source)
        store_files(source, tree, self._known, writer, silent)
        while not self._known.forget_lost(tree.chunks()):
            store_files(source, tree, self._known, writer, silent)
        return entries_of(source, tree)

    def _with_scripts(
        self,
        writer: PackWriter,
        entries: list[Entry],
        packages: Sequence[StoredPackage],
        lock: bytes,
    ) -> list[Entry]:
        """Return the entries after the packages' post-link scripts have run, if there are any."""
        scripts = [
            (package, script)
            for package, stored in zip(self._lock.packages, packages, strict=True)
            if isinstance(package, CondaPackage)
            and (script := f"bin/.{package.name}-post-link.sh") in stored.facts["link_scripts"]
        ]
        if not scripts:
            return entries
        objects = self._repository.objects
        key = package_key(hashlib.sha256(lock).hexdigest(), f"scripts.{ingest.RECIPE}")
        changes = load_packages(objects, [key], self._warnings)[0]
        if changes is not None:
            changes.learn(self._known.index)
        if (
            changes is None
            or not self._known.forget_lost(changes.chunks())
            or any(self._lost(name) for name in changes.chunks())
        ):
            changes = self._run_scripts(writer, entries, scripts)
            save_packages(objects, [(key, changes)])
        names = ", ".join(package.name for package, _ in scripts)
        self._warnings.append(f"post-link scripts were run, on this machine, for: {names}")
        self._warnings += changes.facts["messages"]
        removed = {os.fsencode(path) for path in changes.facts["removed"]}
        merged = {entry.path: entry for entry in entries if entry.path not in removed}
        merged |= {entry.path: entry for entry in changes.entries}
        return sorted(merged.values(), key=lambda entry: sort_key(entry.path))

    def _run_scripts(
        self,
        writer: PackWriter,
        entries: list[Entry],
        scripts: Sequence[tuple[CondaPackage, str]],
    ) -> StoredPackage:
        """Run the scripts in a copy of the environment and store what they changed."""
        platform = own_platform()
        if platform != self._lock.platform:
            raise postlink.ScriptError(
                f"the post-link script of {scripts[0][0].name} for {self._lock.platform} "
                f"does not run on {platform}",
                hint="push from such a machine, or with --no-scripts",
            )
        self._progress("scripts", 0, 0)
        with scratch_directory(self._places.downloads) as scratch:
            prefix = scratch / "env"
            self._write_out(writer, entries, prefix)
            before = DirectorySource(prefix, kind="env", normalise=True).scan()
            messages = postlink.run_scripts(prefix, scripts)
            source = postlink.ChangesSource(prefix, before)
            changed = self._stored(writer, source)
            writer.flush()
        removed = [os.fsdecode(path) for path in source.removed]
        facts = {"messages": [*messages, *source.warnings], "removed": removed}
        return describe_package(changed, facts, self._known.index)

    def _write_out(self, writer: PackWriter, entries: Sequence[Entry], prefix: Path) -> None:
        """Write what is stored to ``prefix``, as a mount there has it."""
        root = store_manifest(self._repository, entries, self._known, writer)
        copy = Snapshot("env", root.digest, root.files, root.logical, _now())
        pull(self._repository, save_snapshot(self._repository.objects, copy), prefix)

    def _attributes(self) -> dict[str, str]:
        found = {"composer": self._composer(), "platform": self._lock.platform}
        if self._compiler.python is not None:
            found["python"] = self._compiler.python.version
        if self._lock.request.name:
            found["name"] = self._lock.request.name
        return found

    def _done(
        self,
        name: bytes,
        snapshot: Snapshot,
        *,
        unchanged: bool,
        writer: PackWriter | None = None,
    ) -> LockPush:
        traffic = self._repository.objects.traffic
        result = PushResult(
            str(self._ref), name, snapshot.manifest, snapshot.kind, snapshot.files,
            snapshot.logical_bytes, self._read, writer.new_bytes if writer else 0,
            writer.stored_bytes if writer else 0, traffic.bytes_out - self._sent,
            traffic.requests - self._requests, time.monotonic() - self._started, unchanged,
            (*self._warnings, *self._known.warnings),
        )  # fmt: skip
        return LockPush(result, len(self._lock.packages), len(self._new), self._downloaded)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
