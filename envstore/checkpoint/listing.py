"""Which runs a store holds checkpoints of."""

from __future__ import annotations

from dataclasses import dataclass

from envstore.checkpoint.bodies import parse_id
from envstore.checkpoint.layout import RunName
from envstore.errors import UsageError
from envstore.store.objects.base import ObjectStore

_DEPTH = 5


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run: how many commits it has, and the last step of them, whether they count or not."""

    name: RunName
    commits: int
    last_step: int


def list_runs(objects: ObjectStore) -> list[ListedRun]:
    """Return the runs that have a commit, by name. One listing of all objects of all runs."""
    steps: dict[RunName, list[int]] = {}
    for info in objects.list("runs/"):
        parts = info.key.split("/")
        commit = parse_id(parts[-1])
        if len(parts) != _DEPTH or parts[3] != "commits" or commit is None:
            continue
        try:
            name = RunName.parse(f"{parts[1]}/{parts[2]}")
        except UsageError:
            continue  # nothing that we wrote
        steps.setdefault(name, []).append(commit.step)
    return [ListedRun(name, len(found), max(found)) for name, found in sorted(steps.items())]
