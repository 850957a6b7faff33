"""Which epoch a process saves in, what it resumed from, and what lies staged on its node."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from envstore.checkpoint.epochs import Epoch
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import Ranks
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.opening import Opening
from envstore.checkpoint.records import Commit
from envstore.checkpoint.slots import SlotDirectory, StagedSlot
from envstore.errors import EnvstoreError

_log = logging.getLogger("envstore.checkpoint")

Choose = Callable[[Sequence[Commit]], CheckpointId | None]


class Incarnation:
    """The epoch of this process, begun when it is needed. Thread-safe.

    ``name`` says which start of the job this is; it is asked for once, and may block. A process
    that resumes anew (a second ``restore``) begins another epoch.
    """

    def __init__(
        self, opening: Opening, run: RunName, ranks: Ranks, name: Callable[[], str], fresh: bool
    ) -> None:
        self._opening = opening
        self._run = run
        self._ranks = ranks
        self._find_name = name
        self._fresh = fresh
        self._lock = threading.RLock()
        self._name = ""
        self._times = 0
        self._epoch: Epoch | None = None
        self._choose: Choose = self._nothing
        self._staged: CheckpointId | None = None
        self._ahead: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Which start of the job this is, the same on all ranks. May block at first."""
        with self._lock:
            if not self._name:
                self._name = self._find_name()
            return self._name

    @property
    def begun(self) -> bool:
        """Whether the epoch has begun."""
        return self._epoch is not None

    def resume(self, choose: Choose, staged: CheckpointId | None) -> None:
        """Have the next epoch resume from what ``choose`` says.

        That may be ``staged``, which lies in memory and need not be committed yet.
        """
        with self._lock:
            self._choose = choose
            self._staged = staged
            if self._epoch is not None:
                self._epoch = None
                self._times += 1

    def begin(self) -> Epoch:
        """Return the epoch, begun by now. Raises what ``RunStore.open_epoch`` does.

        Also ``CheckpointError`` if nothing was restored although there are checkpoints.
        """
        with self._lock:
            if self._epoch is None:
                name = f"{self.name}/{self._times}" if self._times else self.name
                self._epoch = self._opening.run_store().open_epoch(
                    name, self._ranks.world_size, self._choose, staged=self._staged
                )
            return self._epoch

    def begin_ahead(self, ready: Callable[[], object]) -> None:
        """Begin in a thread, so that the first save need not wait. What fails is tried again.

        Not before ``ready`` has returned, which raises what keeps this process from saving.
        """
        if self._epoch is None and (self._ahead is None or not self._ahead.is_alive()):
            self._ahead = threading.Thread(
                target=self._try, args=(ready,), name="envstore-epoch", daemon=True
            )
            self._ahead.start()

    def close(self) -> None:
        """Wait for the thread; idempotent."""
        if self._ahead is not None:
            self._ahead.join()

    def _try(self, ready: Callable[[], object]) -> None:
        with contextlib.suppress(EnvstoreError):  # the first save says it
            ready()
            self.begin()

    def _nothing(self, commits: Sequence[Commit]) -> None:
        if commits and not self._fresh:
            raise CheckpointError(
                f"{self._run} has checkpoints, the newest of step {commits[-1].step}, and none "
                "was restored",
                hint="call restore() first; Run(fresh=True) begins anew and leaves them behind",
            )


def staged_here(
    directories: Path, store: str, run: RunName
) -> dict[CheckpointId, list[StagedSlot]]:
    """Return the checkpoints of which all ranks' parts lie whole in slots of this node.

    ``directories`` has one directory of slots for each rank. Close every slot. Only directories
    of this user that nobody else may enter are looked at.
    """
    found: dict[CheckpointId, dict[int, StagedSlot]] = {}
    extra: list[StagedSlot] = []
    for directory in _own_directories(directories):
        for slot in SlotDirectory(directory).slots():
            orders = slot.orders
            mine = (orders.store, orders.run) == (store, str(run)) and slot.complete
            parts = found.setdefault(orders.checkpoint, {}) if mine else {}
            if not mine or orders.rank in parts:
                extra.append(slot)
            else:
                parts[orders.rank] = slot
    whole = {}
    for checkpoint, parts in found.items():
        slots = list(parts.values())
        if {slot.orders.world_size for slot in slots} == {len(slots)}:
            whole[checkpoint] = slots
        else:
            extra += slots
    close_all(extra)
    return whole


def close_all(slots: Sequence[StagedSlot]) -> None:
    """Close each of ``slots``."""
    for slot in slots:
        slot.close()


def _own_directories(parent: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(parent) if name.isdecimal())
    except OSError:
        return []
    own = []
    for path in (parent / name for name in names):
        with contextlib.suppress(OSError):
            known = os.lstat(path)
            private = known.st_uid == os.geteuid() and not known.st_mode & 0o077
            if stat.S_ISDIR(known.st_mode) and private:
                own.append(path)
    return own
