"""Hugging Face ``Trainer``: its checkpoint directories as checkpoints of a run.

saves = EnvstoreCallback("team/llm")
trainer = Trainer(..., callbacks=[saves])
trainer.train(resume_from_checkpoint=saves.latest_dir(args.output_dir))
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from envstore.checkpoint.adapters.background import BackgroundSaves
from envstore.checkpoint.adapters.completeness import (
    Candidate,
    find_candidates,
    metrics_of,
    signature_of,
    what_lacks,
)
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.errors import CheckpointError
from envstore.checkpoint.identity import initialised_group
from envstore.checkpoint.policies import Policy

_NAME = re.compile(r"checkpoint-\d{1,12}")


class EnvstoreCallback(TrainerCallback):
    """Saves every checkpoint of a ``Trainer`` to ``run``, while the training goes on.

    ``run``, ``store`` and ``keep`` are those of ``DirectoryRun``; ``fresh`` lets a training begin
    anew although the run has checkpoints, which then do not count any more. The metrics logged at
    the step come with it, for ``best(...)``. Rank 0 saves, once all ranks have written their files;
    directories that ``save_total_limit`` removes meanwhile are saved all the same. What goes
    wrong is logged; the end of the training waits, and raises if the last checkpoint was not
    saved. If the program is killed before a checkpoint was saved, the next start saves it.
    """

    def __init__(
        self,
        run: str,
        store: str | None = None,
        *,
        keep: Policy | None = None,
        fresh: bool = False,
    ) -> None:
        self.run = DirectoryRun(run, store, keep=keep)
        self._saves = BackgroundSaves(self.run)
        self._fresh = fresh

    def latest_dir(self, output_dir: str | os.PathLike[str]) -> str | None:
        """Return the directory to resume from, below ``output_dir``; ``None`` on a first start.

        It is the newest checkpoint of the run, written there unless it is there already; a newer
        one that is whole on this disk is saved first. All ranks of a node may call it at once.
        Give the result to ``Trainer.train(resume_from_checkpoint=...)``. Raises as
        ``DirectoryRun.restore``.
        """
        top = Path(output_dir)
        top.mkdir(parents=True, exist_ok=True)
        with _locked(top):
            self._save_missed(top)
            step = self.run.latest()
            if step is None:
                return None
            path = top / f"checkpoint-{step}"
            commit = self.run.run.find(step)
            note = top / f".envstore-checkpoint-{step}"
            if not self._is_there(path, step, note, str(commit.checkpoint)):
                self.run.restore(path, step, overwrite=True)
                note.write_text(f"{commit.checkpoint} {signature_of(path)}")
            return str(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say from where the run goes on: what came after no longer counts.

        Raises ``CheckpointError`` if there are checkpoints and none was resumed from.
        """
        if not state.is_world_process_zero:
            return
        top, step = Path(args.output_dir), int(state.global_step)
        if step == 0:
            latest = self.run.latest()
            if latest is not None and not self._fresh:
                raise CheckpointError(
                    f"{self.run.name} has checkpoints, the newest of step {latest}, and the "
                    "training begins anew",
                    hint="train(resume_from_checkpoint=callback.latest_dir(args.output_dir)), or "
                    "EnvstoreCallback(fresh=True) to leave them behind",
                )
            self.run.begin(None)
            return
        with _locked(top):
            self._save_missed(top, only=step)
        # Resumed from elsewhere: what the run has up to there is what it came from.
        steps = [commit.step for commit in self.run.run.commits() if commit.step <= step]
        self.run.begin(steps[-1] if steps else None)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save what the trainer has just written."""
        group = initialised_group()
        if group is not None and group.get_world_size() > 1:
            group.barrier()  # each rank writes the state of its random generators
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for candidate in _candidates(path.parent):
                if candidate.path == path:
                    self._saves.submit(state.global_step, path, metrics_of(candidate))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait until all is durable. Raises ``SaveFailedError`` if the last checkpoint is not."""
        self._saves.wait()

    def close(self) -> None:
        """Wait for what is being saved and release connections."""
        self._saves.close()
        self.run.close()

    def _save_missed(self, top: Path, only: int | None = None) -> None:
        """Save the whole checkpoints below ``top`` that are newer than the run's, or ``only``."""
        latest = self.run.latest()
        for candidate in _candidates(top):
            wanted = candidate.step == only if only is not None else True
            newer = latest is None or candidate.step > latest
            if wanted and newer and what_lacks(candidate) is None:
                self.run.save(
                    candidate.step,
                    candidate.path,
                    metrics=metrics_of(candidate),
                    source=candidate.signature,
                )

    def _is_there(self, path: Path, step: int, note: Path, checkpoint: str) -> bool:
        if not path.is_dir():
            return False
        signature = signature_of(path)
        if self.run.find_source(step, signature) is not None:
            return True
        try:
            return note.read_text() == f"{checkpoint} {signature}"
        except FileNotFoundError:
            return False


def _candidates(top: Path) -> list[Candidate]:
    return [one for one in find_candidates(top) if _NAME.fullmatch(one.path.name)]


@contextmanager
def _locked(top: Path) -> Iterator[None]:
    """Let one process of this node at a time look at ``top``."""
    top.mkdir(parents=True, exist_ok=True)
    fd = os.open(top / ".envstore-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
