"""How ranks agree without a collective: through the key-value store that their launcher runs.

A collective that one rank does not reach hangs all others. Here every rank only sets and reads
small keys, with a time limit. Two things are agreed on: which start of the job this is, and at
which call of ``Run.step`` a save happens that no step number decides (time, preemption).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import Ranks, initialised_group, random_incarnation

PATIENCE = 300.0
"""Seconds for which a rank waits for the others to start, and for rank 0's decision."""

_POLL_SECONDS = 0.02
_REMEMBERED = 64


class Board(Protocol):
    """What is used of a ``torch.distributed.Store``; ``get`` waits until the key is there."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        ...

    def get(self, key: str) -> bytes:
        """Return what a key holds."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Return whether all ``keys`` are there."""
        ...

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until they are; raises ``RuntimeError`` if they do not come in time."""
        ...


def find_board(run: str) -> Board | None:
    """Return a board of all ranks for the run called ``run``, or ``None`` if there is none.

    It is the store of the default process group if there is one, else the one that torchrun's
    agents run (``TORCHELASTIC_USE_AGENT_STORE``). Raises ``CheckpointError`` if that does not
    answer.
    """
    group = initialised_group()
    if group is not None:
        default: Callable[[], Any] = group.distributed_c10d._get_default_store
        board: Board = group.PrefixStore(f"envstore/{run}", default())
        return board
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        store = torch.distributed.TCPStore(
            host, int(port), None, False, timedelta(seconds=PATIENCE), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"torchrun's store at {host}:{port} does not answer: {error}",
            hint="give incarnation= to do without it",
        ) from error
    found: Board = torch.distributed.PrefixStore(f"envstore/{run}", store)
    return found


def agree_on_incarnation(
    board: Board, ranks: Ranks, prefix: str, *, patience: float = PATIENCE
) -> str:
    """Return one incarnation, the same on all ranks and new, once all of them ask. Blocks.

    What torchrun says is not enough: its default run id is the same for every launch, and its
    restart count stays when nodes join or leave. The board may also outlive the ranks, so that
    what an earlier start wrote must not be taken for an answer: each rank asks with a word of its
    own, rank 0 answers that word, and waits until everyone has taken note.
    Raises ``CheckpointError`` if a rank does not come within ``patience`` seconds.
    """
    word = random_incarnation()
    deadline = time.monotonic() + patience
    if ranks.rank:
        board.set(f"hello/{ranks.rank}", word)
        _wait(board, f"answer/{word}", deadline, "rank 0")
        incarnation = board.get(f"answer/{word}").decode()
        board.set(f"noted/{incarnation}/{ranks.rank}", "1")
        return incarnation
    incarnation = f"{prefix}-{word}"[-256:]
    answered: dict[int, bytes] = {}
    waiting = set(range(1, ranks.world_size))
    while waiting:
        for rank in sorted(waiting):
            if board.check([f"noted/{incarnation}/{rank}"]):
                waiting.discard(rank)
            elif board.check([f"hello/{rank}"]):
                hello = board.get(f"hello/{rank}")
                if answered.get(rank) != hello:
                    board.set(f"answer/{hello.decode()}", incarnation)
                    answered[rank] = hello
        if waiting and time.monotonic() > deadline:
            raise _absent(f"rank {min(waiting)}", patience)
        if waiting:
            time.sleep(_POLL_SECONDS)
    return incarnation


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do at one call of ``Run.step``: ``save``, and then ``leave`` for good.

    ``due`` is whether the step asked for a save.
    """

    save: bool
    leave: bool
    due: bool = False


class Decisions:
    """What this call of ``Run.step`` does, the same on all ranks.

    Calls that are due by the number of the step are due on every rank, so that rank 0 need only
    say whether it is free to save; the others wait for that. What depends on the time, or on a
    signal, rank 0 decides one call ahead, so that ranks which train in step with each other never
    wait for it. A rank that was told to go posts that, and rank 0 decides on it.

    With ``every_call`` (time, signals) each call costs one or two messages to the board, without
    only the calls that are due. Not safe to use from several threads.
    """

    def __init__(
        self,
        board: Board,
        ranks: Ranks,
        incarnation: str,
        *,
        every_call: bool,
        patience: float = PATIENCE,
    ) -> None:
        self._board = board
        self._ranks = ranks
        self._key = f"saves/{incarnation}"
        self._going = f"going/{incarnation}"
        self._every_call = every_call
        self._patience = patience
        self._told = False
        self._call = 0
        self._saves: list[int] = []
        self._leave = -1
        if ranks.rank == 0:
            self._post(-1)

    def step(self, *, due: bool, free: bool, wanted: bool, leaving: bool) -> Decision:
        """Return what this call does.

        ``due`` is whether its step number asks for a save: it happens if rank 0 is ``free``.
        ``wanted`` (of rank 0) asks for a save at the next call, ``leaving`` (of any rank) for one
        after which all ranks leave. Raises ``CheckpointError`` if rank 0 does not answer.
        """
        call, self._call = self._call, self._call + 1
        if not due and not self._every_call:
            return Decision(save=False, leave=False)
        if leaving and not self._told:
            self._told = True
            self._board.set(self._going, "1")
        if self._ranks.rank == 0:
            going = self._told or (self._every_call and self._board.check([self._going]))
            # What this call saves was wanted by the one before, and is not wanted twice.
            wanted = wanted and call not in self._saves
            if self._leave < 0 and going:
                self._leave = call + 1
                wanted = True
            now = [call] if due and free and call not in self._saves else []
            later = [call + 1] if wanted else []
            self._saves = [*self._saves, *now, *later][-_REMEMBERED:]
            self._post(call)
        else:
            self._read(call if due else call - 1)
        return Decision(call in self._saves, 0 <= self._leave <= call, due)

    def _post(self, call: int) -> None:
        value = {"call": call, "saves": self._saves, "leave": self._leave}
        self._board.set(self._key, json.dumps(value))

    def _read(self, call: int) -> None:
        """Wait until rank 0 has made its call number ``call``."""
        deadline = time.monotonic() + self._patience
        _wait(self._board, self._key, deadline, "rank 0")
        while True:
            value = json.loads(self._board.get(self._key))
            if value["call"] >= call:
                self._saves, self._leave = value["saves"], value["leave"]
                return
            if time.monotonic() > deadline:
                raise _absent("rank 0", self._patience)
            time.sleep(_POLL_SECONDS)


def _wait(board: Board, key: str, deadline: float, who: str) -> None:
    left = max(deadline - time.monotonic(), 0.001)
    try:
        board.wait([key], timedelta(seconds=left))
    except RuntimeError as error:
        raise _absent(who, left) from error


def _absent(who: str, seconds: float) -> CheckpointError:
    return CheckpointError(
        f"{who} did not come to the launcher's store within {seconds:.0f} s",
        hint="every rank must make a Run of the same name, restore and step it",
    )
