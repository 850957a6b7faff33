"""Whether a call of ``Run.step`` saves: by its number, by the time, or as the job is to end."""

from __future__ import annotations

import time
from collections.abc import Callable

from envstore.checkpoint.agreement import Board, Decision, Decisions
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import Ranks
from envstore.checkpoint.policies import AnyOf, Policy, SaveStats

NOT_NOW = Decision(save=False, leave=False)


def needs_board(policy: Policy | None, ranks: Ranks, *, snapshot: bool) -> bool:
    """Return whether ranks cannot decide alike by the step alone."""
    return ranks.world_size > 1 and (snapshot or (policy is not None and not policy.by_step))


def no_board(ranks: Ranks) -> CheckpointError:
    """Return the error of ranks that must agree on a time and cannot."""
    return CheckpointError(
        f"the {ranks.world_size} ranks have no way to agree when to save by the time or a signal",
        hint="start them with torchrun, call torch.distributed.init_process_group first, or use "
        "save=every(steps=N) and on_preempt='flush'",
    )


class Deciding:
    """Decides for this rank, alike on all of them. Of use to one thread.

    ``board`` is asked for at the first call that needs it, and ``name`` says the incarnation.
    Without a board ranks save what is due by its step and wait where they would have skipped.
    """

    def __init__(
        self,
        policy: Policy | None,
        ranks: Ranks,
        *,
        snapshot: bool,
        board: Callable[[], Board | None],
        name: Callable[[], str],
    ) -> None:
        self._members = () if policy is None else _members(policy)
        self._ranks = ranks
        self._snapshot = snapshot
        self._every_call = needs_board(policy, ranks, snapshot=snapshot)
        self._find_board = board
        self._name = name
        self._decisions: Decisions | None = None
        self._alone = ranks.world_size == 1
        self._left = False

    def step(
        self, step: int, stats: SaveStats, *, free: Callable[[], bool], leaving: bool
    ) -> Decision:
        """Return what this call does. ``free`` is asked whether a save could begin at once.

        Raises ``CheckpointError`` if rank 0 does not answer.
        """
        now = time.monotonic()
        due = any(one.due(step, now, stats) for one in self._members if one.by_step)
        timed = any(one.due(step, now, stats) for one in self._members if not one.by_step)
        leaving = leaving and self._snapshot
        if self._ranks.world_size == 1:
            save = (leaving and not self._left) or ((due or timed) and free())
            self._left = self._left or leaving
            return Decision(save, leaving, due)
        if not due and not self._every_call:
            return NOT_NOW
        if self._decisions is None and not self._alone:
            board = self._find_board()
            self._alone = board is None
            if board is not None:
                self._decisions = Decisions(
                    board, self._ranks, self._name(), every_call=self._every_call
                )
        if self._decisions is None:
            return Decision(due, leave=False, due=due)
        able = self._ranks.rank == 0 and (due or timed) and free()
        return self._decisions.step(due=due, free=able, wanted=timed and able, leaving=leaving)


def _members(policy: Policy) -> tuple[Policy, ...]:
    return policy.members if isinstance(policy, AnyOf) else (policy,)
