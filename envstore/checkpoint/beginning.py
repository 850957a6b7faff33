"""How an epoch begins: claimed, chosen for, started; or joined by the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from envstore.checkpoint.bodies import MAX_TEXT, MAX_WORLD
from envstore.checkpoint.epochs import LAST, Claim, Epoch, Epochs
from envstore.checkpoint.errors import (
    CheckpointError,
    FencedError,
    NoCheckpointError,
    RanksDisagreeError,
)
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.records import Commit
from envstore.checkpoint.shelf import Shelf
from envstore.errors import UsageError

_RACES = 32

Choose = Callable[[Sequence[Commit]], CheckpointId | None]


class Beginning:
    """Begins epochs of one run for one incarnation."""

    def __init__(
        self, run: RunName, epochs: Epochs, shelf: Shelf, incarnation: str, world_size: int
    ) -> None:
        """Raises ``UsageError`` for what cannot be kept."""
        if not 1 <= len(incarnation) <= MAX_TEXT:
            raise UsageError(f"an incarnation is a text of 1 to {MAX_TEXT} characters")
        if not 1 <= world_size <= MAX_WORLD:
            raise UsageError(f"world size {world_size} cannot be kept", hint=f"1 to {MAX_WORLD}")
        self._run = run
        self._epochs = epochs
        self._shelf = shelf
        self._incarnation = incarnation
        self._world_size = world_size

    def open(
        self,
        roll_forward: Callable[[], object],
        commits: Callable[[], Sequence[Commit]],
        choose: Choose,
        staged: CheckpointId | None,
    ) -> Epoch:
        """Return the epoch; see ``RunStore.open_epoch``.

        ``roll_forward`` commits what is complete, ``commits`` lists what counts.
        """

        def chosen() -> CheckpointId | None:
            return self._checked(choose(commits()), staged)

        chosen()  # what is refused now is refused before anybody is fenced
        for _ in range(_RACES):
            claim = self._claim()
            if claim is None:
                continue
            epoch = self._epochs.start(claim.number)
            if epoch is None:
                # Whoever commits from now on makes the claim void; whatever was committed before,
                # or could have been, is in the list that is chosen from.
                roll_forward()
                epoch = self._epochs.begin(claim, chosen())
            if epoch is None:
                continue
            newest = self._epochs.look().claimed
            if newest == epoch.number:
                return epoch
            newer = self._epochs.claim(newest)
            if newer is None or newer.incarnation != self._incarnation:
                break
        raise FencedError(
            f"another incarnation of {self._run} has begun at the same time",
            hint="let one job run it at a time",
        )

    def _claim(self) -> Claim | None:
        """Return the claim to join or the new one; ``None`` if somebody else was faster."""
        standing = self._epochs.look()
        newest = standing.claimed
        started = standing.newest is not None and standing.newest.number == newest
        may_join = newest and (started or newest in standing.pending)
        claim = self._epochs.claim(newest) if may_join else None
        if claim is None or claim.incarnation != self._incarnation or self._has_commits(newest):
            if newest + 1 >= LAST:
                raise CheckpointError(f"{self._run} has no epochs left", hint="use another name")
            claim = self._epochs.take(newest + 1, self._incarnation, self._world_size)
        if claim.incarnation != self._incarnation:
            return None
        if claim.world_size != self._world_size:
            raise RanksDisagreeError(
                f"{self._run}: one rank says that there are {self._world_size} of them, another "
                f"{claim.world_size}",
                hint="start all ranks alike, and give each start an incarnation of its own",
            )
        return claim

    def _has_commits(self, epoch: int) -> bool:
        return any(checkpoint.epoch == epoch for checkpoint in self._shelf.commits())

    def _checked(
        self, chosen: CheckpointId | None, staged: CheckpointId | None
    ) -> CheckpointId | None:
        if chosen is None or chosen == staged or self._shelf.has_commit(chosen):
            return chosen
        raise NoCheckpointError(
            f"checkpoint {chosen} of {self._run} is not committed",
            hint="see: envstore checkpoint ls",
        )
