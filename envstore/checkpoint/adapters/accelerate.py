"""Hugging Face Accelerate: ``save_state`` and ``load_state`` on a run.

saves = attach(accelerator, "team/llm")
accelerator.save_state("out/checkpoint_100")      # saved to the run while training goes on
accelerator.load_state(saves.latest_dir("out"))
saves.close()
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from envstore.checkpoint.adapters.background import BackgroundSaves
from envstore.checkpoint.adapters.completeness import step_of
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.policies import Policy
from envstore.errors import UsageError


class Attached:
    """An accelerator whose saved states are checkpoints of a run. Call from its thread."""

    def __init__(self, accelerator: Any, run: DirectoryRun) -> None:
        """Replace ``accelerator.save_state``; use ``attach``."""
        self.run = run
        self._accelerator = accelerator
        self._saves = BackgroundSaves(run)
        self._save_state = accelerator.save_state
        accelerator.save_state = self._save

    def latest_dir(self, directory: str | os.PathLike[str], step: int | None = None) -> str | None:
        """Write the newest checkpoint, or that of ``step``, below ``directory`` for ``load_state``.

        ``None`` on a first start. All ranks must call it. The run goes on from there. Raises as
        ``DirectoryRun.restore``.
        """
        found = self.run.latest() if step is None else self.run.run.find(step).step
        if self._accelerator.is_main_process:
            self.run.begin(found)
        self._accelerator.wait_for_everyone()
        if found is None:
            return None
        path = Path(directory) / f"checkpoint_{found}"
        if self._accelerator.is_local_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.run.restore(path, found, overwrite=True)
        self._accelerator.wait_for_everyone()
        return str(path)

    def wait(self) -> None:
        """Return when all is durable. Raises ``SaveFailedError`` if the last save is not."""
        self._saves.wait()

    def close(self) -> None:
        """Wait, give the accelerator its own ``save_state`` back, and release connections."""
        self._accelerator.save_state = self._save_state
        self._saves.close()
        self.run.close()

    def _save(self, output_dir: str | None = None, *args: Any, **options: Any) -> Any:
        path = self._save_state(output_dir, *args, **options)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            step = step_of(Path(path).name)
            if step is None:
                raise UsageError(
                    f"{path} holds no step", hint='call save_state("checkpoint_100") with one'
                )
            self._saves.submit(step, Path(path))
        return path


def attach(
    accelerator: Any, run: str, store: str | None = None, *, keep: Policy | None = None
) -> Attached:
    """Have ``accelerator.save_state`` save to ``run`` too, while the training goes on.

    ``run``, ``store`` and ``keep`` are those of ``DirectoryRun``. The directories' names must hold
    the step: ``checkpoint_100``, as Accelerate's automatic names do.
    """
    return Attached(accelerator, DirectoryRun(run, store, keep=keep))
