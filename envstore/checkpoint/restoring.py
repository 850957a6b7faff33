"""Finds the checkpoint to restore, in memory, in the node cache or in the store; applies it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from envstore.checkpoint.apply import apply
from envstore.checkpoint.errors import CheckpointError, NoCheckpointError, RanksDisagreeError
from envstore.checkpoint.identity import Ranks
from envstore.checkpoint.layout import CheckpointId, Tree
from envstore.checkpoint.opening import Opening
from envstore.checkpoint.places import RunPlace
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.checkpoint.resuming import Incarnation, close_all, staged_here
from envstore.checkpoint.slotformat import STAGED
from envstore.checkpoint.slots import SlotDirectory, SlotTree, StagedSlot
from envstore.checkpoint.stored import damaged
from envstore.checkpoint.trees import SnapshotTree
from envstore.errors import AccessDeniedError, CorruptError

_log = logging.getLogger("envstore.checkpoint")

_POLL = 0.2
PATIENCE = 600.0
"""Seconds to wait for a checkpoint that another node has in memory and is uploading."""

Slots = dict[CheckpointId, list[StagedSlot]]


class Restorer:
    """Restores states of one run. Of use to one thread."""

    def __init__(
        self,
        place: RunPlace,
        ranks: Ranks,
        opening: Opening,
        incarnation: Incarnation,
        directories: Path,
        start_persister: Callable[[], None],
    ) -> None:
        self._place = place
        self._ranks = ranks
        self._opening = opening
        self._incarnation = incarnation
        self._directories = directories
        self._start_persister = start_persister

    def restore(
        self,
        state: MutableMapping[str, Any],
        step: int | None,
        only: Collection[str] | None,
        *,
        strict: bool,
        trusted: bool,
    ) -> int | None:
        """See ``Run.restore``."""
        with self._choosing(step) as choice:
            if choice is None:
                return None
            runs, chosen, trees = choice
            for tree in trees:
                try:
                    apply(
                        state,
                        tree,
                        rank=self._ranks.rank,
                        world_size=self._ranks.world_size,
                        only=only,
                        strict=strict,
                        trusted=trusted,
                    )
                except CorruptError as error:
                    if isinstance(tree, SlotTree) and self._is_committed(runs, chosen):
                        _log.warning("step %d in memory is damaged: %s", chosen.step, error)
                        continue
                    raise damaged(runs, chosen, error) from error
                return chosen.step
            raise AssertionError("the last tree either applies or raises")

    @contextlib.contextmanager
    def opened(self, step: int | None) -> Iterator[tuple[CheckpointId, Tree] | None]:
        """See ``Run.opened``."""
        with self._choosing(step) as choice:
            if choice is None:
                yield None
            else:
                _, chosen, trees = choice
                yield chosen, next(trees)

    @contextlib.contextmanager
    def _choosing(
        self, step: int | None
    ) -> Iterator[tuple[RunStore, CheckpointId, Iterator[Tree]] | None]:
        """Agree on a checkpoint; yields it with where it can be read, the nearest first."""
        runs = self._opening.run_store()
        self._opening.stop_prefetch()
        if step is None:
            self._wait_for_waves(runs)
        slots = staged_here(self._directories, self._place.store, self._place.run)
        try:
            chosen = self._agree(runs, slots, step)
            if chosen is None:
                yield None
            else:
                with contextlib.closing(self._trees(runs, slots, chosen)) as trees:
                    yield runs, chosen, trees
        finally:
            for found in slots.values():
                close_all(found)

    def _agree(self, runs: RunStore, slots: Slots, step: int | None) -> CheckpointId | None:
        """Return what all ranks restore, and have the epoch resume from it."""
        staged = self._usable(runs, slots)

        def choose(commits: Sequence[Commit]) -> CheckpointId | None:
            known = [commit.checkpoint for commit in commits]
            found = sorted({*known, *([] if staged is None else [staged])})
            if step is None:
                return found[-1] if found else None
            wanted = [one for one in found if one.step == step]
            return wanted[-1] if wanted else runs.find(step).checkpoint

        if self._ranks.world_size == 1:
            # Nobody to agree with: who only reads, an evaluation, replaces no running job. The
            # epoch begins with the first step.
            chosen = choose(runs.commits())
            self._incarnation.resume(lambda _: chosen, chosen)
            return chosen
        self._incarnation.resume(choose, staged)
        chosen = self._incarnation.begin().resumed_from
        if step is not None and (chosen is None or chosen.step != step):
            other = "nothing" if chosen is None else f"step {chosen.step}"
            raise RanksDisagreeError(
                f"{self._place.run}: this rank is to restore step {step}, another one {other}",
                hint="all ranks restore the same step",
            )
        return chosen

    def _usable(self, runs: RunStore, slots: Slots) -> CheckpointId | None:
        """Return the newest checkpoint in memory that counts, whether it is committed or not."""
        # The newest epoch may have resumed from one that its predecessor left in memory.
        return max(runs.counting(slots), default=None)

    def _wait_for_waves(self, runs: RunStore) -> None:
        """Wait until what a trainer that is gone has staged here in waves is committed.

        It cannot be read from memory, and would count no more once the job goes on from an older
        one. Raises ``CheckpointError`` if that takes too long.
        """
        directory = SlotDirectory(self._directories / f"{self._ranks.rank:05d}")
        if directory.trainer_alive():
            return
        deadline = time.monotonic() + PATIENCE
        told = False
        while (found := self._in_waves(runs, directory)) is not None:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"step {found.step} of {self._place.run} is staged on this node and not "
                    f"uploaded after {PATIENCE:.0f} s",
                    hint="wait, or restore(state, step=...) an older one",
                )
            if not told:
                told = True
                _log.warning("waiting for step %d, which is being uploaded", found.step)
                self._start_persister()
            time.sleep(_POLL)

    def _in_waves(self, runs: RunStore, directory: SlotDirectory) -> CheckpointId | None:
        """Return what counts of what is staged in waves and not stored yet."""
        found = []
        for slot in directory.slots():
            with slot:
                place = (slot.orders.store, slot.orders.run)
                mine = place == (self._place.store, str(self._place.run))
                if mine and slot.state == STAGED and not slot.complete:
                    found.append(slot.orders.checkpoint)
        return max(runs.counting(found), default=None)

    def _trees(
        self, runs: RunStore, slots: Slots, chosen: CheckpointId
    ) -> Generator[Tree, None, None]:
        """Yield where ``chosen`` can be read, the nearest first; closes each."""
        nearest = slots.pop(chosen, None) or self._await(runs, chosen)
        if not isinstance(nearest, Commit):
            with contextlib.closing(SlotTree(nearest)) as tree:
                yield tree
            nearest = self._await(runs, chosen, committed=True)
            assert isinstance(nearest, Commit)  # noqa: S101 - what was asked for
        with contextlib.ExitStack() as held:
            # Whoever may only read cannot leave a lease; the policy decides then.
            with contextlib.suppress(AccessDeniedError):
                held.enter_context(runs.lease(nearest))
            try:
                stored = SnapshotTree(runs.repository, nearest.snapshot)
            except CorruptError as error:
                raise damaged(runs, chosen, error) from error
            with contextlib.closing(stored):
                yield stored

    def _await(
        self, runs: RunStore, chosen: CheckpointId, *, committed: bool = False
    ) -> Commit | list[StagedSlot]:
        """Return the commit of ``chosen``, or, unless it is to be ``committed``, its slots here.

        Another rank has seen it in memory: on another node that still uploads it, or on this one
        while a slot was locked for a moment. It may lack just the part that lies here and whose
        persister is dead: so there is one before this waits.
        """
        deadline = time.monotonic() + PATIENCE
        told = False
        while True:
            for commit in runs.commits():
                if commit.checkpoint == chosen:
                    return commit
            here = staged_here(self._directories, self._place.store, self._place.run)
            slots = None if committed else here.pop(chosen, None)
            for others in here.values():
                close_all(others)
            if slots is not None:
                return slots
            if time.monotonic() > deadline:
                raise NoCheckpointError(
                    f"step {chosen.step} of {self._place.run} was in memory when the ranks agreed "
                    f"on it, and is not committed after {PATIENCE:.0f} s",
                    hint="start all ranks anew: they resume from the newest that is committed",
                )
            if not told:
                told = True
                _log.warning("waiting for step %d, which is being uploaded", chosen.step)
                self._start_persister()
            time.sleep(_POLL)

    def _is_committed(self, runs: RunStore, chosen: CheckpointId) -> bool:
        return any(commit.checkpoint == chosen for commit in runs.commits())
