"""The refs of a run: ``<run>:latest`` and ``<run>:step-<n>`` point at what is committed.

They let checkpoints be mounted, pulled and shown like any other tree. Nothing of a run depends on
them: they follow the commits, and whoever moves them looks at the commits after having read the
ref, so that of several who do, nobody moves one back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from envstore.checkpoint.layout import RunName
from envstore.checkpoint.records import Commit
from envstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from envstore.store.refs import Ref, RefName, list_refs, move_ref, try_read
from envstore.store.repository import Repository

LATEST = "latest"
_RACES = 8
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,11})")


def step_tag(step: int) -> str:
    """Return the tag under which a step is found."""
    return f"step-{step}"


class Names:
    """Moves the refs of one run. Safe to share between threads."""

    def __init__(
        self, repository: Repository, run: RunName, commits: Callable[[], Sequence[Commit]]
    ) -> None:
        """``commits`` lists what counts now, ascending, and is asked anew for each move."""
        self._repository = repository
        self._run = run
        self._commits = commits

    def follow(self, commits: Sequence[Commit], steps: Iterable[int]) -> list[str]:
        """Move ``latest`` and the refs of ``steps``, and create those of ``commits`` that lack.

        Returns warnings about refs that are somebody else's. One listing, and ``settle`` of these.
        """
        lacking = {step_tag(commit.step) for commit in commits} - self._tags()
        return self.settle(sorted({LATEST, *map(step_tag, steps), *lacking}))

    def stray(self, commits: Iterable[Commit]) -> list[str]:
        """Return the tags of steps that no commit is of any more. One listing."""
        steps = {step_tag(commit.step) for commit in commits}
        return sorted(tag for tag in self._tags() if _STEP.fullmatch(tag) and tag not in steps)

    def settle(self, tags: Iterable[str]) -> list[str]:
        """Make each of ``tags`` point where it should; returns warnings.

        For each, a request and the commits; two more for one that moves.
        Raises ``ConflictError`` if others keep moving one, and the errors of the store.
        """
        warnings = []
        for tag in tags:
            warning = self._settle(self._run.ref(tag), tag)
            if warning is not None:
                warnings.append(warning)
        return warnings

    def _settle(self, name: RefName, tag: str) -> str | None:
        objects = self._repository.objects
        for _ in range(_RACES):
            found = try_read(objects, name)
            commits = self._commits()
            target = _target(tag, commits)
            if found is None and target is None:
                return None
            if found is not None:
                if target is not None and found[0].snapshot == target.snapshot:
                    return None
                if not self._is_ours(found[0], commits):
                    return f"{name} is not a checkpoint of {self._run} and stays where it points"
            if target is None:
                objects.delete(name.key)
                # Deleting knows no condition: somebody may have moved it a moment before, and
                # then the next round finds a target.
                continue
            try:
                move_ref(objects, name, target.snapshot, found)
            except ConflictError:
                continue
        raise ConflictError(f"ref {name} is moved again and again", hint="look at it")

    def _is_ours(self, ref: Ref, commits: Sequence[Commit]) -> bool:
        if any(commit.snapshot == ref.snapshot for commit in commits):
            return True
        try:
            snapshot = self._repository.snapshot(ref.snapshot)
            run = RunName.parse(snapshot.attributes.get("run", ""))
        except (CorruptError, NotFoundError, UsageError):
            return False
        return snapshot.kind == "checkpoint" and run == self._run

    def _tags(self) -> set[str]:
        prefix = f"{self._run.namespace}/{self._run.name}/"
        return {name.tag for name in list_refs(self._repository.objects, prefix)}


def _target(tag: str, commits: Sequence[Commit]) -> Commit | None:
    """Return the checkpoint that ``tag`` stands for; the later of two of one step."""
    if tag != LATEST:
        commits = [commit for commit in commits if step_tag(commit.step) == tag]
    return commits[-1] if commits else None
