"""The one collector at work: its lease in ``gc/state``, and every change it makes there.

The lease is renewed by a thread every quarter of its time. Before anything is deleted the owner
looks at its own clocks: what it has not been able to renew for half a lease is over, long before
anybody else would take it. Both clocks must agree, as one stands still when a machine sleeps and
the other may be set.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from envstore.errors import ConflictError, EnvstoreError
from envstore.store import hosts
from envstore.store.doomed import (
    LEASE_SECONDS,
    Condemned,
    Doomed,
    Owner,
    State,
    put_state,
    read_doomed,
    read_state,
    settle,
    write_list,
)
from envstore.store.objects.base import ObjectStore

_ATTEMPTS = 200


class LostOwnershipError(EnvstoreError):
    """Another collector has taken over, or might have."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of the lists: the epoch, what is condemned and what is being deleted."""

    epoch: int
    condemned: Sequence[Condemned]
    deleting: Sequence[Condemned]


class Ownership:
    """The lease of this process, given back at the end. ``check`` may be called by any thread."""

    def __init__(self, objects: ObjectStore, id_: str) -> None:
        self._objects = objects
        self._id = id_
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lists: dict[bytes | None, Sequence[Condemned]] = {None: ()}
        self._renewed = _clocks()
        self._thread = threading.Thread(target=self._keep, name="collector's lease", daemon=True)

    @classmethod
    def take(cls, objects: ObjectStore) -> Ownership | Owner:
        """Become the owner; returns who is, if that is somebody else who lives.

        About four requests; waits for what another may still be deleting. Raises
        ``ConflictError`` if ``gc/state`` never stands still, ``UnavailableError`` if one that is
        stopped hinders it.
        """
        for _ in range(_ATTEMPTS):
            state, version = read_state(objects)
            if state.owner is not None and not state.owner.is_dead(objects.now()):
                return state.owner
            settle(objects, state)
            mine = cls(objects, secrets.token_hex(16))
            with contextlib.suppress(ConflictError):
                put_state(objects, replace(state, owner=mine._owner()), version)
                return mine
        raise ConflictError("gc/state is changed all the time", hint="try again")

    def __enter__(self) -> Ownership:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        # Whoever cannot give it back leaves a lease that runs out.
        with contextlib.suppress(EnvstoreError):
            self._move(lambda state: replace(state, owner=None))

    def check(self) -> None:
        """Raise ``LostOwnershipError`` unless this certainly is the owner still.

        No request, unless the lease could not be renewed for half of its time: then that is tried
        once more.
        """
        if not self._is_fresh():
            with contextlib.suppress(EnvstoreError):
                self._move(lambda state: replace(state, owner=self._owner()))
        if not self._is_fresh():
            raise LostOwnershipError(
                "garbage collection was stopped: its lease could not be renewed in time",
                hint="nothing is lost; run it again",
            )

    def _is_fresh(self) -> bool:
        elapsed = [now - then for now, then in zip(_clocks(), self._renewed, strict=True)]
        return all(-1.0 < seconds < LEASE_SECONDS / 2 for seconds in elapsed)

    def change(self, what: Callable[[Doomed], Change]) -> Doomed:
        """Put what ``what`` makes of the lists as they are now, however often they move meanwhile.

        A list that ``what`` returns as it got it is neither compared nor written. Two requests for
        each attempt, and one for each list that changes, or that others have changed. Raises
        ``LostOwnershipError``, ``ConflictError``.
        """
        with self._lock:
            for _ in range(_ATTEMPTS):
                found = self._read()
                self._check_owner(found.state)
                change = what(found)
                state = replace(
                    found.state,
                    epoch=change.epoch,
                    condemned=self._listed(
                        found.condemned, change.condemned, found.state.condemned
                    ),
                    deleting=self._listed(found.deleting, change.deleting, found.state.deleting),
                    owner=self._owner(),
                )
                began = _clocks()
                try:
                    stored, version = put_state(self._objects, state, found.version)
                except ConflictError:
                    continue
                self._renewed = began
                self._lists = {
                    stored.condemned: change.condemned,
                    stored.deleting: change.deleting,
                    None: (),
                }
                return Doomed(stored, version, change.condemned, change.deleting)
        raise ConflictError("gc/state is changed all the time", hint="try again")

    def _listed(
        self, old: Sequence[Condemned], new: Sequence[Condemned], name: bytes | None
    ) -> bytes | None:
        same = old is new or list(old) == list(new)
        return name if same else write_list(self._objects, new)

    def _read(self) -> Doomed:
        """Return the lists as they are, those that are known from memory."""
        state, version = read_state(self._objects)
        names = state.condemned, state.deleting
        if not all(name in self._lists for name in names):
            found = read_doomed(self._objects)
            self._lists = {
                found.state.condemned: found.condemned,
                found.state.deleting: found.deleting,
                None: (),
            }
            return found
        condemned, deleting = (self._lists[name] for name in names)
        return Doomed(state, version, condemned, deleting)

    def _move(self, what: Callable[[State], State]) -> None:
        with self._lock:
            for _ in range(_ATTEMPTS):
                began = _clocks()
                state, version = read_state(self._objects)
                self._check_owner(state)
                with contextlib.suppress(ConflictError):
                    put_state(self._objects, what(state), version)
                    self._renewed = began
                    return
        raise ConflictError("gc/state is changed all the time", hint="try again")

    def _check_owner(self, state: State) -> None:
        if state.owner is None or state.owner.id != self._id:
            raise LostOwnershipError(
                "garbage collection was stopped: another collector has taken over",
                hint="nothing is lost; it goes on with what was begun here",
            )

    def _owner(self) -> Owner:
        until = int(self._objects.now() + LEASE_SECONDS)
        return Owner(self._id, hosts.here(), until)

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 4):
            # What cannot be renewed runs out, and `check` will tell.
            with contextlib.suppress(EnvstoreError):
                self._move(lambda state: replace(state, owner=self._owner()))


def _clocks() -> tuple[float, float]:
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
