"""The refs of a run: ``<run>:latest`` and ``<run>:step-<n>`` point at what is committed.

They let checkpoints be mounted, pulled and shown like any other tree. Nothing of a run depends on
them: they follow the commits, and whoever moves them looks at the commits after having read the
ref, so that of several who do, nobody moves one back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from envstore.checkpoint.layout import RunName
from envstore.checkpoint.records import Commit
from envstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from envstore.store.guarded import GuardedStore
from envstore.store.refs import Ref, list_refs, move_ref, try_read
from envstore.store.repository import Repository
from envstore.store.sessions import writing

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

    def follow(self, steps: Iterable[int]) -> list[str]:
        """Move ``latest`` and the refs of ``steps``, and create those of other steps that lack.

        Returns warnings about refs that are somebody else's. A listing, a request for each ref and
        one more if it moves, and the commits. Raises ``ConflictError`` if others keep moving one,
        and the errors of the store.
        """
        present = self._tags()
        return self._settle([LATEST, *map(step_tag, steps)], present)

    def settle(self, tags: Iterable[str]) -> list[str]:
        """Make each of ``tags`` point where it should, or nowhere; otherwise as ``follow``."""
        return self._settle(list(tags), None)

    def stray(self, steps: Iterable[int]) -> list[str]:
        """Return the tags of steps that are none of ``steps``. One listing."""
        wanted = set(map(step_tag, steps))
        return sorted(tag for tag in self._tags() if _STEP.fullmatch(tag) and tag not in wanted)

    def _settle(self, tags: Sequence[str], present: Set[str] | None) -> list[str]:
        """Settle ``tags``; where it is known which are ``present``, create those that lack."""
        objects = self._repository.objects
        warnings: list[str] = []
        if not tags:
            return warnings
        for _ in range(_RACES):
            found = {tag: try_read(objects, self._run.ref(tag)) for tag in tags}
            commits = self._commits()
            if present is not None:
                for commit in commits:
                    tag = step_tag(commit.step)
                    if tag not in present:
                        found.setdefault(tag, None)
            if not isinstance(objects, GuardedStore) and _any_off(found, commits):
                # What is read again in the session cannot be collected before the refs are moved.
                with writing(self._repository, f"refs of {self._run}") as (_, inside):
                    names = Names(inside, self._run, self._commits)
                    return [*warnings, *names._settle(tags, present)]
            tags = [
                tag for tag, ref in found.items() if not self._move(tag, ref, commits, warnings)
            ]
            if not tags:
                return warnings
            present = None
        raise ConflictError(
            f"refs of {self._run} are moved again and again: {', '.join(tags)}", hint="look at them"
        )

    def _move(
        self,
        tag: str,
        found: tuple[Ref, str] | None,
        commits: Sequence[Commit],
        warnings: list[str],
    ) -> bool:
        """Move one ref, read as ``found`` before ``commits`` were listed; whether it is settled."""
        name, target = self._run.ref(tag), _target(tag, commits)
        if found is None and target is None:
            return True
        if found is not None:
            if target is not None and found[0].snapshot == target.snapshot:
                return True
            if not self._is_ours(found[0], commits):
                warnings.append(
                    f"{name} is not a checkpoint of {self._run} and stays where it points"
                )
                return True
        if target is None:
            self._repository.objects.delete(name.key)
            # Deleting knows no condition: somebody may have moved it a moment before.
            return False
        try:
            move_ref(self._repository.objects, name, target.snapshot, found)
        except ConflictError:
            return False
        return True

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


def _any_off(found: Mapping[str, tuple[Ref, str] | None], commits: Sequence[Commit]) -> bool:
    """Whether any of the refs that were found does not point at what it should point at."""
    return any(
        target is not None and (ref is None or ref[0].snapshot != target.snapshot)
        for tag, ref in found.items()
        for target in (_target(tag, commits),)
    )


def _target(tag: str, commits: Sequence[Commit]) -> Commit | None:
    """Return the checkpoint that ``tag`` stands for; the later of two of one step."""
    if tag != LATEST:
        commits = [commit for commit in commits if step_tag(commit.step) == tag]
    return commits[-1] if commits else None
