"""Directories as checkpoints of a run, for any framework that writes its own.

A directory is stored as a push stores it (safetensors files cut along their tensors, chunks shared
with all that the store holds) and committed as a checkpoint of the run: ``latest``, ``ls``,
retention, pins, mounts and pulls know it as any other.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from envstore.checkpoint.adapters.recording import Recorder
from envstore.checkpoint.adapters.storing import store_directory
from envstore.checkpoint.opening import open_repository
from envstore.checkpoint.places import find_place
from envstore.checkpoint.policies import Policy, encode_keep
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.checkpoint.retention import apply
from envstore.errors import UsageError
from envstore.store.pull import pull
from envstore.store.source import ChangedError

Step = int | Literal["latest"]


class DirectoryRun:
    """A run whose checkpoints are directories. Safe to share between threads; one saves at a time.

    ``keep`` is a retention policy (``policies``), applied after each save; by default all is kept.
    """

    def __init__(self, run: str, store: str | None = None, *, keep: Policy | None = None) -> None:
        """Open ``[namespace/]run`` in ``store``, or ``URL#[namespace/]run``; else ``ENVSTORE_URL``.

        The user's own store, if nothing names another, is made if it is not there. Raises
        ``UsageError``, ``NotFoundError`` (no such store) and the errors of the store.
        """
        self._keep = encode_keep(keep)
        place = find_place(run, store, os.environ)
        self.name = place.run
        self._repository = open_repository(place)
        self.run = RunStore(self._repository, place.run)
        self._recorder = Recorder(self.run)
        self._saving = threading.Lock()

    def begin(self, resumed_from: int | None, *, incarnation: str | None = None) -> None:
        """Say that a program has started, from the checkpoint of a step or from nothing.

        From now on what earlier incarnations save, or saved after that step, no longer counts.
        Without this, what is saved joins the incarnation that is there. Raises
        ``NoCheckpointError`` if the run has no such step.
        """
        chosen = None if resumed_from is None else self.run.find(resumed_from).checkpoint
        self._recorder.begin(chosen, incarnation)

    def save(
        self,
        step: int,
        path: str | os.PathLike[str],
        *,
        metrics: Mapping[str, float] | None = None,
        source: str = "",
        settled: Callable[[], bool] = lambda: True,
    ) -> Commit:
        """Store the directory (or file) at ``path`` as the checkpoint of ``step``; then durable.

        The same tree saved again for the same step is the checkpoint that is there. Nothing may
        write to it meanwhile: raises ``ChangedError`` if something does, or if ``settled`` says so
        before the commit. ``source`` is kept for ``find_source``. Raises ``FencedError`` if a
        newer incarnation has begun, and the errors of the store; nothing is committed then.
        """
        if isinstance(step, bool) or step < 0:
            raise UsageError(f"{step!r} is not a step", hint="a whole number, from 0 on")
        with self._saving:
            return self._save(step, Path(path), dict(metrics or {}), source, settled)

    def restore(
        self, path: str | os.PathLike[str], step: Step = "latest", *, overwrite: bool = False
    ) -> int | None:
        """Write a checkpoint's directory to ``path``, whole or not at all; returns its step.

        ``None`` if ``"latest"`` is asked for and there is none. ``path`` must be absent or empty
        unless ``overwrite``. Raises ``NoCheckpointError``, ``UsageError``, ``NoSpaceError`` and
        the errors of the store.
        """
        commit = self.run.latest() if step == "latest" else self.run.find(step)
        if commit is None:
            return None
        with self.run.lease(commit):
            destination = Path(os.path.abspath(path))
            if destination.is_dir() and any(destination.iterdir()):
                if not overwrite:
                    raise UsageError(
                        f"{destination} is not empty", hint="overwrite=True replaces what is there"
                    )
                self._replace(commit, destination)
            else:
                pull(self._repository, commit.snapshot, destination)
        return commit.step

    def latest(self) -> int | None:
        """Return the last step that is committed, ``None`` if there is none."""
        commit = self.run.latest()
        return None if commit is None else commit.step

    def find_source(self, step: int, source: str) -> Commit | None:
        """Return the commit of ``step`` that was saved from ``source``, if there is one."""
        for commit in self.run.commits():
            if commit.step == step:
                snapshot = self._repository.snapshot(commit.snapshot)
                if snapshot.attributes.get("source") == source:
                    return commit
        return None

    def close(self) -> None:
        """Release connections."""
        self._repository.close()

    def __enter__(self) -> DirectoryRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _save(
        self,
        step: int,
        path: Path,
        metrics: dict[str, float],
        source: str,
        settled: Callable[[], bool],
    ) -> Commit:
        with self.run.writing(f"save of step {step}") as run:
            recorder = self._recorder.within(run)
            commits = run.commits()
            same = [commit for commit in commits if commit.step == step]
            bases = tuple(commit.snapshot for commit in (*commits[-1:], *same[-1:]))
            saved = datetime.now(UTC).isoformat(timespec="microseconds")
            stored = store_directory(
                run.repository,
                path,
                bases=tuple(dict.fromkeys(bases)),
                attributes={
                    "run": str(self.name),
                    "step": str(step),
                    **({"source": source} if source else {}),
                },
            )
            if not settled():
                raise ChangedError(os.fsencode(path))
            if same and run.repository.snapshot(same[-1].snapshot).manifest == stored.manifest:
                return same[-1]
            commit = recorder.commit(
                step,
                stored.snapshot,
                saved,
                size=stored.logical_bytes,
                sent=stored.sent_bytes,
                metrics=metrics,
            )
        # With the epoch that it may have joined.
        self._recorder = recorder.within(self.run)
        self._retain()
        return commit

    def _retain(self) -> None:
        if self._keep:
            apply(self.run, self._keep)

    def _replace(self, commit: Commit, destination: Path) -> None:
        aside = destination.with_name(f".envstore-{secrets.token_hex(8)}")
        new, old = aside.with_suffix(".new"), aside.with_suffix(".old")
        try:
            pull(self._repository, commit.snapshot, new, prefix=os.fsencode(destination))
            destination.rename(old)
            try:
                new.rename(destination)
            except BaseException:
                old.rename(destination)
                raise
        finally:
            for path in (new, old):
                shutil.rmtree(path, ignore_errors=True)


def save_dir(
    run: str,
    step: int,
    path: str | os.PathLike[str],
    *,
    store: str | None = None,
    metrics: Mapping[str, float] | None = None,
    keep: Policy | None = None,
) -> Commit:
    """Store the directory at ``path`` as a checkpoint of ``run``; see ``DirectoryRun``."""
    with DirectoryRun(run, store, keep=keep) as opened:
        return opened.save(step, path, metrics=metrics)


def restore_dir(
    path: str | os.PathLike[str],
    run: str,
    step: Step = "latest",
    *,
    store: str | None = None,
    overwrite: bool = False,
) -> int | None:
    """Write a checkpoint of ``run`` to the directory ``path``; see ``DirectoryRun.restore``."""
    with DirectoryRun(run, store) as opened:
        return opened.restore(path, step, overwrite=overwrite)
