"""What this process knows of the start of the job: its ranks, its incarnation, its board."""

from __future__ import annotations

import os

from envstore.checkpoint import identity
from envstore.checkpoint.agreement import Board, agree_on_incarnation, find_board
from envstore.checkpoint.identity import Ranks


class Launch:
    """Asks the launcher, and only when something is needed that it alone knows."""

    def __init__(
        self, run: str, incarnation: str | None, rank: int | None, world_size: int | None
    ) -> None:
        """Raises ``UsageError`` for what cannot be."""
        self.ranks: Ranks = identity.find_ranks(rank, world_size, os.environ)
        self._run = run
        self._said = identity.given_incarnation(incarnation, os.environ)
        self._board: Board | None = None

    def board(self) -> Board | None:
        """Return the store of keys that all ranks share, ``None`` if there is none yet."""
        if self._board is None:
            self._board = find_board(self._run)
        return self._board

    def incarnation(self) -> str:
        """Return which start of the job this is; may wait for the other ranks.

        Raises ``CheckpointError`` if nothing tells.
        """
        if self._said is not None:
            return self._said
        if self.ranks.world_size == 1:
            return identity.random_incarnation()
        board = self.board()
        if board is not None:
            prefix = os.environ.get("TORCHELASTIC_RUN_ID", "torch")
            return agree_on_incarnation(board, self.ranks, prefix)
        scheduled = identity.scheduled_incarnation(os.environ)
        if scheduled is None:
            raise identity.no_common_incarnation(self.ranks.world_size)
        return scheduled
