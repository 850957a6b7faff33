"""Saving directories while the program that wrote them goes on, and may remove them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from envstore.checkpoint.adapters.completeness import signature_of
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.errors import FencedError, SaveFailedError
from envstore.checkpoint.records import Commit
from envstore.errors import EnvstoreError
from envstore.store.source import ChangedError

_log = logging.getLogger("envstore.checkpoint")

_MAX_WAITING = 2
_TRIES = 4


class BackgroundSaves:
    """Saves directories to ``run`` one after the other, on a thread. Call from one thread.

    A directory is kept by second names of its files until it is saved: no bytes are copied, and
    whoever wrote it may remove it or go on. Files that are there must not be written to again.
    A program that ends without ``wait`` or ``close`` loses what is not saved, and is told so.
    """

    def __init__(self, run: DirectoryRun) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save-directory")
        self._waiting: deque[Future[Commit]] = deque()
        self._error: EnvstoreError | None = None
        atexit.register(self._at_exit)

    def submit(self, step: int, path: Path, metrics: Mapping[str, float] | None = None) -> None:
        """Begin to save ``path`` as ``step``; waits for earlier saves if two are waiting.

        What goes wrong is logged, and raised by ``wait`` if no later save succeeds. Raises
        ``FencedError`` if an earlier save found that this job was replaced.
        """
        self._collect(_MAX_WAITING - 1)
        source = signature_of(path)
        clone = _clone(path)
        if clone is None:
            self._waiting.append(self._pool.submit(self._save, step, path, None, metrics, source))
            self._collect(0)
            return
        self._waiting.append(self._pool.submit(self._save, step, clone, clone, metrics, source))

    def wait(self) -> None:
        """Return when everything is durable. Raises ``SaveFailedError`` if the last one is not."""
        self._collect(0)
        error, self._error = self._error, None
        if error is not None:
            raise SaveFailedError(
                f"the last checkpoint was not saved: {error.message}", hint=error.hint
            )

    def close(self) -> None:
        """Wait, without raising what went wrong, and end the thread."""
        with contextlib.suppress(FencedError):
            self._collect(0)
        self._pool.shutdown()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        # Saving takes threads, and a program that is ending gets none.
        self._pool.shutdown()
        lost = sum(future.exception() is not None for future in self._waiting)
        if lost:
            _log.error(
                "%d checkpoints of %s were not saved, as the program ended before "
                "(call wait() or close() at its end)",
                lost,
                self._run.name,
            )

    def _collect(self, left: int) -> None:
        while len(self._waiting) > left:
            try:
                self._waiting.popleft().result()
                self._error = None
            except FencedError:
                raise
            except EnvstoreError as error:
                _log.warning("a checkpoint was not saved: %s", error)
                self._error = error

    def _save(
        self,
        step: int,
        path: Path,
        clone: Path | None,
        metrics: Mapping[str, float] | None,
        source: str,
    ) -> Commit:
        try:
            for _ in range(_TRIES - 1):
                # Losing its first name changes when a file's inode changed, but not its content.
                with contextlib.suppress(ChangedError):
                    return self._run.save(step, path, metrics=metrics, source=source)
            return self._run.save(step, path, metrics=metrics, source=source)
        finally:
            if clone is not None:
                shutil.rmtree(clone, ignore_errors=True)


def _clone(path: Path) -> Path | None:
    """Return a tree of second names of the files below ``path``; ``None`` where there are none."""
    clone = path.with_name(f".envstore-{secrets.token_hex(8)}")
    try:
        shutil.copytree(path, clone, symlinks=True, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(clone, ignore_errors=True)
        return None
    return clone
