"""Checks small objects besides refs: roots of other kinds, and what steers writers and collectors.

Most of them may be removed at any time, so that nobody can tell whether one is missing. What they
say is checked, and that it is about what their key says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store import canonical, damage
from envstore.store.digest import digest, parse_hex
from envstore.store.doomed import LISTS, STATE_KEY, list_key, open_list, parse_state
from envstore.store.objects.base import ObjectStore
from envstore.store.problems import DAMAGE, Problem
from envstore.store.roots import is_root, parse_root
from envstore.store.session_records import PREFIX as SESSIONS
from envstore.store.session_records import parse_record


class SmallObjects:
    """One check. ``further`` are the snapshots that only such roots name, under their keys."""

    def __init__(self, objects: ObjectStore, targets: Sequence[tuple[str, bytes]]) -> None:
        """Look into ``objects``; ``targets`` are the snapshots that are known already."""
        self._objects = objects
        self._known = {snapshot for _, snapshot in targets}
        self.further: list[tuple[str, bytes]] = []

    def check(self) -> list[Problem]:
        """Return what is damaged. A listing for each kind, and a request for each object."""
        problems = []
        checks: list[tuple[str, Callable[[bytes, str], object]]] = [
            ("runs/", self._check_run),
            ("drafts/", self._check_draft),
            ("leases/", self._check_lease),
            (SESSIONS, parse_record),
            (STATE_KEY, self._check_state),
            (LISTS, self._check_list),
            (damage.PREFIX, self._check_note),
        ]
        for prefix, check in checks:
            for info in self._objects.list(prefix):
                try:
                    check(self._objects.get(info.key), info.key)
                except NotFoundError:
                    continue  # removed since it was listed
                except DAMAGE as error:
                    problems.append(Problem(info.key, error.message))
        return problems

    def _check_root(self, data: bytes, key: str) -> bytes:
        found = parse_root(key, data).snapshot
        if found not in self._known:
            self._known.add(found)
            self.further.append((key, found))
        return found

    def _check_run(self, data: bytes, key: str) -> None:
        value = canonical.decode(data, key)
        if canonical.field(value, "format", int, key) > 1:
            raise UnsupportedFormatError(f"{key} is of a newer format", hint="upgrade envstore")
        # Parts and commits say which checkpoint they are of, and parts of which rank.
        rank = value.get("rank")
        of_rank = f"/{rank:05d}-of-" if isinstance(rank, int) else ""
        if str(value.get("checkpoint", "")) not in key or of_rank not in key:
            raise CorruptError(f"{key} is about another checkpoint or rank")
        if is_root(key):
            self._check_root(data, key)

    def _check_draft(self, data: bytes, key: str) -> None:
        self._check_root(data, key)
        path = canonical.field(canonical.decode(data, key), "path", str, key)
        if digest(path.encode()).hex() != key.rpartition("/")[2]:
            raise CorruptError(f"{key} is of another path")

    def _check_lease(self, data: bytes, key: str) -> None:
        if self._check_root(data, key).hex() != key.split("/")[1]:
            raise CorruptError(f"{key} is about another snapshot")

    def _check_state(self, data: bytes, key: str) -> None:
        found = parse_state(data)
        for name in (found.condemned, found.deleting):
            if name is not None and self._objects.size(list_key(name)) is None:
                raise CorruptError(f"{key} names {list_key(name)}, which is not there")

    def _check_list(self, data: bytes, key: str) -> None:
        name = parse_hex(key.removeprefix(LISTS))
        if name is None:
            raise CorruptError(f"{key} is not a digest")
        open_list(data, name)

    def _check_note(self, data: bytes, key: str) -> None:
        pack = parse_hex(key.removeprefix(damage.PREFIX))
        if pack is not None:
            damage.read_damage(self._objects, pack)
