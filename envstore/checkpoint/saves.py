"""The trainer's side of saving: a state into a slot, and what becomes of it afterwards."""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from envstore.checkpoint.capture import capture
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import Ranks
from envstore.checkpoint.layout import Captured, CheckpointId, Orders
from envstore.checkpoint.ledger import Ledger, Save
from envstore.checkpoint.lineage import base_of, resolve_refs, surroundings
from envstore.checkpoint.link import Link
from envstore.checkpoint.opening import Opening
from envstore.checkpoint.options import Options
from envstore.checkpoint.places import RunPlace
from envstore.checkpoint.slots import SlotDirectory
from envstore.checkpoint.spawning import PersisterOptions
from envstore.checkpoint.staging import Stager
from envstore.errors import EnvstoreError

_log = logging.getLogger("envstore.checkpoint")


_LOOK_SECONDS = 1.0
_LOCAL_SECONDS = 60.0


class _Relay:
    """The listener of a stager, which is made before the link."""

    link: Link

    def writing(self, slot: int, checkpoint: CheckpointId) -> None:
        self.link.writing(slot, checkpoint)

    def wave(self, slot: int, checkpoint: CheckpointId, wave: int) -> None:
        self.link.wave(slot, checkpoint, wave)

    def staged(self, slot: int, checkpoint: CheckpointId) -> None:
        self.link.staged(slot, checkpoint)

    def check(self, checkpoint: CheckpointId) -> None:
        self.link.check(checkpoint)


