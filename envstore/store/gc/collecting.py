"""Garbage collection: one run, from the lease of the collector to its report.

A round meets the writers, lists the store, marks what is live, and then sweeps what an earlier
round has condemned, moves the live parts of packs that are mostly dead, lets trees share what is
stored more than once, and condemns what it found dead. So an object is deleted a round after it
was condemned at the earliest, after a fresh mark, when ``grace`` is over and no writer is at work
that began before. A run is one round, unless ``grace`` is 0: then rounds follow until there is
nothing to gain.

For what it costs see ``marking``, ``usage`` and ``sharing``; the index is read once more where
packs go.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from envstore.errors import NoSpaceError
from envstore.store.damage import damaged_packs, forget_damage
from envstore.store.digest import parse_hex
from envstore.store.doomed import (
    DELETION_SECONDS,
    LISTS,
    Condemned,
    Doomed,
    list_key,
    read_doomed,
)
from envstore.store.gc.carrying import carry_profiles, remove_old_leases
from envstore.store.gc.fencing import Writers, meet_writers
from envstore.store.gc.marking import DRAFTS, LEASES, WRITERS, Marks, Progress, mark
from envstore.store.gc.moving import Moved, move, resume
from envstore.store.gc.owner import Change, Ownership
from envstore.store.gc.report import Busy, Collected, Writer
from envstore.store.gc.retiring import retire
from envstore.store.gc.sharing import share
from envstore.store.gc.survey import Survey, survey
from envstore.store.gc.sweeping import Swept, finish, sweep
from envstore.store.gc.usage import measure_packs
from envstore.store.objects.base import ObjectStore
from envstore.store.packs import pack_key
from envstore.store.repository import Repository
from envstore.store.roots import read_roots
from envstore.store.session_records import kept_keys

MAX_CONDEMNED = 1_000_000
"""Keys on the condemned list; what is dead besides waits for a later run."""
_ROUNDS = 50
_SHARING = 3
"""Rounds of a run that go on because trees have come to share something."""
_WHY = {DRAFTS: "drafts", LEASES: "leases", WRITERS: "sessions"}


def _silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


def collect(
    repository: Repository,
    *,
    grace: float,
    dry_run: bool = False,
    max_unused: float = 0.05,
    progress: Progress = _silent,
) -> Collected:
    """Free what nothing needs and was found dead ``grace`` seconds ago or more.

    Packs are repacked until what is dead within live ones is at most ``max_unused`` of the live
    bytes. With ``dry_run`` nothing is written. May run beside anything; if another collector is at
    work nothing is done, and ``busy`` of the result says who. Interrupted at any moment it leaves
    nothing broken. About what it costs see the modules here.

    Raises ``BrokenRootError`` if something live cannot be followed, before anything is condemned;
    ``LostOwnershipError``; ``NoSpaceError`` of the temporary directory; the errors of the store.
    """
    began = time.monotonic()
    # What is cached here says nothing about what is in the store.
    repository = Repository(repository.objects, repository.config, None)
    result = Collected(dry_run=dry_run)
    if dry_run:
        _Round(repository, None, grace, max_unused, result, progress).run()
    else:
        owner = Ownership.take(repository.objects)
        if not isinstance(owner, Ownership):
            result.busy = Busy(owner.host, owner.until)
            return result
        with owner:
            _run(repository, owner, grace, max_unused, result, progress)
    result.seconds = time.monotonic() - began
    return result


def _run(
    repository: Repository,
    owner: Ownership,
    grace: float,
    max_unused: float,
    result: Collected,
    progress: Progress,
) -> None:
    swept = finish(owner, repository.objects)
    with contextlib.suppress(NoSpaceError):  # whatever was not led elsewhere stays where it is
        resume(repository, progress)
    for at in range(_ROUNDS):
        this = _Round(repository, owner, grace, max_unused, result, progress, swept)
        this.run()
        again = this.repacked or (this.shared and at < _SHARING)
        if grace > 0 or not (this.condemned or again) or (at and not again):
            break
        swept = Swept(undeletable=swept.undeletable)
    _tidy(repository.objects, owner, swept.deleted)
    remove_old_leases(repository.objects)


def _tidy(objects: ObjectStore, owner: Ownership, deleted: AbstractSet[str]) -> None:
    """Take what is deleted off the list of the condemned, and remove the lists of before.

    What was listed and is not named by a state that was put since never will be: whoever wrote it
    has lost, and no two lists have one name.
    """
    lists = [info.key for info in objects.list(LISTS)]
    state = owner.change(lambda found: _without(found, deleted)).state
    named = [list_key(name) for name in (state.condemned, state.deleting) if name is not None]
    for key in lists:
        if key not in named:
            objects.delete(key)


def _without(found: Doomed, keys: AbstractSet[str]) -> Change:
    left = [row for row in found.condemned if row.key not in keys]
    return Change(found.state.epoch, left, found.deleting)


@dataclass(slots=True)
class _Round:
    """One round; ``owner`` is ``None`` in a dry run. See the module."""

    repository: Repository
    owner: Ownership | None
    grace: float
    max_unused: float
    result: Collected
    progress: Progress
    swept: Swept = field(default_factory=Swept)
    condemned: int = 0
    repacked: int = 0
    shared: int = 0
    written: int = 0

    def run(self) -> None:
        """Do it all, and tell ``result`` how things stand afterwards."""
        objects = self.repository.objects
        # In this order: whoever has ended since is seen by its ref, whoever began since knows
        # all that is condemned, and what is stored since is not looked at.
        before = read_doomed(objects)
        writers = meet_writers(objects, change=self.owner is not None)
        self.progress("listing", 0, 0)
        found = survey(objects.list(""))
        roots = read_roots(objects, writers.all)
        kept = kept_keys(writers.all, objects.now())
        marks = mark(self.repository, found, roots, kept, progress=self.progress)
        usage = measure_packs(objects, found, marks, self.progress)
        needed = usage.needed
        if self.owner is None:
            self.swept.deleted |= self._would_go(before, writers, found, marks)
        else:
            carry_profiles(self.repository, found, marks)
            due = self._due(before, writers, found, marks)
            self._sweep(self.owner, found, due, usage.lost)
        for key in self.swept.deleted:
            self._freed(found, key)
        if self.owner is not None:
            self.result.no_space = ""
            try:
                self._save(found, marks, needed)
            except NoSpaceError as error:
                # What is dead as a whole is condemned, and goes, all the same: that makes room.
                self.result.no_space = error.message
        after = self._condemn(before, found, marks)
        self._tell(found, marks, needed, after, writers)

    def _due(
        self, before: Doomed, writers: Writers, found: Survey, marks: Marks
    ) -> list[Condemned]:
        now = self.repository.objects.now()
        return [
            row
            for row in before.condemned
            if found.holds(row.key)
            and not marks.is_live(row.key)
            and writers.allow(row.epoch)
            and now - row.time >= self.grace
        ]

    def _would_go(self, before: Doomed, writers: Writers, found: Survey, marks: Marks) -> set[str]:
        """Return what a run would delete."""
        due = {row.key for row in self._due(before, writers, found, marks)}
        if self.grace <= 0 and not writers.open:
            due.update(_dead(found, marks))
        return due

    def _sweep(
        self,
        owner: Ownership,
        found: Survey,
        due: Sequence[Condemned],
        lost: AbstractSet[bytes],
    ) -> None:
        objects = self.repository.objects
        small = [row for row in due if not row.key.startswith("packs/")]
        sweep(owner, objects, small, self.swept, self.progress)
        rows = [row for row in due if row.key.startswith("packs/")]
        packs = {parse_hex(row.key[-64:]) or b"" for row in rows}
        retired = retire(objects, found, packs | lost, self.progress)
        self.result.written_bytes += retired.written
        for key in retired.keys:
            objects.delete_within(key, DELETION_SECONDS, owner.check)
            self.swept.deleted.add(key)
        sweep(owner, objects, rows, self.swept, self.progress)
        for pack in damaged_packs(objects) & packs if packs else ():
            if pack_key(pack) in self.swept.deleted:
                forget_damage(objects, pack)

    def _save(self, found: Survey, marks: Marks, needed: Sequence[int]) -> None:
        """Store what is live in another way, if that takes less."""
        moved = move(self.repository, found, marks, needed, self.max_unused, self.progress)
        self._moved(moved, marks)
        self.shared = share(self.repository, found, marks, self.progress, avoid=moved.packs)

    def _moved(self, moved: Moved, marks: Marks) -> None:
        """Take the packs that were moved for dead, as the next mark will find them."""
        for number in moved.packs:
            marks.why[number] = 0
        self.repacked = len(moved.packs)
        self.written = moved.written
        self.result.repacked_packs += len(moved.packs)
        self.result.written_bytes += moved.written
        self.result.damaged += moved.damaged

    def _freed(self, found: Survey, key: str) -> None:
        self.result.freed_objects += 1
        self.result.freed_packs += key.startswith("packs/")
        self.result.freed_bytes += found.size(key)

    def _condemn(self, before: Doomed, found: Survey, marks: Marks) -> Doomed:
        """Put what is dead on the list, and take what is not, or is gone, off it."""
        gone = self.swept.deleted
        dead = _dead(found, marks)
        now = self.repository.objects.now()

        def change(state: Doomed) -> Change:
            left = {
                row.key: row
                for row in state.condemned
                if row.key not in gone and found.holds(row.key) and not marks.is_live(row.key)
            }
            new = [key for key in dead if key not in left and key not in gone]
            new = new[: max(0, MAX_CONDEMNED - len(left))]
            epoch = state.state.epoch + bool(new)
            rows = [*left.values(), *(Condemned(key, epoch, now) for key in new)]
            self.condemned = len(new)
            return Change(epoch, sorted(rows), state.deleting)

        if self.owner is not None:
            return self.owner.change(change)
        planned = change(before)
        state = before.state
        return Doomed(state, before.version, planned.condemned, planned.deleting)

    def _tell(
        self,
        found: Survey,
        marks: Marks,
        needed: Sequence[int],
        after: Doomed,
        writers: Writers,
    ) -> None:
        result, now = self.result, self.repository.objects.now()
        packs = found.packs
        gone = sum(found.size(key) for key in self.swept.deleted)
        kept: dict[str, int] = {}

        def keep(reason: str, size: int) -> None:
            if size:
                kept[reason] = kept.get(reason, 0) + size

        listed = {row.key for row in after.condemned} | self.swept.deleted
        for row in after.condemned:
            if row.key in self.swept.undeletable:
                keep("undeletable", found.size(row.key))
            elif now - row.time < self.grace:
                keep("grace", found.size(row.key))
            elif not writers.allow(row.epoch):
                keep("writers", found.size(row.key))
            else:
                keep("next", found.size(row.key))
        live = 0
        for number in range(1, len(packs) + 1):
            why, size = marks.why[number], packs.sizes[number]
            if why:
                live += 1
                # One that was cut holds less than is needed of it.
                unused = max(0, size - needed[number])
                keep("anchors" if marks.anchors[number] else "parts", unused)
                if why in _WHY:
                    keep(_WHY[why], needed[number])
            elif pack_key(packs.names[number]) not in listed:
                keep("next", size)
        result.epoch = after.state.epoch
        result.snapshots, result.packs = len(marks.snapshots), live
        result.condemned_objects = len(after.condemned)
        result.condemned_bytes = sum(found.size(row.key) for row in after.condemned)
        result.undeletable_objects = len(self.swept.undeletable)
        result.store_bytes = found.bytes - gone + self.written
        result.kept = kept
        result.live_bytes = max(0, result.store_bytes - result.kept_bytes)
        result.writers = [
            Writer(s.key, s.record.what, s.record.host, s.record.epoch, now - s.record.beat)
            for s in writers.open
        ]


def _dead(found: Survey, marks: Marks) -> list[str]:
    """Return the keys of all that was listed and is neither live nor a cache."""
    packs = found.packs
    dead = [key for key in found.small if not marks.is_live(key)]
    numbers = (number for number in range(1, len(packs) + 1) if not marks.why[number])
    return dead + [pack_key(packs.names[number]) for number in numbers]
