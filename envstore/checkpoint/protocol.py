"""The commit protocol of checkpoints: on an object store, without leader, barrier or collectives.

Each rank stores its part, an immutable object, once all that it leads to is stored; then it looks
whether all parts are there, and whoever sees all of them creates the COMMIT. Its bytes follow from
the parts, so that several may do so at once. A rank that dies means no COMMIT, never half of one;
if it dies between its part and the COMMIT, anyone may *roll forward*. What counts is decided by
the epochs (``epochs``), and what is deleted by ``retention``.

A checkpoint is removed in this order: parts, COMMIT, refs. When the COMMIT is gone no one can roll
it forward again, and as long as it is there the checkpoint is whole: its own snapshot leads to all
of its tree.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from envstore.checkpoint.beginning import Beginning, Choose
from envstore.checkpoint.bodies import check_id
from envstore.checkpoint.epochs import Epoch, Epochs, Line
from envstore.checkpoint.errors import FencedError, NoCheckpointError, RanksDisagreeError
from envstore.checkpoint.holds import Holds, Lease
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.merging import merge
from envstore.checkpoint.naming import Names, step_tag
from envstore.checkpoint.records import Commit, Part, commit_of
from envstore.checkpoint.shelf import PartNames, Shelf, is_complete
from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
)
from envstore.store.guarded import GuardedStore
from envstore.store.repository import PARALLEL, Repository
from envstore.store.sessions import writing


class RunStore:
    """The checkpoints of one run in a store.

    Safe to share between threads, and every method to be called by any number of processes on any
    number of nodes at once. Epochs, parts and commits never change and are read once by each
    ``RunStore``. ``warnings`` collects what was passed over. All methods raise the errors of the
    store: after ``UnavailableError`` each may be called again.
    """

    def __init__(self, repository: Repository, run: RunName) -> None:
        self.repository = repository
        self.run = run
        self.warnings: list[str] = []
        self._objects = repository.objects
        self._shelf = Shelf(self._objects, run)
        self._epochs = Epochs(self._objects, run)
        self._names = Names(repository, run, self.commits)
        self._holds = Holds(self._objects, run)
        self._known: dict[CheckpointId, Commit] = {}

    @contextmanager
    def writing(self, what: str) -> Iterator[RunStore]:
        """Yield this run in a writer's session, within which its commits and refs are safe.

        What they lead to is what was read in it. Within a session that one goes on.
        """
        with writing(self.repository, f"{what} of {self.run}") as (_, inside):
            yield self if inside is self.repository else self.within(inside)

    def within(self, repository: Repository) -> RunStore:
        """Return this run, with what is known of it, in the session that ``repository`` is of."""
        found = copy.copy(self)
        found.repository, found._objects = repository, repository.objects
        found._shelf = Shelf(repository.objects, self.run)
        found._names = Names(repository, self.run, found.commits)
        found._holds = Holds(repository.objects, self.run)
        return found

    # Epochs.

    def open_epoch(
        self,
        incarnation: str,
        world_size: int,
        choose: Choose,
        *,
        staged: CheckpointId | None = None,
    ) -> Epoch:
        """Join the epoch of ``incarnation``, or begin it.

        The newest epoch is joined if it has this incarnation and nothing was committed in it yet:
        its ranks begin together, and commit nothing before all have begun. Otherwise a new one
        begins, and what older ones save no longer counts. ``choose`` is given the commits that
        count, ascending, and says which of all commits to resume from (``None``: begin anew); it
        may be called several times, on several ranks. One choice is kept: ``Epoch.resumed_from``.
        It may be ``staged`` too, which lies in memory and is yet to be committed; it counts then.

        Eight listings, two writes, and what it commits itself. Raises ``RanksDisagreeError`` if
        the epoch to join has another world size, ``FencedError`` if another incarnation begins at
        the same time and a little later, and what ``choose`` raises; if that does so at once,
        nothing has changed.
        """
        beginning = Beginning(self.run, self._epochs, self._shelf, incarnation, world_size)
        return beginning.open(self._roll_forward, self.commits, choose, staged)

    def epoch(self) -> Epoch | None:
        """Return the newest epoch that has started. One listing and a request."""
        return self._epochs.look().newest

    def counting(self, checkpoints: Collection[CheckpointId]) -> list[CheckpointId]:
        """Return those that count, or will once they are committed. As ``epoch``, if any is given.

        None does before the first epoch has started.
        """
        line = self._line() if checkpoints else None
        if line is None or not line.newest:
            return []
        return [one for one in checkpoints if one.epoch <= line.newest and line.holds(one)]

    # Saving.

    def put_part(self, part: Part) -> Part:
        """Store the part of one rank; returns it as it is stored.

        All that ``part.snapshot`` leads to must be stored already, in the session of this. A rank
        that stores the same content again gets what it stored first. One request, three for a
        session. Raises ``RanksDisagreeError`` if another process stored something else as this
        rank.
        """
        check_id(part.checkpoint)
        if not isinstance(self._objects, GuardedStore):
            with self.writing(f"part of step {part.checkpoint.step}") as inside:
                return inside.put_part(part)
        found = self._shelf.put_part(part)
        if found.plan != part.plan or not self._same_tree(found.snapshot, part.snapshot):
            raise RanksDisagreeError(
                f"two processes have saved different states as rank {part.rank} of step "
                f"{part.checkpoint.step} of {self.run}",
                hint="give each process its own rank, and each job its own run",
            )
        return found

    def _same_tree(self, one: bytes, other: bytes) -> bool:
        if one == other:
            return True
        return self.repository.snapshot(one).manifest == self.repository.snapshot(other).manifest

    def try_commit(self, checkpoint: CheckpointId) -> Commit | None:
        """Commit ``checkpoint`` if all its parts are stored, else return ``None``.

        What is returned counts, and goes on to count whatever epoch begins later, unless that is
        told to resume from something else. Moves the refs too; what keeps them from being moved
        is a warning, and the next commit moves them.

        Seven listings, six other requests, and for several ranks those of merging. Raises
        ``FencedError`` if a newer epoch has begun without it, ``RanksDisagreeError`` if the parts
        do not fit together.
        """
        check_id(checkpoint)
        self._require_on_line(checkpoint, self._line())
        commit = self._commit(checkpoint)
        if commit is None:
            return None
        # An epoch may be about to resume from what was there before: it has to look again.
        standing = self._epochs.look()
        newer = [number for number in standing.pending if number > checkpoint.epoch]
        started = [self._epochs.make_void(number) for number in newer]
        if any(started):
            standing = self._epochs.look()
        self._require_on_line(checkpoint, standing.line)
        self._follow([checkpoint.step])
        return commit

    def _require_on_line(self, checkpoint: CheckpointId, line: Line) -> None:
        if not line.holds(checkpoint):
            raise FencedError(
                f"step {checkpoint.step} of epoch {checkpoint.epoch} of {self.run} does not "
                f"count: epoch {line.newest} has begun without it",
                hint="this process belongs to a job that was replaced: stop it",
            )

    def roll_forward(self) -> list[Commit]:
        """Commit whatever has all its parts and counts; returns what was committed.

        What a rank that died between its last part and the COMMIT, or its refs, left undone. Three
        listings, and for each checkpoint as ``try_commit``.
        """
        found = self._roll_forward()
        self._follow([commit.step for commit in found])
        return found

    def _roll_forward(self) -> list[Commit]:
        found = []
        # Parts first: what is removed loses its parts before its COMMIT.
        complete = [id for id, names in self._shelf.all_parts().items() if is_complete(names)]
        committed = self._shelf.commits()
        pending = sorted(id for id in complete if id not in committed)
        line = self._line() if pending else None
        for checkpoint in pending:
            if line is None or not line.holds(checkpoint):
                continue
            try:
                commit = self._commit(checkpoint)
            except (RanksDisagreeError, CorruptError, NotFoundError) as error:
                # One that can never be committed must not keep the others from it.
                self._warn(f"step {checkpoint.step} of {self.run}: {error.message}")
                continue
            if commit is not None:
                found.append(commit)
        return found

    def _commit(self, checkpoint: CheckpointId) -> Commit | None:
        names = self._shelf.parts(checkpoint)
        complete = is_complete(names)
        if not complete or len(names) > 1:
            # Often another rank was faster, and merging costs something. Or it is being removed.
            found = self._load_commit(checkpoint)
            if found is not None:
                return found
        if not complete:
            _check_sizes(checkpoint, names)
            return None
        if not isinstance(self._objects, GuardedStore):
            # Parts that are seen in the session cannot be collected before they are committed.
            with self.writing(f"commit of step {checkpoint.step}") as inside:
                return inside._commit(checkpoint)
        parts = self._shelf.read_parts(checkpoint, sorted(names))
        if len({part.plan for part in parts}) > 1:
            raise RanksDisagreeError(
                f"the ranks of step {checkpoint.step} of {self.run} have saved states that do not "
                "belong together",
                hint="all ranks must run the same program with the same options",
            )
        commit = commit_of(checkpoint, merge(self.repository, self.run, checkpoint, parts), parts)
        found, mine = self._shelf.create_commit(commit)
        if found.parts != commit.parts:
            raise RanksDisagreeError(
                f"step {checkpoint.step} of {self.run} was committed with other parts",
                hint="give each job its own run",
            )
        if mine and not is_complete(self._shelf.parts(checkpoint)):
            # It was committed and removed in the meantime: do not let it rise again.
            self._shelf.drop_commit(checkpoint)
            return None
        self._known[checkpoint] = found
        return found

    def _follow(self, steps: Iterable[int]) -> None:
        try:
            for warning in self._names.follow(steps):
                self._warn(warning)
        except (UnavailableError, AccessDeniedError, ConflictError, CorruptError) as error:
            # The checkpoint is committed, whatever its name points at.
            self._warn(f"refs of {self.run} are not moved: {error.message}")

    # What is there.

    def commits(self, *, fenced: bool = False) -> list[Commit]:
        """Return the commits that count, ascending by step, epoch and attempt.

        With ``fenced`` those that no longer count, instead. Two listings, and a request for each
        commit, and each epoch on the line, that is not known yet. A damaged COMMIT is left out
        with a warning.
        """
        ids = self._shelf.commits()
        line = self._epochs.look().line
        return self._read_commits(id for id in ids if line.holds(id) is not fenced)

    def survey(self) -> tuple[list[Commit], list[Commit], Epoch | None]:
        """Return the commits that count, those that do not, and the newest epoch.

        Costs what ``commits`` does.
        """
        ids = self._shelf.commits()
        standing = self._epochs.look()
        commits = self._read_commits(ids)
        counting = [commit for commit in commits if standing.line.holds(commit.checkpoint)]
        fenced = [commit for commit in commits if commit not in counting]
        return counting, fenced, standing.newest

    def _read_commits(self, ids: Iterable[CheckpointId]) -> list[Commit]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = pool.map(self._read_commit, sorted(ids))
            return [commit for commit in found if commit is not None]

    def _read_commit(self, checkpoint: CheckpointId) -> Commit | None:
        known = self._known.get(checkpoint)
        if known is not None:
            return known
        try:
            return self._load_commit(checkpoint)
        except CorruptError as error:
            self._warn(f"passed over: {error.message}")
            return None

    def _load_commit(self, checkpoint: CheckpointId) -> Commit | None:
        found = self._shelf.read_commit(checkpoint)
        if found is not None:
            self._known[checkpoint] = found
        return found

    def missed_by(self, checkpoint: CheckpointId) -> set[int]:
        """Return the ranks that stored no part of ``checkpoint``, but one of a later checkpoint.

        Ranks store their parts in order, as long as they live: what such a rank did not store will
        hardly come. One listing.
        """
        found = self._shelf.all_parts()
        mine = {rank for rank, _ in found.get(checkpoint, ())}
        return {
            rank
            for other, names in found.items()
            if other.epoch == checkpoint.epoch and other > checkpoint
            for rank, _ in names
        } - mine

    def latest(self) -> Commit | None:
        """Return the commit to resume from, ``None`` if there is none. As ``commits``."""
        return next(reversed(self.commits()), None)

    def find(self, step: int) -> Commit:
        """Return the commit of ``step`` that counts, the last of several.

        As ``commits``. Raises ``NoCheckpointError``.
        """
        commits = self.commits()
        for commit in reversed(commits):
            if commit.step == step:
                return commit
        hint = f"the nearest are {_nearest(commits, step)}" if commits else "it has none"
        raise NoCheckpointError(f"{self.run} has no checkpoint of step {step}", hint=hint)

    # Keeping and removing.

    def pin(self, commit: Commit, reason: str = "") -> None:
        """Keep ``commit`` whatever the retention policy says. Raises ``NoCheckpointError``."""
        self._holds.pin(commit.checkpoint, reason)
        # A removal takes the parts first and then looks for pins once more.
        whole = is_complete(self._shelf.parts(commit.checkpoint))
        if not whole or not self._shelf.has_commit(commit.checkpoint):
            self._holds.unpin(commit.checkpoint)
            raise NoCheckpointError(
                f"step {commit.step} of {self.run} is being removed", hint="pin another one"
            )

    def unpin(self, checkpoint: CheckpointId) -> None:
        """Let the retention policy decide again; not an error if there is no pin."""
        self._holds.unpin(checkpoint)

    def pins(self) -> dict[CheckpointId, str]:
        """Return what is pinned, and why. One listing and a request for each."""
        return self._holds.pins()

    def lease(self, commit: Commit) -> Lease:
        """Keep ``commit`` for as long as the returned context lasts: it is being read.

        The context raises ``NoCheckpointError`` when entered if it is gone already.
        """
        return Lease(self._holds, commit, lambda: self._shelf.has_commit(commit.checkpoint))

    def leases(self, now: float | None = None) -> set[CheckpointId]:
        """Return what somebody is reading at the Unix time ``now``. One listing, one request each.

        Leases that ran out are removed.
        """
        return self._holds.leases(now)

    def remove(self, commit: Commit) -> bool:
        """Remove ``commit``, first what leads to it; returns whether it was done.

        Not if it is pinned or leased. Its tree stays in the store until that is collected. Two
        requests for each part and a few more. Doing it again ends one that was interrupted.
        """
        checkpoint = commit.checkpoint
        if self._is_held(checkpoint):
            return False
        self._shelf.drop_parts(checkpoint, self._shelf.parts(checkpoint))
        if self._is_held(checkpoint):
            return False
        self._shelf.drop_commit(checkpoint)
        self._known.pop(checkpoint, None)
        self._settle([step_tag(commit.step), "latest"])
        return True

    def sweep(self) -> None:
        """Remove what nothing needs any more: a few listings, a request or two for each thing.

        That is the parts of older epochs that were never committed, refs of steps that are gone,
        and older epochs that nothing was committed in or resumed through.
        """
        standing = self._epochs.look()
        line = standing.line
        listed = self._shelf.all_parts()
        committed = self._shelf.commits()
        for checkpoint, names in listed.items():
            if checkpoint.epoch >= line.newest or checkpoint in committed:
                continue
            # What counts and is complete is waiting to be rolled forward, and of the epoch that
            # the newest resumed from something may still be on its way.
            waiting = is_complete(names) or checkpoint.epoch == max(line.limits, default=0)
            if not (line.holds(checkpoint) and waiting):
                self._shelf.drop_parts(checkpoint, names)
        used = {checkpoint.epoch for checkpoint in committed} | set(line.limits)
        for number in sorted(standing.numbers - used):
            if number < line.newest:
                self._epochs.forget(number)
        counting = {id.step for id in committed if line.holds(id)}
        self._settle(self._names.stray(counting))

    def _is_held(self, checkpoint: CheckpointId) -> bool:
        return self._holds.is_pinned(checkpoint) or checkpoint in self.leases()

    def _settle(self, tags: Iterable[str]) -> None:
        for warning in self._names.settle(tags):
            self._warn(warning)

    def _line(self) -> Line:
        return self._epochs.look().line

    def _warn(self, line: str) -> None:
        if line not in self.warnings:
            self.warnings.append(line)


def _check_sizes(checkpoint: CheckpointId, names: PartNames) -> None:
    sizes = sorted({world_size for _, world_size in names})
    if len(sizes) > 1:
        raise RanksDisagreeError(
            f"the ranks of step {checkpoint.step} do not agree how many they are: "
            + ", ".join(map(str, sizes)),
            hint="start all ranks alike",
        )


def _nearest(commits: Sequence[Commit], step: int) -> str:
    steps = sorted({commit.step for commit in commits}, key=lambda found: abs(found - step))
    return ", ".join(map(str, sorted(steps[:3])))
