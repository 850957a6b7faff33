"""Brings what is recorded, leased and mounted into agreement: at the start, and ever after.

A crash may have come between any two steps, of this process or of the node server. Everything is
looked at again from time to time in a thread of its own; nobody who publishes waits for it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import grpc

from envstore.csi.nodeserver import OWNER, Shown
from envstore.csi.publishing import Grants, NoPlaceError, Publisher
from envstore.csi.records import Publication
from envstore.csi.refusal import RefusedError
from envstore.errors import EnvstoreError
from envstore.fuse.complaints import Complaints

EVERY = 60.0
"""Seconds between two looks while all is as it should be."""

_SOONEST, _LATEST = 1.0, 10.0
_STEP_WITHIN = 30.0
_PASSING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})

_log = logging.getLogger(__name__)


class Keeper:
    """Sees to what is left of a former life, and to mounts that the node server has lost."""

    def __init__(self, publisher: Publisher, grants: Grants, every: float = EVERY) -> None:
        self._publisher = publisher
        self._records = publisher.records
        self._server = publisher.server
        self._grants = grants
        self._every = every
        self._complaints = Complaints(_log)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        publisher.left_over = self._wake.set

    def start(self) -> None:
        """Begin, in the background; the node server need not be there yet."""
        self._thread.start()

    def stop(self, within: float) -> None:
        """End, after what is being done is done, but wait no longer than ``within`` seconds."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(within)

    def _run(self) -> None:
        soonest, latest = min(_SOONEST, self._every), min(_LATEST, self._every)
        delay = soonest
        while not self._stopping.is_set():
            self._wake.clear()
            if self._swept():
                delay = soonest
                self._wake.wait(self._every)
            else:
                self._stopping.wait(delay)
                delay = min(latest, 2 * delay)

    def _swept(self) -> bool:
        try:
            return self.sweep()
        except EnvstoreError as error:
            self._complaints.say(str(error))
        except Exception:  # noqa: BLE001 - whatever it is, mounts must still be looked after
            _log.exception("cannot compare what is published with what is mounted")
        return False

    def sweep(self) -> bool:
        """Look at everything once; returns whether all of it is as it should be now.

        Raises ``UnavailableError`` when the node server does not answer.
        """
        # In this order: what is leased or mounted has had its record before.
        shown = {one.target: one for one in self._server.look()}
        leases = self._leases()
        records = self._records.all()
        well = [self._see_to(record, shown, leases) for record in records]
        recorded = {record.lease for record in records}
        for lease, target in leases.items():
            if lease not in recorded:
                self._end_orphan(lease, target, shown)
        for target, mount in shown.items():
            if not mount.alive:
                self._clear(target)
        return all(well)

    def _leases(self) -> dict[str, str]:
        """Return the targets of our leases."""
        mounts = self._server.status()["mounts"]
        return {one["id"]: one["mountpoint"] for one in mounts if one["owner"] == OWNER}

    def _see_to(self, record: Publication, shown: dict[str, Shown], leases: dict[str, str]) -> bool:
        """Mend what is wrong with one target; returns whether it is well then."""
        mount = shown.get(record.target)
        if record.published and mount is not None and mount.alive and record.lease in leases:
            return True
        try:
            with self._publisher.targets.take(record.target):
                self._mend(record.target)
        except RefusedError as refused:
            if refused.code is not grpc.StatusCode.ABORTED:
                self._complaints.say(refused.message, record.target)
            # Else others are at it, or only the kubelet can help, which tries again by itself.
            return refused.code not in _PASSING
        except EnvstoreError as error:
            self._complaints.say(str(error), record.target)
            return False
        return True

    def _mend(self, target: str) -> None:
        record = self._records.find(target)
        if record is None:
            return
        publisher = self._publisher
        if not record.published:
            _log.info("clearing %s, of which a publish or its end was begun", target)
            publisher.withdraw(record)
            return
        alive = publisher.is_alive(target)
        if alive and record.lease in self._leases():
            return  # since it was looked at
        grant = self._grants.grant_again(record, {}, _left)
        if alive:
            publisher.refresh(record, grant, _left)
            return
        try:
            publisher.restore(record, grant, _left)
        except NoPlaceError as error:
            _log.info("forgot %s: %s", target, error)

    def _end_orphan(self, lease: str, target: str, shown: dict[str, Shown]) -> None:
        """Give back a lease that no record tells of."""
        mount = shown.get(target)
        if mount is not None and mount.alive and self._records.find(target) is None:
            # The record was lost, not the pod: it goes when the kubelet says so.
            self._complaints.say("there is a mount without a record: it is left alone", target)
            return
        _log.info("giving back a lease without a mount, of %s", target)
        self._server.give_back(lease)

    def _clear(self, target: str) -> None:
        """Remove a dead mount that no record tells of."""
        with suppress(RefusedError), self._publisher.targets.take(target):
            if self._records.find(target) is None and not self._publisher.is_alive(target):
                _log.info("removing a dead mount from %s", target)
                self._server.hide(target)


def _left(most: float) -> float:
    """Let no step take so long that all others wait for it."""
    return min(most, _STEP_WITHIN)
