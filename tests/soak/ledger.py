"""What the rig knows of the store without asking it: what each ref may point at, and why.

Every change of a ref is written down before it begins. One that was acknowledged rules out all
that had ended before it began; one whose process was killed may have happened or not.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from tests.soak.trees import VERSION, Recipe, expected

ABSENT = "absent"
ANYTHING = "anything"
"""A tree that this ref's source had, nobody knows which: whoever tagged was killed."""


@dataclass(slots=True)
class Claim:
    """That a ref was to have ``value``: the name of a tree, or ``ABSENT``."""

    value: str
    began: float
    ended: float | None = None
    gone: float | None = None


@dataclass(slots=True)
class _Ref:
    claims: list[Claim] = field(default_factory=list)
    acknowledged: bool = False
    retired: bool = False


class Ledger:
    """For any thread. Times are those of ``time.monotonic``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refs: dict[str, _Ref] = {}
        self._trees: dict[str, Recipe] = {}
        self._names: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self.acknowledged = 0
        """Snapshots that somebody was told are stored."""

    # Trees.

    def plant(self, tree: str, recipe: Recipe) -> None:
        """Remember what a tree consists of."""
        with self._lock:
            self._trees[tree] = recipe
            self._names[expected({VERSION: recipe[VERSION]})[VERSION]] = tree

    def tree_with(self, version: str) -> str | None:
        """Return the tree whose file ``VERSION`` is this."""
        with self._lock:
            return self._names.get(version)

    def recipe(self, tree: str) -> Recipe | None:
        """Return what a tree consists of."""
        with self._lock:
            return self._trees.get(tree)

    def met(self, digest: str, tree: str) -> str | None:
        """A snapshot turned out to hold ``tree``; returns which one it held before, if another."""
        with self._lock:
            before = self._digests.setdefault(digest, tree)
            return None if before == tree else before

    def tree_of(self, digest: str) -> str | None:
        """Return which tree a snapshot holds, if that is known."""
        with self._lock:
            return self._digests.get(digest)

    # Refs.

    def begin(self, ref: str, value: str) -> Claim:
        """Write down, before anything is done, that ``ref`` is about to have ``value``."""
        with self._lock:
            claim = Claim(value, time.monotonic())
            self._refs.setdefault(ref, _Ref()).claims.append(claim)
            return claim

    def end(self, ref: str, claim: Claim, how: str, *, changed: bool = True) -> None:
        """Write down how it went: ``done``, ``refused`` (nothing can have changed) or ``unclear``.

        ``changed`` is false if ``done`` and the ref had the value before.
        """
        now = time.monotonic()
        with self._lock:
            found = self._refs[ref]
            claim.ended = now
            if how == "refused":
                claim.gone = now
            if how != "done":
                return
            found.acknowledged = True
            self.acknowledged += claim.value != ABSENT
            found.retired |= claim.value == ABSENT
            for other in found.claims if changed else ():
                earlier = other.ended is not None and other.ended < claim.began
                if other is not claim and earlier and other.gone is None:
                    other.gone = now
            found.claims = [c for c in found.claims if c.gone is None or c.gone > now - 300]

    def retire(self, ref: str) -> Claim | None:
        """Begin to remove ``ref``, for good; ``None`` if it never was, or somebody does already."""
        with self._lock:
            found = self._refs.get(ref)
            if found is None or found.retired or not found.acknowledged:
                return None
            found.retired = True
            claim = Claim(ABSENT, time.monotonic())
            found.claims.append(claim)
            return claim

    def possible(self, ref: str, since: float | None = None) -> set[str]:
        """Return what ``ref`` may have been at any moment after ``since``, by default now."""
        with self._lock:
            found = self._refs.get(ref)
            if found is None:
                return {ABSENT}
            values = {
                claim.value
                for claim in found.claims
                if claim.gone is None or (since is not None and claim.gone >= since)
            }
            if not found.acknowledged:
                values.add(ABSENT)
            return values

    def allows(self, ref: str, tree: str, since: float | None = None) -> bool:
        """Whether ``ref`` may have pointed at ``tree`` after ``since``."""
        values = self.possible(ref, since)
        return tree in values or ANYTHING in values

    def refs(self) -> list[str]:
        """Return every ref that was ever written to."""
        with self._lock:
            return sorted(self._refs)

    def present(self) -> list[str]:
        """Return the refs that are certainly there, and that nobody is about to remove."""
        with self._lock:
            return sorted(
                ref for ref, found in self._refs.items() if found.acknowledged and not found.retired
            )
