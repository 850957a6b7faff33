"""Lightning: ``Trainer(plugins=[EnvstoreCheckpointIO("team/llm")])``.

What Lightning saves is an ordinary checkpoint of the run: staged in shared memory, uploaded by the
persister even if the trainer is killed, its weights as ``model.safetensors``. At the path where
Lightning expects a file lies a small one that names the checkpoint, so that ``ckpt_path="last"``,
``best_model_path`` and ``save_top_k`` work as ever. Strategies that shard (FSDP, ModelParallel) do
not ask plugins but write directories on a local disk: ``watching`` saves those.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from envstore.checkpoint.adapters.completeness import step_of
from envstore.checkpoint.adapters.directory import DirectoryRun
from envstore.checkpoint.bodies import parse_id
from envstore.checkpoint.errors import NoCheckpointError
from envstore.checkpoint.layout import CheckpointId
from envstore.checkpoint.ledger import Save
from envstore.checkpoint.run import Run
from envstore.errors import CorruptError, UsageError

# Lightning is there under two names, each with classes of its own.
if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    _CheckpointIO: Any = importlib.import_module("lightning_fabric.plugins").CheckpointIO
else:
    _CheckpointIO = importlib.import_module("lightning.fabric.plugins").CheckpointIO

_WEIGHTS, _ITEM = "state_dict", "model"
_MAX_POINTER = 4096
_POINTER = "envstore checkpoint"

# A process trains with one Trainer after the other: the open run of each name, of the last one.
_open_runs: dict[str, Run] = {}


class EnvstoreCheckpointIO(_CheckpointIO):
    """Saves to, and loads from, the run ``run``; options are those of ``Run``.

    Saving returns once the state is in shared memory; ``teardown`` waits until all is durable.
    Objects that JSON cannot say are loaded with ``weights_only=False`` alone. Of several plugins
    of one run in a process the last one that is used has it; those before wait for their saves.
    """

    def __init__(self, run: str, store: str | None = None, **options: Any) -> None:
        # Lightning saves on one rank, whatever their number.
        self._make = partial(Run, run, store, rank=0, world_size=1, **options)
        self._name, self._store = run, store
        self._run: Run | None = None
        self._newest: Save | None = None
        self._saves: dict[CheckpointId, Save] = {}
        self._removals: list[CheckpointId] = []

    @property
    def run(self) -> Run:
        """The run, opened when it is first needed. Raises as ``Run.wait`` for a plugin before."""
        if self._run is None or _open_runs.get(self._key(self._run)) is not self._run:
            opened = self._make()
            before = _open_runs.pop(self._key(opened), None)
            if before is not None:
                with before:  # waits, and closes: one of a process may stage
                    pass
            _open_runs[self._key(opened)] = self._run = opened
        return self._run

    def latest_path(self) -> str | None:
        """Return a ``ckpt_path`` for the run's newest checkpoint, ``None`` on a first start.

        For a node without the files of the one before.
        """
        step = self.run.latest()
        return None if step is None else f"{self.run.name}/step={step}.ckpt"

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save ``checkpoint`` as its ``global_step``, and name it in a small file at ``path``.

        Raises what ``Run.save`` does.
        """
        if storage_options is not None:
            raise TypeError("EnvstoreCheckpointIO takes no storage_options")
        step = checkpoint.get("global_step", step_of(Path(path).name))
        if not isinstance(step, int):
            raise UsageError(f"{path}: nothing says which step is saved")
        save = self.run.save(step, _renamed(checkpoint, _WEIGHTS, _ITEM))
        self._newest = self._saves[save.checkpoint] = save
        with contextlib.suppress(FileNotFoundError, CorruptError):
            self._forget(_read_pointer(Path(path)))  # what is written over, as last.ckpt is
        _write_pointer(Path(path), self.run, save.checkpoint)
        self._remove_due()

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return what was saved at ``path``, or as the step that its name holds.

        Raises ``NoCheckpointError``, ``UntrustedObjectError`` (pickled objects without
        ``weights_only=False``) and what ``Run.restore`` does.
        """
        checkpoint = self._find(Path(path))
        if checkpoint in self._saves:
            self._saves[checkpoint].durable.result()
        state: dict[str, Any] = {}
        found = self.run.restore(state, checkpoint.step, trusted=weights_only is False)
        if found is None:
            raise NoCheckpointError(f"{self.run.name} has no checkpoint yet")
        state = _renamed(state, _ITEM, _WEIGHTS)
        if map_location is None or callable(map_location):
            return state  # in main memory, where Lightning wants it

        def move(value: Any) -> Any:
            return value.to(map_location) if isinstance(value, torch.Tensor) else value

        moved: dict[str, Any] = tree_map(move, state)
        return moved

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Forget the checkpoint at ``path``: removed once a newer one is durable."""
        with contextlib.suppress(FileNotFoundError):
            checkpoint = _read_pointer(Path(path))
            Path(path).unlink()
            self._forget(checkpoint)
        self._remove_due()

    def teardown(self) -> None:
        """Wait until all is durable. Raises ``SaveFailedError`` if something is not."""
        if self._run is not None:
            if _open_runs.get(self._key(self._run)) is self._run:
                self._run.wait()
            self._remove_due()

    @staticmethod
    def _key(run: Run) -> str:
        return f"{run.store}#{run.name}"

    def _find(self, path: Path) -> CheckpointId:
        pointed = _read_pointer(path) if path.is_file() else None
        if pointed is not None:
            return pointed
        step = step_of(path.name)
        if step is not None:
            return self.run.info(step).checkpoint
        raise NoCheckpointError(
            f"{path} is not there and its name holds no step",
            hint="ckpt_path=io.latest_path() takes the newest checkpoint of the run",
        )

    def _forget(self, checkpoint: CheckpointId | None) -> None:
        if checkpoint is not None:
            self._removals.append(checkpoint)

    def _remove_due(self) -> None:
        if not self._removals or self._newest is None or not self._newest.durable.done():
            return
        if self._newest.durable.exception() is not None:
            return
        due, self._removals = self._removals, []
        with DirectoryRun(self._name, self._store) as opened:
            for commit in opened.run.commits():
                if commit.checkpoint in due and commit.checkpoint != self._newest.checkpoint:
                    opened.run.remove(commit)
        for checkpoint in due:
            self._saves.pop(checkpoint, None)


def _renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return ``state`` with one key called otherwise, unless that name is taken."""
    if old not in state or new in state:
        return dict(state)
    return {new if key == old else key: value for key, value in state.items()}


def _write_pointer(path: Path, run: Run, checkpoint: CheckpointId) -> None:
    body = {"kind": _POINTER, "run": f"{run.store}#{run.name}", "checkpoint": str(checkpoint)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(json.dumps(body, indent=1) + "\n")
    partial.replace(path)


def _read_pointer(path: Path) -> CheckpointId | None:
    """Return the checkpoint that the file at ``path`` names, ``None`` if it is another file.

    Raises ``CorruptError`` if it names none.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_POINTER)
    if _POINTER.encode() not in data:
        return None
    try:
        found = parse_id(json.loads(data)["checkpoint"])
    except (ValueError, TypeError, KeyError):
        found = None
    if found is None:
        raise CorruptError(f"{path} names no checkpoint")
    return found
