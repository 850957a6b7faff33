"""torch.distributed.checkpoint on runs: ``dcp.save``, ``dcp.async_save`` and ``dcp.load``.

What is saved is an ordinary checkpoint of the run: staged in shared memory, uploaded by the
persister even if this process is killed, committed when all ranks' parts are there, mountable,
with a ``model.safetensors`` that any loader reads. What is loaded may have been saved by
``Run.save`` just as well, by any number of ranks.

    writer = EnvstoreWriter(run, step=100)
    dcp.save(state, storage_writer=writer)                # durable when it returns
    future = dcp.async_save(state, storage_writer=writer) # certain when it returns, then durable
    dcp.load(state, storage_reader=EnvstoreReader(run))   # the newest, or step=100
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from envstore.checkpoint.adapters.completeness import step_of
from envstore.checkpoint.adapters.dcp_metadata import Contents, read_contents
from envstore.checkpoint.arrays import Shard
from envstore.checkpoint.encoding import torch_dtype
from envstore.checkpoint.errors import CheckpointError, NoCheckpointError
from envstore.checkpoint.filling import Filler
from envstore.checkpoint.layout import Tree
from envstore.checkpoint.ledger import Save
from envstore.checkpoint.run import Run
from envstore.checkpoint.table import TensorRecord
from envstore.errors import UsageError

_OVERRIDES = ("lookup_object", "transform_object", "resolve_data")


class EnvstoreWriter(StorageWriter):
    """Saves the state of one step after the other as checkpoints of ``run``.

    ``step`` is the step to save: set it anew for each, or give ``checkpoint_id="step-100"`` to
    ``dcp.save``, or have an integer ``"step"`` in the state. Plain tensors are taken to be equal
    on all ranks, as DCP does; name their items in ``Run(replicated=)`` so that each is stored
    once. Planners that change what is saved are refused. All keys become text, as DCP makes them.
    """

    # What makes it an AsyncStager, so that ``dcp.async_save`` stages with it.
    _synchronize_after_execute = False

    def __init__(self, run: Run, step: int | None = None) -> None:
        """Save to ``run``, which the caller closes."""
        super().__init__()
        self.run = run
        self.step = step
        self._save_id = ""
        self._staged: deque[Save] = deque()
        self._checkpoint_id: str | None = None

    # AsyncStager.

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether there is anything to wait for after ``stage``: there is not."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the state to shared memory; on return it will be committed, whoever is killed."""
        self._staged.append(self.run.save(self._step(state_dict), state_dict))
        return state_dict

    def synchronize_staging(self) -> None:
        """Do nothing: ``stage`` has waited."""

    def close(self) -> None:
        """Do nothing: the run is the caller's."""

    # StorageWriter.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save. Raises ``UsageError`` if ``checkpoint_id`` holds no step."""
        self._save_id = str(uuid.uuid4())
        self._checkpoint_id = None if checkpoint_id is None else str(checkpoint_id)
        if checkpoint_id is not None:
            step = _named_step(checkpoint_id)
            if self._staged and self._staged[0].step != step:
                raise UsageError(
                    f"step {self._staged[0].step} was staged, and {checkpoint_id} is to be saved",
                    hint="set writer.step before dcp.async_save, which stages first",
                )
            self.step = step

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no rank is special."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return ``plan``."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return ``plans``."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save what was not staged yet, and wait until all ranks' parts are committed."""
        if self._staged:
            save = self._staged.popleft()
        else:
            state = _state_of(planner)
            save = self.run.save(self._step(state), state)
        save.durable.result()
        done: Future[list[WriteResult]] = Future()
        where = str(save.checkpoint)
        done.set_result([WriteResult(item.index, _size(item), where) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the commit is made by whoever sees all parts."""

    def storage_meta(self) -> StorageMeta | None:
        """Return what names this save."""
        return StorageMeta(checkpoint_id=self._checkpoint_id, save_id=self._save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` holds a step, as ``step-100`` does."""
        return step_of(os.path.basename(str(checkpoint_id))) is not None

    def __reduce__(self) -> Any:
        raise UsageError(
            "a run cannot be sent to another process",
            hint="leave AsyncCheckpointerType.THREAD: uploading is a process of its own already",
        )

    def _step(self, state: dict[str, Any]) -> int:
        step = self.step if self.step is not None else state.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UsageError(
                "nothing says which step is saved",
                hint='EnvstoreWriter(run, step=100), or an int "step" in the state',
            )
        return step


class EnvstoreReader(StorageReader):
    """Loads a checkpoint of ``run``: the newest, or that of ``step`` or ``checkpoint_id``.

    Loading is restoring: the run goes on from there, and all its ranks load the same step. Only
    the slices that are needed are read, in parallel, each byte verified. Pickled objects are
    refused unless ``trusted``.
    """

    def __init__(self, run: Run, step: int | None = None, *, trusted: bool = False) -> None:
        super().__init__()
        self.run = run
        self.step = step
        self._given = step
        self._trusted = trusted
        self._load_id = ""
        self._opened = contextlib.ExitStack()
        self._tree: Tree | None = None
        self._contents: Contents | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load. Raises ``UsageError`` if ``checkpoint_id`` holds no step."""
        self.close()
        self._load_id = str(uuid.uuid4())
        self.step = self._given
        if checkpoint_id is not None and str(checkpoint_id) != "latest":
            self.step = _named_step(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """Return what the checkpoint holds. Raises ``NoCheckpointError``, ``CorruptError``."""
        self.close()
        found = self._opened.enter_context(self.run.opened(self.step))
        if found is None:
            raise NoCheckpointError(f"{self.run.name} has no checkpoint yet")
        checkpoint, self._tree = found
        self.step = checkpoint.step
        self._contents = read_contents(
            self._tree, self.run.rank, self.run.world_size, trusted=self._trusted
        )
        metadata = self._contents.metadata
        metadata.storage_meta = StorageMeta(
            checkpoint_id=f"step-{checkpoint.step}", load_id=self._load_id
        )
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: ``read_metadata`` has opened the checkpoint on this rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return ``plan``."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return ``plans``."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all that ``plan`` needs straight into the tensors, then tell ``planner``."""
        if self._tree is None or self._contents is None:
            raise UsageError("read_metadata comes before read_data")
        try:
            self._fill(plan.items, planner, self._tree, self._contents)
        finally:
            self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        """Let go of what is open. Idempotent."""
        self._tree = None
        self._contents = None
        self._opened.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` holds a step, or is ``latest``."""
        return str(checkpoint_id) == "latest" or EnvstoreWriter.validate_checkpoint_id(
            checkpoint_id
        )

    def _fill(
        self, items: Sequence[ReadItem], planner: LoadPlanner, tree: Tree, contents: Contents
    ) -> None:
        filler = Filler()
        targets: list[tuple[ReadItem, torch.Tensor, torch.Tensor]] = []
        # The planner may not be called from two threads: what is parallel is the reading.
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                data = io.BytesIO()
                torch.save(contents.values[item.storage_index.fqn](), data)
                data.seek(0)
                planner.load_bytes(item, data)
                continue
            target = planner.resolve_tensor(item).detach()
            record = contents.boxes[item.storage_index]
            filled = _fitting(item, record, target)
            filler.add([record], _slice(item, record, filled))
            targets.append((item, target, filled))
        filler.read(tree)
        for item, target, filled in targets:
            if filled is not target:
                target.copy_(filled)
            planner.commit_tensor(item, target)


def _fitting(item: ReadItem, record: TensorRecord, target: torch.Tensor) -> torch.Tensor:
    """Return ``target``, or another tensor if its elements are not what is stored."""
    if target.size() != item.lengths:
        raise CheckpointError(
            f"{item.dest_index.fqn} is to be loaded as {list(item.lengths)} and the planner "
            f"gives {list(target.size())}"
        )
    dtype = torch_dtype(record.dtype)
    if target.dtype == dtype and type(target) is torch.Tensor:
        return target
    return torch.empty(tuple(item.lengths), dtype=dtype)


def _slice(item: ReadItem, record: TensorRecord, target: torch.Tensor) -> Shard:
    offsets = tuple(
        start + at for start, at in zip(record.offsets, item.storage_offsets, strict=True)
    )
    return Shard(
        "tensor", target, record.dtype, record.shape, offsets, tuple(item.lengths), target.nbytes
    )


def _state_of(planner: SavePlanner) -> dict[str, Any]:
    """Return the nested state that ``planner`` was given. Raises ``CheckpointError``."""
    changed = [
        name
        for name in _OVERRIDES
        if not isinstance(planner, DefaultSavePlanner)
        or getattr(type(planner), name) is not getattr(DefaultSavePlanner, name)
    ]
    if changed:
        raise CheckpointError(
            f"{type(planner).__name__} changes what is saved ({', '.join(changed)})",
            hint='save with checkpoint_id="envstore://namespace/run/step-100" and no writer',
        )
    if not planner.flatten_state_dict:
        return dict(planner.state_dict)
    state: dict[str, Any] = unflatten_state_dict(planner.state_dict, planner.mappings)
    return state


def _size(item: Any) -> int:
    size = item.tensor_storage_size()
    return 0 if size is None else int(size)


def _named_step(checkpoint_id: str | os.PathLike[str]) -> int:
    step = step_of(os.path.basename(str(checkpoint_id)))
    if step is None:
        raise UsageError(f"{checkpoint_id} holds no step", hint="write it as step-100")
    return step
