"""Checks a whole store, beside writers and collectors, and keeps its list of damaged packs.

What ``verify`` reads may be rewritten or collected while it reads. So what it finds is looked at
once more from the refs on, and only what is still wrong then is damage. Of snapshots that nothing
keeps alive a part may have been collected already: that is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from envstore.errors import AccessDeniedError, CorruptError, NotFoundError
from envstore.store.catalog import all_targets, read_refs
from envstore.store.damage import Damage, damaged_packs, forget_damage, note_damage
from envstore.store.packs import pack_key
from envstore.store.problems import Problem, Report
from envstore.store.repository import Repository
from envstore.store.roots import reachable, read_roots
from envstore.store.sampling import Sample
from envstore.store.smallobjects import SmallObjects
from envstore.store.verify import verify

_LOOKS = 4


@dataclass(frozen=True, slots=True)
class Reading:
    """How much of the data is read: see ``verify`` for what each means."""

    read_data: bool = False
    sample: Sample | None = None
    journal: Path | None = None
    resume: bool = False
    rate: float | None = None


def check_store(
    repository: Repository,
    names: Sequence[str] = (),
    reading: Reading | None = None,
    *,
    remember: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check what ``names`` (REFs) stand for, or the whole store, and return what is wrong with it.

    Refs are compared with what the repository's witness saw of them, which is to ``remember`` what
    they are now. Nothing is written to the store. Raises ``NotFoundError`` and ``UsageError`` for
    the names, and the errors of the store when it cannot be read.
    """
    reading = reading or Reading()
    report = _look(repository, names, reading, (), progress, remember=remember)
    garbage: set[bytes] = set()
    for _ in range(_LOOKS):
        if report.ok:
            break
        if not names:
            garbage |= _half_collected(repository, report)
        # What was damaged is read again, whatever else was to be read is not.
        rest = Reading(rate=reading.rate)
        also = tuple(report.damaged)
        again = _look(repository, names, rest, also, lambda *_: None, garbage, remember=remember)
        steady = _objects(again) == _objects(report)
        report.problems = again.problems
        report.damaged, report.quarantined = again.damaged, again.quarantined
        report.false_locations = again.false_locations
        report.sound -= set(again.damaged)
        if steady:
            break
    return report


def _half_collected(repository: Repository, report: Report) -> set[bytes]:
    """Return the harmed snapshots that no root keeps, and of which something is gone already.

    A writer that died between its snapshot and its ref leaves one: it is collected only after the
    packs, if these were listed by an earlier collection.
    """
    objects = repository.objects
    harmed = {harm for problem in report.problems for harm in problem.harms if harm[:1] == "@"}
    if not harmed:
        return set()
    found: set[bytes] = set()
    try:
        rooted = {root.snapshot for root in read_roots(objects)}
    except CorruptError:
        return set()  # then nobody knows what is garbage
    for harm in harmed:
        try:
            snapshot = repository.resolve(harm)
        except NotFoundError:
            continue  # collected as a whole, as the next look will find
        if snapshot in rooted:
            continue
        keys, error = reachable(objects, snapshot)
        if isinstance(error, NotFoundError) or any(objects.size(key) is None for key in keys):
            found.add(snapshot)
    return found


def _objects(report: Report) -> set[tuple[str, str]]:
    return {(problem.object, problem.reason) for problem in report.problems}


def _look(
    repository: Repository,
    names: Sequence[str],
    reading: Reading,
    also: Sequence[bytes],
    progress: Callable[[int, int], None],
    garbage: Collection[bytes] = (),
    *,
    remember: bool,
) -> Report:
    broken: list[Problem] = []
    warnings: list[str] = []
    witness = repository.witness
    if names:
        targets = [(name, repository.resolve(name)) for name in names]
    else:
        refs, broken = read_refs(repository)
        targets = [one for one in all_targets(repository, refs) if one[1] not in garbage]
        if witness is not None:
            judged = witness.judge(refs, [one.object for one in broken], remember=remember)
            broken += judged.problems
            warnings += judged.warnings
        small = SmallObjects(repository.objects, targets)
        broken += small.check()
        targets += small.further
    report = verify(
        repository,
        targets,
        read_data=reading.read_data,
        whole=not names,
        also=also,
        sample=reading.sample,
        journal=reading.journal,
        resume=reading.resume,
        rate=reading.rate,
        progress=progress,
    )
    report.problems[:0] = broken
    report.warnings += warnings
    return report


def keep_list(repository: Repository, report: Report) -> tuple[int, int]:
    """Bring the list of damaged packs up to date with a report; returns how many went on and off.

    Off go the packs that were read and found whole, and those that are gone and that nothing leads
    to. Raises ``AccessDeniedError`` for whoever may only read.
    """
    objects = repository.objects
    known = damaged_packs(objects)
    added = removed = 0
    now = int(objects.now()) if report.damaged else 0
    for pack, reason in sorted(report.damaged.items()):
        if pack in known:
            continue
        text = reason.encode("utf-8", "backslashreplace").decode()
        added += note_damage(objects, Damage(pack, text, now))
    for pack in known:
        gone = pack in report.unneeded and objects.size(pack_key(pack)) is None
        if pack in report.sound or gone:
            forget_damage(objects, pack)
            removed += 1
    return added, removed


def try_to_keep_list(repository: Repository, report: Report) -> tuple[int, int]:
    """``keep_list`` for whoever may not be allowed to: then a warning is added to the report."""
    try:
        return keep_list(repository, report)
    except AccessDeniedError as error:
        report.warnings.append(f"the list of damaged packs is left as it is: {error.message}")
        return 0, 0