class Saver:
    """Saves the states of one rank. ``status``, ``failed`` and ``flush_soon`` from any thread."""

    def __init__(
        self,
        place: RunPlace,
        ranks: Ranks,
        options: Options,
        directory: SlotDirectory,
        opening: Opening,
    ) -> None:
        self._place = place
        self._ranks = ranks
        self._options = options
        self._directory = directory
        self._opening = opening
        self._ledger = Ledger(
            str(place.run), options.max_failures, raises=options.on_error == "raise"
        )
        self._stager: Stager | None = None
        self._link: Link | None = None
        self._lock = threading.RLock()  # of what is made once
        self._size = -1
        self._warming: threading.Thread | None = None
        self._lineage: dict[str, str] | None = None
        self._attempts: dict[tuple[int, int], int] = {}
        self._flushes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._flusher: threading.Thread | None = None

    # Getting ready.

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Begin to make room for ``state`` and to start the persister, in a thread."""
        size = self._capture(state, {}).size
        if size <= self._size or (self._warming is not None and self._warming.is_alive()):
            return
        self._size = size
        self._warming = threading.Thread(
            target=self._warm, args=(size,), name="envstore-prewarm", daemon=True
        )
        self._warming.start()

    def prepared(self) -> None:
        """Wait until what ``prepare`` began is done. Raises what went wrong."""
        if self._warming is not None:
            self._warming.join()
        if self._size >= 0:
            self._staging().prewarm(self._size)

    def take_slots(self) -> None:
        """Be the one process that saves here. Raises ``CheckpointError`` if another one does."""
        self._staging()

    def start_persister(self) -> None:
        """Have a persister look at what is staged here; a failure is only logged."""
        try:
            self._staging()
        except EnvstoreError as error:
            _log.warning("%s: what is staged here waits: %s", self._place.run, error)

    def _warm(self, size: int) -> None:
        try:
            self._find_lineage()
            self._staging().prewarm(size)
        except EnvstoreError as error:
            _log.warning("%s: the first save will be slow, or fail: %s", self._place.run, error)

    def _staging(self) -> Stager:
        """Return the stager, with its persister running."""
        with self._lock:
            if self._stager is None:
                # The lock of the trainer first: an idle persister removes what nobody holds.
                relay = _Relay()
                staging = self._options.staging
                stager = Stager(
                    self._directory,
                    relay,
                    slots=staging.slots,
                    max_bytes=staging.max_bytes,
                    overlap=staging.overlap,
                )
                mode: Literal["daemon", "external"] = (
                    "daemon" if self._options.persister == "auto" else "external"
                )
                options = PersisterOptions(
                    mode, bandwidth=self._options.bandwidth, store=self._place.store
                )
                try:
                    self._link = relay.link = Link(self._directory, options, self._heard)
                except BaseException:
                    stager.close()
                    raise
                self._stager = stager
            return self._stager

    def _find_lineage(self) -> dict[str, str]:
        with self._lock:
            if self._lineage is None:
                given = self._options.lineage
                if given:
                    given = resolve_refs(self._opening.run_store().repository, given)
                self._lineage = {**surroundings(self._ranks.world_size, os.environ), **given}
            return self._lineage

    # Saving.

    def save(
        self,
        epoch: int,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        pin: str,
    ) -> Save:
        """Stage ``state``; waits for a free slot. See ``Run.save``."""
        began = time.monotonic()
        if self._warming is not None:
            self._warming.join()
        origin = self._find_lineage()
        attempt = self._attempts.get((epoch, step), 0)
        checkpoint = CheckpointId(step, epoch, attempt)
        saved = datetime.now(UTC).isoformat(timespec="milliseconds")
        facts = {
            "run": str(self._place.run),
            "step": step,
            "saved": saved,
            "metrics": dict(metrics),
            "lineage": origin,
        }
        captured = self._capture(state, facts)
        orders = Orders(
            self._place.store,
            str(self._place.run),
            checkpoint,
            self._ranks.rank,
            self._ranks.world_size,
            saved,
            base_of(origin),
            self._options.keep,
            self._options.codec,
            pin,
            metrics,
            origin,
        )
        stager = self._staging()
        save = Save(checkpoint, captured.size)
        self._ledger.add(save, began)
        try:
            staged = stager.stage(captured, orders)
            while staged is None:
                self._ledger.check()
                staged = stager.stage(captured, orders, timeout=_LOOK_SECONDS)
        except EnvstoreError:
            self._ledger.forget(save)
            raise
        except BaseException:
            # Ctrl-C may have come when the part was staged already: the next one is another.
            self._attempts = {(epoch, step): attempt + 1}
            self._ledger.forget(save)
            raise
        self._attempts = {(epoch, step): attempt + 1}
        self._size = max(self._size, captured.size)
        staged.done.add_done_callback(functools.partial(self._ledger.staged, save))
        self._ledger.stalled(time.monotonic() - began)
        if not self._options.staging.overlap:
            # Once the persister has said so, nothing that happens here can lose it.
            self._wait_until_local(save)
        return save

    def _wait_until_local(self, save: Save) -> None:
        try:
            save.local.exception(_LOCAL_SECONDS)
        except TimeoutError:
            error = CheckpointError(
                f"the persister of {self._directory.path} does not answer",
                hint="what is staged stays in memory until one uploads it",
            )
            self._ledger.failed(save.step, error)

    def _capture(self, state: Mapping[str, Any], facts: Mapping[str, Any]) -> Captured:
        return capture(
            state,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            replicated=self._options.replicated,
            facts=facts,
            check_finite=self._options.check_finite if facts else "off",
        )

    # What becomes of it.

    @property
    def ledger(self) -> Ledger:
        """What is known of the saves."""
        return self._ledger

    @property
    def free(self) -> bool:
        """Whether a save would find a free slot."""
        return self._ledger.pending < self._options.staging.slots

    def flush_soon(self) -> None:
        """Have the persister hurry. Takes no lock: for signal handlers."""
        self._flushes.put(True)

    def watch_flushes(self) -> None:
        """Start the thread that ``flush_soon`` wakes."""
        self._flusher = threading.Thread(target=self._flush, name="envstore-flush", daemon=True)
        self._flusher.start()

    def flush(self) -> None:
        """Have the persister upload what is staged at once."""
        if self._link is not None:
            self._link.flush()

    def close(self) -> None:
        """Let go of the slots. The persister finishes, then removes them. Idempotent."""
        self._flushes.put(False)
        if self._flusher is not None:
            self._flusher.join()
        if self._warming is not None:
            self._warming.join()
        with self._lock:
            stager, self._stager = self._stager, None
            link, self._link = self._link, None
        if stager is not None:
            stager.close()
        if link is not None:
            link.close()

    def _flush(self) -> None:
        while self._flushes.get():
            self.flush()

    def _heard(self, message: Mapping[str, Any]) -> None:
        """Take note of what the persister says; called from the thread of the link."""
        self._ledger.heard(message)
        if message.get("say") in ("durable", "failed") and self._stager is not None:
            self._stager.slot_freed()
