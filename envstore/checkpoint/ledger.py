"""What became of each save, how often saves fail, and what they cost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from envstore import errors as general
from envstore.checkpoint import errors
from envstore.checkpoint.errors import CheckpointError, FencedError, SaveFailedError
from envstore.checkpoint.layout import CheckpointId
from envstore.errors import EnvstoreError

_log = logging.getLogger("envstore.checkpoint")


@dataclass(frozen=True, slots=True)
class Save:
    """One save under way. Each future holds the checkpoint once it is done.

    ``staged``: copied, the state may change. ``local``: the persister has it, so that it will be
    committed whatever becomes of this process. ``durable``: committed in the store, with all
    ranks' parts; fails with what kept it from that. ``bytes`` are those of this rank's part.
    """

    checkpoint: CheckpointId
    bytes: int
    staged: Future[CheckpointId] = field(default_factory=Future)
    local: Future[CheckpointId] = field(default_factory=Future)
    durable: Future[CheckpointId] = field(default_factory=Future)

    @property
    def step(self) -> int:
        """The step that is saved."""
        return self.checkpoint.step


@dataclass(slots=True)
class _Entry:
    save: Save
    began: float
    failures: int = 0


class Ledger:
    """The saves of this process that are not durable yet, and the sum of all others.

    Thread-safe. A save counts as failed once: when it is given up, when it could not be staged,
    when its first upload fails (which is tried again), or when it was left out because those
    before it cannot be uploaded. A durable one ends the row.
    """

    def __init__(self, run: str, max_failures: int, *, raises: bool) -> None:
        self._run = run
        self._max_failures = max_failures
        self._raises = raises
        self._changed = threading.Condition()
        self._open: dict[str, _Entry] = {}
        self._failures = 0
        self._attempts = 0
        self._error: EnvstoreError | None = None
        self._fenced: FencedError | None = None
        self._newest: CheckpointId | None = None
        self._lost: EnvstoreError | None = None  # why the newest save was given up
        self._last: dict[str, int | None] = {"staged": None, "local": None, "durable": None}
        self._stall: float | None = None
        self._persist: float | None = None
        self._sent = 0

    @property
    def pending(self) -> int:
        """How many saves are not durable yet."""
        return len(self._open)

    @property
    def costs(self) -> tuple[float | None, float | None]:
        """For how long the last save held up the training, and then took to be durable; seconds."""
        return self._stall, self._persist

    def status(self) -> dict[str, Any]:
        """Return what is known, see ``Run.status``."""
        with self._changed:
            return {
                **self._last,
                "pending": sorted(entry.save.step for entry in self._open.values()),
                "failures": self._failures,
                "error": "" if self._error is None else str(self._error),
                "stall": self._stall,
                "persist": self._persist,
                "sent": self._sent,
            }

    def check(self) -> None:
        """Raise ``SaveFailedError`` if too many saves failed, ``FencedError`` if none counts."""
        with self._changed:
            if self._fenced is not None:
                raise FencedError(self._fenced.message, hint=self._fenced.hint)
            limit = 1 if self._raises else self._max_failures
            if self._error is not None and self._failures >= limit:
                failures, self._failures = self._failures, 0
                raise SaveFailedError(
                    f"{failures} saves of {self._run} in a row failed: {self._error.message}",
                    hint=self._error.hint,
                ) from self._error

    # What happens, in order.

    def add(self, save: Save, began: float) -> None:
        """Take note that ``save`` begins."""
        with self._changed:
            self._open[str(save.checkpoint)] = _Entry(save, began)
            self._newest, self._lost = save.checkpoint, None

    def forget(self, save: Save) -> None:
        """Take note that ``save`` was never staged."""
        with self._changed:
            self._open.pop(str(save.checkpoint), None)

    def staged(self, save: Save, done: Future[None]) -> None:
        """Take note that the copy is done, or failed."""
        error = done.exception()
        if error is None:
            self._last["staged"] = save.step
            save.staged.set_result(save.checkpoint)
            return
        self.forget(save)
        for future in (save.staged, save.local, save.durable):
            future.set_exception(error)
        if isinstance(error, EnvstoreError):
            self.failed(save.step, error)

    def stalled(self, seconds: float) -> None:
        """Take note for how long the training was held up."""
        self._stall = seconds

    def failed(self, step: int, error: EnvstoreError) -> None:
        """Count a save that failed."""
        with self._changed:
            self._failures += 1
            self._error = error
            self._changed.notify_all()
        _log.warning("%s: step %d is not saved: %s", self._run, step, error)

    def skipped(self, step: int) -> None:
        """Count a save that was left out, if that is because others fail."""
        with self._changed:
            stuck = any(entry.failures for entry in self._open.values())
            error = self._error
        if stuck and error is not None:
            self.failed(step, error)
        else:
            _log.warning(
                "%s: step %d is left out: earlier ones are still being uploaded", self._run, step
            )

    def heard(self, message: Mapping[str, Any]) -> None:
        """Take note of what the persister says."""
        said, name = message.get("say"), message.get("id")
        with self._changed:
            entry = self._open.get(name) if isinstance(name, str) else None
            if entry is None:
                return
            if said == "local" and not entry.save.local.done():
                self._last["local"] = entry.save.step
                entry.save.local.set_result(entry.save.checkpoint)
            elif said == "durable":
                self._durable(str(name), entry, message)
            elif said == "failed":
                self._upload_failed(str(name), entry, message)
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Wait until nothing is pending.

        Raises ``SaveFailedError`` once uploads have failed ``max_failures`` times in a row
        meanwhile, or if the newest save was given up; ``TimeoutError``.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._attempts = 0
            while self._open:
                if self._fenced is not None or (
                    self._error is not None and self._attempts >= self._max_failures
                ):
                    break
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    steps = sorted(entry.save.step for entry in self._open.values())
                    raise TimeoutError(f"steps {steps} of {self._run} are not durable yet")
                self._changed.wait(left)
            if self._open and self._fenced is None and self._error is not None:
                raise SaveFailedError(
                    f"{self._run}: what was saved is not in the store: {self._error.message}",
                    hint="its memory is kept and the persister goes on trying",
                ) from self._error
            if self._lost is not None:
                lost, self._lost = self._lost, None
                raise SaveFailedError(
                    f"{self._run}: the newest save is lost: {lost.message}", hint=lost.hint
                ) from lost
        self.check()

    def _durable(self, name: str, entry: _Entry, message: Mapping[str, Any]) -> None:
        del self._open[name]
        now = time.monotonic()
        self._last["durable"] = entry.save.step
        self._persist = now - entry.began
        self._failures = self._attempts = 0
        self._error = None
        sent = message.get("sent")
        self._sent += sent if isinstance(sent, int) else 0
        for future in (entry.save.local, entry.save.durable):
            if not future.done():
                future.set_result(entry.save.checkpoint)

    def _upload_failed(self, name: str, entry: _Entry, message: Mapping[str, Any]) -> None:
        error = _error_of(message)
        entry.failures += 1
        if entry.failures == 1:
            self._failures += 1
            _log.warning("%s: step %d is not uploaded: %s", self._run, entry.save.step, error)
        self._error = error
        if message.get("final") is not True:
            self._attempts += 1
            return
        del self._open[name]
        if entry.save.checkpoint == self._newest:
            self._lost = error
        if isinstance(error, FencedError):
            self._fenced = error
        for future in (entry.save.local, entry.save.durable):
            if not future.done():
                future.set_exception(error)


def _error_of(message: Mapping[str, Any]) -> EnvstoreError:
    """Return the error that the persister tells of, of its own kind if that is one of ours."""
    kind = str(message.get("kind"))
    found = getattr(errors, kind, None) or getattr(general, kind, None)
    if not (isinstance(found, type) and issubclass(found, EnvstoreError)):
        found = CheckpointError
    hint = message.get("hint")
    return found(str(message.get("error")), hint=hint if isinstance(hint, str) else None)
