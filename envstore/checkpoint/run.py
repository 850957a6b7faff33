"""``Run``: what a training program saves its checkpoints with, and restores them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Literal

from envstore.checkpoint.deciding import Deciding, needs_board, no_board
from envstore.checkpoint.errors import (
    CheckpointError,
    FencedError,
    NotFiniteError,
    SaveFailedError,
)
from envstore.checkpoint.launch import Launch
from envstore.checkpoint.layout import CheckpointId, Tree
from envstore.checkpoint.ledger import Save
from envstore.checkpoint.opening import Opening
from envstore.checkpoint.options import (
    MAX_STEP,
    Options,
    Staging,
    check_metrics,
    check_options,
    check_pin,
    whole,
)
from envstore.checkpoint.places import find_place
from envstore.checkpoint.policies import Policy, SaveStats
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.restoring import Restorer
from envstore.checkpoint.resuming import Incarnation
from envstore.checkpoint.saves import Saver
from envstore.checkpoint.signals import SignalWatch
from envstore.checkpoint.slots import SlotDirectory, slot_directory
from envstore.checkpoint.stored import Stored
from envstore.errors import EnvstoreError, UsageError
from envstore.store.objects.base import Traffic

_log = logging.getLogger("envstore.checkpoint")


class Run(Stored):
    """The checkpoints of one training run, seen by one rank of it.

    ``name`` is ``[namespace/]run`` in the store that ``store``, ``ENVSTORE_URL`` or nothing (the
    user's own) names, or ``URL#[namespace/]run``, as in ``s3://bucket/prefix#team/llm``.

    - ``save``: at which calls of ``step`` to save: ``every(steps=|minutes=)``,
      ``auto(max_overhead)``, composed by ``|``; ``None`` for never.
    - ``keep``: what to keep after each commit: ``last(n)``, ``every(steps)``, ``best(...)``,
      ``younger_than(...)``, composed by ``|``; ``None`` for all. Pinned ones always stay.
    - ``staging``: where and how states are copied to memory. ``persister``: ``auto`` starts the
      process that uploads, ``external`` waits for a sidecar's.
    - ``on_busy``: when ``step`` is to save and the saves before are not uploaded yet, ``skip``
      until they are, or ``wait``. ``on_error``: a failed save is a warning until ``max_failures``
      fail in a row, or ``raise`` at the next ``step`` or ``save``.
    - ``on_preempt``: on one of ``signals`` what is staged is uploaded first (``flush``), also a
      last state at the next ``step`` (``snapshot``: then ``preempted`` becomes true at the same
      step on all ranks, and the program is to leave), or ``none``. Handlers are chained. Only a
      ``Run`` made in the main thread watches signals.
    - ``replicated``: items whose tensors are equal on all ranks, so that each is stored once;
      ``True`` for all. What is in DistributedDataParallel need not be named.
    - ``codec``: ``raw``, ``split`` or ``xor``; ``bandwidth``: of the upload, bytes/s or ``"50M"``.
    - ``lineage``: texts to record, such as ``{"model": REF, "data": REF}``; refs become digests.
      Chunks of ``model`` are shared. ``check_finite``: ``off``, ``record`` or ``refuse``.
    - ``fresh``: begin anew although there are checkpoints, which then do not count any more.
    - ``prefetch``: have the node cache hold the newest checkpoint from now on, in a thread.
    - ``incarnation``, ``rank``, ``world_size``: who this is, if no launcher says (``identity``).

    Not thread-safe, but for ``preempted``, ``status`` and the futures of a ``Save``. Raises
    ``UsageError`` for what cannot be; the store is first needed by ``restore`` or ``save``.
    """

    def __init__(
        self,
        name: str,
        store: str | None = None,
        *,
        save: Policy | None = None,
        keep: Policy | None = None,
        staging: Staging | None = None,
        persister: Literal["auto", "external"] = "auto",
        on_busy: Literal["skip", "wait"] = "skip",
        on_error: Literal["warn", "raise"] = "warn",
        max_failures: int = 3,
        on_preempt: Literal["flush", "snapshot", "none"] = "flush",
        signals: Sequence[str | int] = ("SIGTERM",),
        replicated: Sequence[str] | Literal[True] = (),
        codec: Literal["raw", "split", "xor"] = "raw",
        bandwidth: int | str | None = None,
        lineage: Mapping[str, str] | None = None,
        check_finite: Literal["off", "record", "refuse"] = "off",
        fresh: bool = False,
        prefetch: bool = False,
        incarnation: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._options: Options = check_options(
            save=save,
            keep=keep,
            staging=staging or Staging(),
            persister=persister,
            on_busy=on_busy,
            on_error=on_error,
            max_failures=max_failures,
            on_preempt=on_preempt,
            signals=signals,
            replicated=replicated,
            codec=codec,
            bandwidth=bandwidth,
            lineage=lineage,
            check_finite=check_finite,
            fresh=fresh,
            prefetch=prefetch,
        )
        self._place = find_place(name, store, os.environ)
        launch = Launch(str(self._place.run), incarnation, rank, world_size)
        self._ranks = launch.ranks
        snapshot = on_preempt == "snapshot"
        if needs_board(save, self._ranks, snapshot=snapshot) and launch.board() is None:
            raise no_board(self._ranks)
        self._opening = Opening(self._place, look=not fresh, prefetch=prefetch)
        self._incarnation = Incarnation(
            self._opening, self._place.run, self._ranks, launch.incarnation, fresh
        )
        self._deciding = Deciding(
            save,
            self._ranks,
            snapshot=snapshot,
            board=launch.board,
            name=lambda: self._incarnation.name,
        )
        root = self._options.staging.dir
        directory = slot_directory(self._place.store, self._place.run, self._ranks.rank, root)
        slots = SlotDirectory(directory)
        self._saver = Saver(self._place, self._ranks, self._options, slots, self._opening)
        self._ledger = self._saver.ledger
        self._restorer = Restorer(
            self._place,
            self._ranks,
            self._opening,
            self._incarnation,
            directory.parent,
            self._saver.start_persister,
        )
        self._stepped = False
        self._signalled = False
        self._preempted = False
        self._base = (0, time.monotonic())
        self._closed = False
        self._watch = SignalWatch(self._options.signals, self._on_signal, absorb=snapshot)
        if self._watch.active and self._options.signals:
            self._saver.watch_flushes()
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self), os.getpid())
        atexit.register(self._at_exit)

    @property
    def rank(self) -> int:
        """Which rank this is."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._ranks.world_size

    @property
    def name(self) -> str:
        """``namespace/run``."""
        return str(self._place.run)

    @property
    def store(self) -> str:
        """The canonical URL of the store."""
        return self._place.store

    @property
    def preempted(self) -> bool:
        """Whether the job was told to end; with ``on_preempt="snapshot"``, after the last save."""
        return self._preempted

    @property
    def traffic(self) -> Traffic:
        """What this process (not the persister) has sent to the store and got from it."""
        return self._runs().repository.objects.traffic

    # Saving and restoring.

    def restore(
        self,
        state: MutableMapping[str, Any],
        step: int | None = None,
        only: Collection[str] | None = None,
        *,
        strict: bool = True,
        trusted: bool = False,
    ) -> int | None:
        """Bring ``state`` back to the newest checkpoint, or that of ``step``; returns its step.

        ``None``, and nothing is touched, if the run has no checkpoint yet. Tensors and arrays are
        written in place, objects get ``load_state_dict``, and plain values are replaced in the
        mapping. ``only`` names the items to restore; others are not read. Read from memory of
        this node if it is staged there, else from the node cache and the store, each byte
        verified. All ranks restore the same step. With several, each restores, and what an older
        start of the job still saves counts no more; a single one may restore just to look, and
        replaces the older start with its first ``step`` or ``save``.

        Names, dtypes and shapes are compared before anything is written (``strict=False``:
        tensors that are only on one side are passed over). Raises ``StateMismatchError`` naming
        them, ``NoCheckpointError`` (that step), ``UntrustedObjectError`` (pickled objects; only
        with ``trusted=True``), ``CorruptError`` naming the step if it is damaged - never an older
        one instead - and the errors of the store. ``state`` then holds anything.
        """
        self._require_open()
        if step is not None:
            whole("step", step, 0, MAX_STEP)
        if self._options.fresh:
            raise UsageError("a fresh run restores nothing", hint="leave fresh=True out")
        found = self._restorer.restore(state, step, only, strict=strict, trusted=trusted)
        if found is not None and only is None:
            self._saver.prepare(state)
        self._base = (found or 0, time.monotonic())
        return found

    @contextlib.contextmanager
    def opened(self, step: int | None = None) -> Iterator[tuple[CheckpointId, Tree] | None]:
        """Give what ``restore`` would restore, and where its files are to be read; or ``None``.

        For those who read a checkpoint in their own way: the run resumes from it. Raises as
        ``restore``.
        """
        self._require_open()
        if step is not None:
            whole("step", step, 0, MAX_STEP)
        if self._options.fresh:
            raise UsageError("a fresh run restores nothing", hint="leave fresh=True out")
        with self._restorer.opened(step) as found:
            self._base = (0 if found is None else found[0].step, time.monotonic())
            yield found

    def step(
        self,
        n: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> Save | None:
        """Tell that step ``n`` is done; saves ``state`` if it is time. ``None`` if it did not.

        Call it on all ranks, after the optimizer's step. A failure to save is logged and counted,
        see ``on_error``; what is wrong with the call is raised. Raises ``SaveFailedError``,
        ``FencedError`` (another incarnation has taken over) and ``NotFiniteError``.
        """
        self._require_open()
        whole("step", n, 0, MAX_STEP)
        self._ledger.check()
        self._incarnation.begin_ahead(self._saver.take_slots)
        if not self._stepped:
            # Optimizers make their state in their first step: the slots get their size now.
            self._stepped = True
            self._saver.prepare(state)
        decision = self._deciding.step(
            n, self._stats(), free=self._is_free, leaving=self._signalled
        )
        if decision.due:
            self._base = (n, self._base[1])
        if decision.due and not decision.save:
            self._ledger.skipped(n)
        try:
            return self._save(n, state, metrics, "") if decision.save else None
        except (UsageError, NotFiniteError, FencedError, SaveFailedError):
            raise
        except EnvstoreError as error:
            if isinstance(error, CheckpointError) and not self._incarnation.begun:
                raise  # not a matter of trying again: nothing was restored, ranks disagree
            self._ledger.failed(n, error)
            return None
        finally:
            if decision.leave:
                self._saver.flush()
                self._preempted = True

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        pin: str | bool = False,
    ) -> Save:
        """Save ``state`` as ``step`` now; waits for a free slot.

        When it returns the state is copied (``staged``; with overlap, what may change before the
        next step of an optimizer is) and the persister has it: it will be committed whatever
        becomes of this process. ``pin`` keeps it whatever ``keep`` says, with a reason. The same
        step may be saved again. Raises what keeps the state from being staged, and
        ``SaveFailedError`` as ``step`` does.
        """
        self._require_open()
        whole("step", step, 0, MAX_STEP)
        self._ledger.check()
        return self._save(step, state, metrics, check_pin(pin))

    def prewarm(self, state: Mapping[str, Any]) -> None:
        """Reserve memory for ``state`` and start the persister; waits until both are done.

        ``restore`` and the first ``step`` begin this in the background.
        """
        self._require_open()
        self._saver.prepare(state)
        self._saver.prepared()

    def status(self) -> dict[str, Any]:
        """Return how saving goes: ``staged``, ``local``, ``durable`` (the last steps, or
        ``None``), ``pending``, ``failures`` (in a row), ``error`` (the last one, or ``""``),
        ``stall`` and ``persist`` (seconds of the last save, or ``None``), ``sent`` (bytes that
        this rank's saves have uploaded), ``preempted``.
        """
        return {**self._ledger.status(), "preempted": self._signalled}

    # Ending.

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all saves of this process are durable.

        Raises ``SaveFailedError`` if one is not and will not be tried again, ``TimeoutError``.
        """
        self._ledger.wait(timeout)

    def close(self) -> None:
        """Let go of slots, store and signals. Idempotent; also done at exit.

        What was saved goes on to be uploaded, by the persister: ``wait`` first to be sure here.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._watch.close()
        self._incarnation.close()
        self._saver.close()
        self._opening.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until all is durable (a container's end ends the persister too), then close.

        After an exception only close.
        """
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    # How it is done.

    def _save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        pin: str,
    ) -> Save:
        measured = check_metrics(metrics)
        self._base = (step, time.monotonic())
        self._saver.take_slots()  # who cannot save must not fence who does
        epoch = self._incarnation.begin()
        return self._saver.save(epoch.number, step, state, measured, pin)

    def _stats(self) -> SaveStats:
        step, when = self._base
        stall, persist = self._ledger.costs
        return SaveStats(step, when, stall, persist, self._ledger.pending > 0)

    def _is_free(self) -> bool:
        return self._options.on_busy == "wait" or self._saver.free

    def _runs(self) -> RunStore:
        self._require_open()
        return self._opening.run_store()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError(f"the Run of {self._place.run} is closed", hint="make another")

    def _on_signal(self, number: int) -> None:
        self._signalled = True
        if self._options.on_preempt == "flush":
            self._preempted = True
        self._saver.flush_soon()


def _close_at_exit(reference: weakref.ref[Run], process: int) -> None:
    run = reference()
    if run is not None and os.getpid() == process:
        run.close()
