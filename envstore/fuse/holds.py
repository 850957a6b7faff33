"""Leases in the stores of all that one server serves, so that nobody collects it meanwhile.

They are taken in the background: no mount waits for one, and none fails without. Their names are
kept by the holder, so that after a crash, a handover or an upgrade the next server goes on with the
same ones. Times are those of the wall clock, which goes on while a machine sleeps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError
from envstore.fuse.complaints import Complaints
from envstore.fuse.keeping import Keepsake
from envstore.fuse.supplies import Source
from envstore.store.leases import RENEW_SECONDS, RETRY_SECONDS, SECONDS, Lease, new_name
from envstore.store.objects.base import ObjectStore

HOLD = "hold/"
"""What the keepsakes of these leases are called, before their names."""

_LOOK_SECONDS = 60.0
_END_WITHIN = 2.0
_AT_ONCE = 8

Wanted = tuple[Source, bytes]
"""A store, and a snapshot in it."""


@dataclass(slots=True, eq=False)
class _Hold:
    """One lease: until when it lasts, when it is to be renewed, and why it is not there."""

    source: Source
    lease: Lease
    due: float = 0.0
    until: float = 0.0
    reason: str = ""
    over: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)


class Holds:
    """All leases of one server. Belongs to one trio run; ``restore`` is for before."""

    NONE: Mapping[str, Any] = {"until": 0, "reason": ""}
    """What is told of a lease that nobody has asked for."""

    def __init__(
        self,
        holder: str,
        keep: Callable[[str, Keepsake], None],
        drop: Callable[[str], None],
        complaints: Complaints,
    ) -> None:
        """Hold in the name of ``holder``; ``keep`` and ``drop`` are told what the next needs."""
        self._holder = holder
        self._keep = keep
        self._drop = drop
        self._complaints = complaints
        self._former: dict[str, Keepsake] = {}
        self._holds: dict[Wanted, _Hold] = {}
        self._nursery: trio.Nursery | None = None
        self._threads = trio.CapacityLimiter(_AT_ONCE)

    def restore(self, key: str, keepsake: Keepsake) -> None:
        """Take over a lease that another server has taken."""
        self._former[key] = keepsake

    def start(self, nursery: trio.Nursery) -> None:
        """Take and renew leases from now on, with tasks in ``nursery``."""
        self._nursery = nursery

    def settle(self, wanted: Mapping[Wanted, ObjectStore]) -> None:
        """Hold ``wanted``, each through these objects, and nothing else, from now on."""
        if self._nursery is None:
            return
        for pair, objects in wanted.items():
            if pair not in self._holds:
                hold = self._holds[pair] = self._begin(pair, objects)
                self._nursery.start_soon(self._run, hold)
        for pair in [pair for pair in self._holds if pair not in wanted]:
            self._holds.pop(pair).over.set()
        for key in [*self._former]:
            # Of what is served no longer: nobody knows its store any more, so it runs out.
            del self._former[key]
            self._drop(key)

    def _begin(self, pair: Wanted, objects: ObjectStore) -> _Hold:
        """Return the lease that a former server has taken, or else a new one."""
        source, snapshot = pair
        for key, keepsake in self._former.items():
            body = keepsake.body
            if (Source.kept(body), body["snapshot"]) == (source, snapshot.hex()):
                del self._former[key]
                name = key.removeprefix(HOLD)
                lease = Lease(objects, snapshot, self._holder, name=name, taken=True)
                until = float(body["until"])
                due = until - SECONDS + RENEW_SECONDS if until else 0.0
                return _Hold(source, lease, due, until)
        hold = _Hold(source, Lease(objects, snapshot, self._holder, name=new_name()))
        self._note(hold)  # before it is there, so that whoever comes next can give it back
        return hold

    def _note(self, hold: _Hold) -> None:
        body = {
            "store": hold.source.url,
            "given": hold.source.given,
            "snapshot": hold.lease.snapshot.hex(),
            "until": int(hold.until),
        }
        self._keep(HOLD + hold.lease.name, Keepsake(body))

    async def _run(self, hold: _Hold) -> None:
        """Renew one lease until it is over, then give it back."""
        while not hold.over.is_set():
            if time.time() >= hold.due:
                hold.due = time.time() + await self._renew(hold) * random.uniform(0.9, 1)  # noqa: S311
            with trio.move_on_after(min(_LOOK_SECONDS, max(0.0, hold.due - time.time()))):
                await hold.over.wait()
        try:
            await self._in_thread(hold.lease.release)
        except Exception as error:  # noqa: BLE001 - it runs out
            self._complaints.say(f"a lease is left to run out: {error}")
        self._drop(HOLD + hold.lease.name)
        hold.ended.set()

    async def _renew(self, hold: _Hold) -> float:
        """Renew a lease; returns in how many seconds to do it again."""
        begun = time.time()
        try:
            await self._in_thread(hold.lease.renew)
        except (AccessDeniedError, NotFoundError) as error:
            hold.reason = str(error)
            self._complaints.say(f"no lease: {error}")
            return RENEW_SECONDS
        except EnvstoreError as error:
            hold.reason = str(error)
            self._complaints.say(f"the lease is not renewed: {error}")
            return RETRY_SECONDS
        except Exception as error:  # noqa: BLE001 - the mount must go on without this
            hold.reason = repr(error)
            self._complaints.say(f"no lease: {error!r}")
            return RENEW_SECONDS
        hold.reason, hold.until = "", begun + SECONDS
        self._note(hold)
        return RENEW_SECONDS

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)

    async def end(self) -> None:
        """Give all leases back, as far as that is done in a moment; the others run out."""
        holds = [*self._holds.values()]
        self._holds.clear()
        for hold in holds:
            hold.over.set()
        with trio.move_on_after(_END_WITHIN):
            for hold in holds:
                await hold.ended.wait()

    def describe(self, source: Source, snapshot: bytes) -> Mapping[str, Any]:
        """Return how a lease is: until when it lasts (seconds since 1970, 0 for not), and why."""
        hold = self._holds.get((source, snapshot))
        if hold is None:
            return self.NONE
        until = hold.until if hold.until > time.time() else 0
        return {"until": int(until), "reason": hold.reason}
