"""Decides which bytecode a tree is to have, from its entries alone.

The rules for ``__pycache__``:

- Each ``.py`` file below the directories that the interpreter imports from (``lib/python3.X``) has
  exactly one ``.pyc``, made new or rewritten from a valid one. Elsewhere one is kept, rewritten,
  only where a valid one is there; so are the variants ``.opt-1`` and ``.opt-2`` everywhere.
- Sources that are not programs of this language version (templates, test data) have none. That
  shows only when one is compiled, so they are planned and then left out.
- Sources that hold the path of their environment, and links to them, have none either: nothing
  would relocate it.
- A link to a source has bytecode only if it leads to a file of the tree: the bytecode is never
  checked against its source, and one outside may change.
- Bytecode of other interpreters and of sources that are gone is left out. Its validity would
  hang on file times, which a snapshot does not keep, so nothing could ever load it.

A ``.pyc`` that stands in for its source, outside ``__pycache__``, is kept as it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from envstore.resolver.bytecode import ALGORITHM, Job
from envstore.resolver.interpreter import Interpreter
from envstore.store.source import Kind, SourceEntry, stat_signature

_CACHE = b"__pycache__"
_TESTS = b"/tests/"
_LONGEST_NAME = 255
_LONGEST_PATH = 4095
_LEVELS = ((0, b""), (1, b".opt-1"), (2, b".opt-2"))


@dataclass(frozen=True, slots=True)
class Plan:
    """The entries a tree is to have, and by path the jobs that make those among them.

    ``dropped`` counts the bytecode files that are there and in neither.
    """

    entries: list[SourceEntry]
    jobs: dict[bytes, Job]
    dropped: int


def plan(
    entries: Iterable[SourceEntry],
    base: bytes,
    interpreter: Interpreter | None,
    *,
    inner: bool = False,
) -> Plan:
    """Return what becomes of ``entries``, which lie below ``base``.

    Without an interpreter all bytecode is left out. The size of an entry that will be made is an
    estimate; its signature changes whenever its content may. With ``inner`` the directories
    directly below ``base`` are packages, not part of the names in the bytecode, and of their test
    suites only bytecode that is there is kept.
    """
    found = _sort_out(entries)
    kept, there, jobs = found.kept, found.bytecode, dict[bytes, Job]()
    used = found.used
    moved = {source.path for source in found.sources if source.relocation}
    if interpreter is not None:
        below = tuple(path + b"/" for path in interpreter.libraries)
        for source in found.sources:
            path = source.path
            if source.relocation:
                continue
            slash = path.rfind(b"/") + 1
            parent = path[:slash] + _CACHE
            stem = b"%b/%b.%b" % (parent, path[slash:-3], interpreter.tag.encode())
            # Compiling test suites would take as long as all else of a scientific environment.
            create = path.startswith(below) and not (inner and _TESTS in path)
            for level, suffix in _LEVELS:
                if level and not there:
                    break
                name = b"%b%b.pyc" % (stem, suffix)
                old = there.pop(name, None)
                if old is None and (level or not create):
                    continue
                job = _job(source, old, level, create and not level, base, moved)
                if job is not None and inner:
                    job = job._replace(inner=True)
                if job is not None and parent not in found.blocked and _fits(name):
                    jobs[name] = job
                    used.add(parent)
                    kept.append(_entry(name, source, old, job, interpreter))
    for path in used:
        kept.append(found.caches.get(path) or SourceEntry(path, Kind.DIRECTORY, mode=0o755))
    return Plan(kept, jobs, len(there))


@dataclass(slots=True)
class _Found:
    """Entries sorted by what bytecode has to do with them.

    ``bytecode`` and ``caches`` (the directories) are by path and not ``kept`` as they are;
    ``used`` are the directories that hold something else too, and ``blocked`` are what
    is called like one but is none.
    """

    kept: list[SourceEntry] = field(default_factory=list)
    sources: list[SourceEntry] = field(default_factory=list)
    bytecode: dict[bytes, SourceEntry] = field(default_factory=dict)
    caches: dict[bytes, SourceEntry] = field(default_factory=dict)
    used: set[bytes] = field(default_factory=set)
    blocked: set[bytes] = field(default_factory=set)


def _sort_out(entries: Iterable[SourceEntry]) -> _Found:
    found = _Found()
    for entry in entries:
        path = entry.path
        if _CACHE in path:
            parent, _, name = path.rpartition(b"/")
            if name == _CACHE:
                if entry.kind is Kind.DIRECTORY:
                    found.caches[path] = entry
                    continue
                found.blocked.add(path)
            elif parent.rpartition(b"/")[2] == _CACHE:
                if name.endswith(b".pyc") and entry.kind is not Kind.DIRECTORY:
                    # A link is replaced by what it would lead to.
                    if entry.kind is Kind.FILE:
                        found.bytecode[path] = entry
                    continue
                found.used.add(parent)
        elif path.endswith(b".py") and entry.kind is not Kind.DIRECTORY:
            found.sources.append(entry)
        found.kept.append(entry)
    return found


def _fits(path: bytes) -> bool:
    return len(path) <= _LONGEST_PATH and len(path) - path.rfind(b"/") - 1 <= _LONGEST_NAME


def _job(
    source: SourceEntry,
    old: SourceEntry | None,
    level: int,
    create: bool,
    base: bytes,
    moved: set[bytes],
) -> Job | None:
    signature, size, follow = source.signature, source.size, False
    if source.kind is Kind.SYMLINK:
        target = _target(source, base, moved)
        if target is None:
            return None
        signature, size, follow = stat_signature(target), target.st_size, True
    if old is None:
        return Job(source.path, signature, follow, level=level, create=create, size=size)
    return Job(source.path, signature, follow, old.path, old.signature, level, create, old.size)


def _entry(
    name: bytes, source: SourceEntry, old: SourceEntry | None, job: Job, interpreter: Interpreter
) -> SourceEntry:
    whole = (ALGORITHM, interpreter.identity, source.signature, job.signature, job.cache_signature)
    return SourceEntry(
        name,
        Kind.FILE,
        size=job.size,
        signature=blake2b(b"\0".join(whole), digest_size=20).digest(),
        settled=source.settled and (old is None or old.settled),
    )


def _target(link: SourceEntry, base: bytes, moved: set[bytes]) -> os.stat_result | None:
    """Return the status of what a link leads to if it is a file of the tree wherever that lies.

    None of those in ``moved``, whose content depends on the place.
    """
    if os.path.isabs(link.target):
        return None
    try:
        real = os.path.realpath(os.path.join(base, link.path), strict=True)
        status = os.stat(real)
    except OSError:
        return None
    top = os.path.realpath(base) + b"/"
    if not real.startswith(top) or real.removeprefix(top) in moved:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
