"""Repair: heals what can be healed from what is there, and says exactly what cannot.

Sources are the store itself, with its other copies of chunks, its packs that say what they hold and
its index that says where chunks lie, and this machine's cache. Nothing is guessed: what is stored
anew has the digest that it is looked for by.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

from envstore.errors import CorruptError
from envstore.store.cache import BlobCache
from envstore.store.checking import Reading, check_store, keep_list
from envstore.store.damage import PREFIX, damaged_packs
from envstore.store.digest import digest, parse_hex
from envstore.store.doomed import LISTS
from envstore.store.objects import open_objects
from envstore.store.objects.overlay import OverlayObjects
from envstore.store.problems import Problem, Report
from envstore.store.rebuild import rebuild_index
from envstore.store.repository import Repository
from envstore.store.resetting import reset_state
from envstore.store.salvage import salvage
from envstore.store.sessions import writing
from envstore.store.snapshots import parse_snapshot, snapshot_key
from envstore.wording import counted

_DISPENSABLE = ("profiles/", "packages/", PREFIX)
"""What costs time to be without, and nothing else."""

_HINTS = (
    ("refs/", "point it at the right snapshot again: envstore tag --force @DIGEST REF"),
    ("runs/", "remove it, or restore it from a copy of the store; other steps are not harmed"),
    ("drafts/", "remove it, and write that file again"),
    ("leases/", "remove it once nothing reads what it is about"),
    ("sessions/", "remove it once no writer is at work"),
    ("gc/", "envstore repair makes it anew"),
)
COUNTED = ("listing packs", "looking for copies", "checking again")
"""Steps whose progress is no bytes, also where data is read."""
_PUSH = "push what holds them again, to any ref of this store"


@dataclass(slots=True)
class Repaired:
    """What a repair did, in sentences, and what is still wrong: ``before`` and ``after``."""

    before: Report
    after: Report
    done: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is whole now."""
        return self.after.ok


def advice(problem: Problem) -> str:
    """Return what would heal what repair could not."""
    if problem.object == "index/":
        return "envstore rebuild-index"
    for prefix, hint in _HINTS:
        if problem.object.startswith(prefix):
            return hint
    if problem.lost:
        return _PUSH
    if problem.harms:
        return f"push {', '.join(problem.harms[:3])} again, or restore the object from a copy"
    return "restore the object from a copy of the store"


def repair(
    repository: Repository,
    *,
    dry_run: bool = False,
    reading: Reading | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Repaired:
    """Check the whole store, heal what can be healed, and check it again.

    ``repository`` may have a cache, from which frames are taken that the store has lost. With
    ``dry_run`` all is done as else, but what would be written goes to a temporary directory of
    this machine instead. Raises the errors of the store.
    """
    if not dry_run:
        # Without this no session could begin.
        reset = reset_state(repository.objects)
        with writing(repository, "repair") as (session, inside):
            result = _repair(inside, session.doomed_packs, reading, progress)
        if reset:
            result.done.insert(0, "reset gc/state, which could not be read: nothing is condemned")
        return result
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="envstore-repair-"))
        above = open_objects(f"file://{directory}/objects", create=True)
        stack.callback(above.close)
        overlay = OverlayObjects(repository.objects, above)
        inside = Repository(overlay, repository.config, repository.cache)
        return _repair(inside, frozenset(), reading, progress)


def _repair(
    repository: Repository,
    doomed: frozenset[bytes],
    reading: Reading | None,
    progress: Callable[[str, int, int], None],
) -> Repaired:
    objects, cache = repository.objects, repository.cache
    # What is cached says nothing about what is in the store.
    plain = Repository(objects, repository.config, None)
    before = check_store(plain, reading=reading, progress=lambda *step: progress("checking", *step))
    result = Repaired(before, before)
    keep_list(plain, before)
    _restore_snapshots(plain, cache, before, result.done)
    # One that was restored may lead to more that is wrong.
    found = check_store(plain) if result.done else before
    keep_list(plain, found)
    for problem in found.problems:
        if problem.object.startswith((*_DISPENSABLE, LISTS)):
            objects.delete(problem.object)
            result.done.append(f"removed {problem.object}, which can be made anew")
    keep_list(plain, found)
    damaged = damaged_packs(objects)
    rebuilt = rebuild_index(
        plain, damaged | doomed, progress=lambda *step: progress("listing packs", *step)
    )
    if rebuilt.removed or rebuilt.stored:
        result.done.append(
            f"listed {counted(rebuilt.packs, 'pack')} anew; removed "
            f"{counted(len(rebuilt.removed), 'object')} of the index and stored "
            f"{len(rebuilt.stored):,}"
        )
    progress("looking for copies", 0, 0)
    saved = salvage(plain, cache, damaged, found.false_locations, doomed)
    if saved.locations:
        result.done.append(f"made the locations of {counted(saved.locations, 'manifest')} anew")
    if saved.manifests or saved.chunks:
        result.done.append(
            f"led {counted(saved.manifests, 'manifest')} to good copies, and stored "
            f"{counted(saved.chunks, 'chunk')} again ({saved.stored_bytes:,} bytes compressed)"
        )
    result.after = check_store(plain, progress=lambda *step: progress("checking again", *step))
    keep_list(plain, result.after)
    return result


def _restore_snapshots(
    repository: Repository, cache: BlobCache | None, report: Report, done: list[str]
) -> None:
    """Store snapshots again that this machine's cache has."""
    for problem in report.problems:
        kind, _, text = problem.object.partition(" ")
        name = parse_hex(text) if kind == "snapshot" else None
        data = cache.read(name) if name is not None and cache is not None else None
        if name is None or data is None or digest(data) != name:
            continue
        with contextlib.suppress(CorruptError):
            parse_snapshot(data, name)
            repository.objects.put(snapshot_key(name), data)
            done.append(f"stored snapshot {text} again, from the cache")
