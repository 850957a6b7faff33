"""Committing a stored tree as the checkpoint of a step, whoever stored it."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Mapping

from envstore.checkpoint.errors import RanksDisagreeError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.lineage import surroundings
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit, Part

_ATTEMPTS = 16


class Recorder:
    """Commits trees to one run, as a job of one rank. Of use to one thread at a time."""

    def __init__(self, run: RunStore) -> None:
        self._run = run
        self._lineage = surroundings(1, os.environ)
        self._epoch: int | None = None

    def within(self, run: RunStore) -> Recorder:
        """Return this recorder for the same run, in or out of a writer's session."""
        found = copy.copy(self)
        found._run = run
        return found

    def begin(self, resumed_from: CheckpointId | None, incarnation: str | None = None) -> None:
        """Begin an incarnation of the run. Without this, what is there is joined."""
        name = incarnation or secrets.token_hex(16)
        self._epoch = self._run.open_epoch(name, 1, lambda _: resumed_from).number

    def commit(
        self,
        step: int,
        snapshot: bytes,
        saved: str,
        *,
        size: int,
        sent: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> Commit:
        """Commit the tree of ``snapshot`` as ``step``; a step may be committed again.

        ``saved`` is when, RFC 3339 UTC. Raises ``FencedError``, ``RanksDisagreeError`` if others
        save the same step all the time, and the errors of the store.
        """
        epoch = self._joined()
        first = self._next_attempt(step, epoch)
        for attempt in range(first, first + _ATTEMPTS):
            checkpoint = CheckpointId(step, epoch, attempt)
            part = Part(
                checkpoint, 0, 1, snapshot, saved, size=size, sent=sent,
                metrics=dict(metrics or {}), lineage=self._lineage,
            )  # fmt: skip
            try:
                self._run.put_part(part)
            except RanksDisagreeError:
                continue  # another process saves the same step
            commit = self._run.try_commit(checkpoint)
            if commit is not None:
                return commit
        raise RanksDisagreeError(
            f"others save step {step} of {self._run.run} again and again",
            hint="give each job its own run",
        )

    def _joined(self) -> int:
        if self._epoch is None:
            epoch = self._run.epoch()
            if epoch is None:
                self.begin(None)
            else:
                self._epoch = epoch.number
        assert self._epoch is not None  # noqa: S101 - begin sets it
        return self._epoch

    def _next_attempt(self, step: int, epoch: int) -> int:
        known = [*self._run.commits(), *self._run.commits(fenced=True)]
        attempts = [
            commit.checkpoint.attempt
            for commit in known
            if (commit.step, commit.checkpoint.epoch) == (step, epoch)
        ]
        return max(attempts, default=-1) + 1
