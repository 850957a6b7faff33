"""What of a run is stored: the part of ``Run`` that only looks, and pins."""

from __future__ import annotations

import builtins

from envstore.checkpoint.errors import NoCheckpointError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.options import MAX_STEP, check_pin, whole
from envstore.checkpoint.protocol import RunStore
from envstore.checkpoint.records import Commit
from envstore.errors import CorruptError


class Stored:
    """The committed checkpoints of a run. All methods raise the errors of the store."""

    def _runs(self) -> RunStore:
        raise NotImplementedError

    def latest(self) -> int | None:
        """Return the newest step that is committed, ``None`` if there is none."""
        commit = self._runs().latest()
        return None if commit is None else commit.step

    def list(self) -> builtins.list[Commit]:
        """Return the checkpoints that count, ascending."""
        return self._runs().commits()

    def info(self, step: int) -> Commit:
        """Return what is known of ``step``. Raises ``NoCheckpointError``."""
        return self._find(step)

    def pin(self, step: int, reason: str = "pinned") -> None:
        """Keep ``step`` whatever the policy says. Raises ``NoCheckpointError``."""
        self._runs().pin(self._find(step), check_pin(reason))

    def unpin(self, step: int) -> None:
        """Let the policy decide again. Raises ``NoCheckpointError``."""
        self._runs().unpin(self._find(step).checkpoint)

    def verify(self, step: int | None = None) -> Commit:
        """Read all of ``step``, by default the newest, from the store; returns it if it is sound.

        Raises ``CorruptError`` naming what is damaged or missing, ``NoCheckpointError``.
        """
        from envstore.store.verify import verify

        runs = self._runs()
        commit = runs.latest() if step is None else self._find(step)
        if commit is None:
            raise NoCheckpointError(f"{runs.run} has no checkpoint yet")
        with runs.lease(commit):
            name = f"{runs.run}:step-{commit.step}"
            report = verify(runs.repository, [(name, commit.snapshot)], read_data=True)
        if report.problems:
            found = report.problems[0]
            raise damaged(runs, commit.checkpoint, CorruptError(f"{found.object}: {found.reason}"))
        return commit

    def _find(self, step: int) -> Commit:
        return self._runs().find(whole("step", step, 0, MAX_STEP))


def damaged(runs: RunStore, chosen: CheckpointId, error: CorruptError) -> CorruptError:
    """Return the error of a checkpoint that is damaged; it says which older one there is."""
    older = [commit.step for commit in runs.commits() if commit.checkpoint < chosen]
    hint = f"restore(state, step={older[-1]}) takes an older one" if older else None
    return CorruptError(f"step {chosen.step} of {runs.run} is damaged: {error.message}", hint=hint)
