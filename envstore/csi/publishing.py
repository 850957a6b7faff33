"""Publishing on this node: what is done in which order, so that every failure can be undone.

For each target a record comes first, then the lease, then the mount; what is undone is undone in
the opposite order. Whatever cannot be undone now, because the node server does not answer, keeps
its record and is seen to later (``envstore.csi.reconcile``).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from envstore.csi.access import is_shared
from envstore.csi.config import NamedStore
from envstore.csi.credentials import find_credentials
from envstore.csi.nodeserver import OWNER, NodeServer, Served, Shown, Wanted
from envstore.csi.policy import Policy
from envstore.csi.records import Publication, Records
from envstore.csi.refusal import RefusedError
from envstore.csi.request import VolumeRequest
from envstore.csi.resolving import told
from envstore.csi.turns import Turns
from envstore.errors import ConflictError, EnvstoreError, UnavailableError, UsageError
from envstore.store.objects.credentials import Credentials

Left = Callable[[float], float]
"""Returns how many seconds the next step may take, at most those given; raises ``RefusedError``
if nobody waits for it any more."""

TAKE_WITHIN, SHOW_WITHIN, POLICY_WITHIN = 300.0, 60.0, 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a volume may use: a store, and the keys that open it unless they are the node's own."""

    store: NamedStore
    credentials: Credentials | None = field(repr=False)


class Grants:
    """Judges by the configuration and the credentials as they are at the moment."""

    def __init__(self, policy: Policy, credentials: Path | None) -> None:
        """``credentials`` is the directory of the driver's own keys."""
        self._policy = policy
        self._credentials = credentials

    def grant(self, request: VolumeRequest, keys: Mapping[str, str], left: Left) -> Grant:
        """Return what ``request``, which came with secrets ``keys``, may use.

        Raises ``RefusedError``.
        """
        store = self._policy.check(request, left(POLICY_WITHIN))
        return Grant(store, find_credentials(store, self._credentials, keys))

    def grant_again(self, record: Publication, keys: Mapping[str, str], left: Left) -> Grant:
        """Return what a volume may use now that was granted before.

        A volume that names no store stays with what was the default one then, by whatever name
        that is known by now. Raises ``RefusedError``.
        """
        try:
            return self.grant(replace(record.request, store=record.store), keys, left)
        except RefusedError as refused:
            if record.request.store or refused.code is not grpc.StatusCode.PERMISSION_DENIED:
                raise
            found = self.grant(record.request, keys, left)
            if found.store.url != record.url:
                raise
            return found


class NoPlaceError(UsageError):
    """Nothing can be mounted on a target path, or what it is to be in does not exist."""


class Publisher:
    """Makes and removes what is published. Whoever calls holds the turn of the target."""

    def __init__(self, records: Records, server: NodeServer) -> None:
        self.records = records
        self.server = server
        self.targets = Turns()
        self.left_over: Callable[[], None] = lambda: None
        """Called when something could not be undone."""
        self._volumes = Turns()
        self._given: dict[str, Credentials | None] = {}

    def publish(self, record: Publication, grant: Grant, left: Left) -> Publication:
        """Publish at a target that has no record yet. When this raises, nothing is left.

        Raises ``EnvstoreError``, ``RefusedError``.
        """
        record = replace(record, store=grant.store.name, url=grant.store.url)
        there = self._shown(record.target)
        if there is not None and not record.digest:
            # The record of this mount was lost: what is read through it must stay the same.
            record = replace(record, digest=self._lost(record.target))
        self._begin(record, left)
        try:
            served, record = self._take_in_turn(record, grant, left)
            return self._show(record, served, left, clear=there is not None)
        except BaseException:
            self._undo(record)
            raise

    def _begin(self, record: Publication, left: Left) -> None:
        """Record what is to be done, unless the volume may be at one target only and is."""
        if is_shared(record.access):
            self.records.save(record)
            return
        with self._volumes.take(record.volume, left(TAKE_WITHIN)):
            for other in self.records.of(record.volume):
                raise RefusedError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"the volume is published at {other.target}, and its access mode"
                    f" {record.access} allows for one target (use accessModes: [ReadOnlyMany])",
                )
            self.records.save(record)

    def restore(self, record: Publication, grant: Grant, left: Left) -> Publication:
        """Mount a volume again that was published, and whose mount is dead or missing.

        When this raises, the record stays. Raises ``EnvstoreError``, ``RefusedError``, and
        ``NoPlaceError`` where the directory of the pod has gone: then the volume is withdrawn.
        """
        _log.warning("mounting %s on %s again", record.request.ref, record.target)
        fresh = replace(
            record,
            lease=secrets.token_hex(8),
            store=grant.store.name,
            url=grant.store.url,
            asked=f"@{record.digest}",  # that it may be had was proven before
            of="",
        )
        self.records.save(fresh)
        try:
            served, fresh = self._take(fresh, grant, left)
            found = self._show(fresh, served, left, clear=True)
        except NoPlaceError:
            self.withdraw(fresh)
            self._forget(record.lease)
            raise
        except BaseException:
            self._forget(fresh.lease)
            # Who still reads what was unmounted here goes on under the old lease.
            self._save(record)
            raise
        self._forget(record.lease)
        return found

    def refresh(self, record: Publication, grant: Grant, left: Left) -> None:
        """See that a mounted volume is served, with the keys that it is granted now."""
        try:
            self._take(record, grant, left)
        except ConflictError:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"store {grant.store.name} was changed since {record.request.ref} was mounted from"
                " it (the pod has to be started again)",
            ) from None

    def keys_are_new(self, record: Publication, grant: Grant) -> bool:
        """Whether the node server has not been given these keys for a volume, if any."""
        return grant.credentials is not None and grant.credentials != self._given.get(record.lease)

    def suspend(self, record: Publication) -> None:
        """Remove mount, target directory and lease, and keep the record.

        Raises ``EnvstoreError``.
        """
        self.server.hide(record.target)
        self.server.give_back(record.lease)
        self._given.pop(record.lease, None)

    def withdraw(self, record: Publication) -> None:
        """Remove mount, target directory, lease and record, whichever there are.

        Raises ``EnvstoreError``; then the record stays.
        """
        if record.published:
            # So that a next life does not bring it back.
            self._save(replace(record, ending=True))
        try:
            self.server.hide(record.target)
        except (UsageError, ConflictError):
            if record.complete:
                raise
            # No place for a mount, or taken by others, which is why there is none of ours.
        # Whatever is still open stays readable: the kernel and the node server know it by other
        # means than leases. The pods that used the mount have ended, or are to lose it.
        self.server.give_back(record.lease)
        self._given.pop(record.lease, None)
        self.records.remove(record.target)

    def clear(self, target: str) -> None:
        """Remove mount and directory of a target without a record. Raises ``EnvstoreError``."""
        self.server.hide(target)
        self.left_over()  # the lease, if there was one

    def fetched(self, record: Publication, within: float) -> int:
        """Return how many bytes came from the store for a volume so far, as far as is known.

        Raises ``UnavailableError`` after so many seconds.
        """
        mounts = self.server.status(within)["mounts"]
        return sum(one["bytes_fetched"] for one in mounts if one["id"] == record.lease)

    def is_alive(self, target: str) -> bool:
        """Whether a mount of ours that is served lies on a target."""
        found = self._shown(target)
        return found is not None and found.alive

    # --- steps ----------------------------------------------------------------------------------

    def _take_in_turn(
        self, record: Publication, grant: Grant, left: Left
    ) -> tuple[Served, Publication]:
        if record.digest:
            return self._take(_pinned(record), grant, left)
        # The first to come asks for the tag; the others mount what it was then.
        with self._volumes.take(record.volume, left(TAKE_WITHIN)):
            return self._take(self._resolved(record), grant, left)

    def _resolved(self, record: Publication) -> Publication:
        """Return the record with the digest that the volume has on this node, if it has one."""
        for other in self.records.of(record.volume):
            same = (other.store, other.request.ref) == (record.store, record.request.ref)
            if other.digest and same:
                return replace(record, digest=other.digest, asked=f"@{other.digest}")
        return replace(record, asked=record.request.ref)

    def _take(self, record: Publication, grant: Grant, left: Left) -> tuple[Served, Publication]:
        request = record.request
        wanted = Wanted(
            lease=record.lease,
            store=grant.store.url,
            ref=record.asked,
            of=record.of,
            target=record.target,
            prefix=request.prefix,
            profile=request.profile,
            fast_path=request.fast_path,
            credentials=grant.credentials,
        )
        within, began = left(TAKE_WITHIN), time.monotonic()
        try:
            served = self.server.take(wanted, within)
        except ConflictError:
            raise  # the lease is there with other words: the caller knows why
        except EnvstoreError as error:
            refused = told(grant.store, request, error)
            late = time.monotonic() - began >= within
            if not late or not isinstance(error, UnavailableError):
                raise refused from None
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"{request.ref} is not there after {within:.1f} s: {refused.message}",
            ) from None
        self._given[record.lease] = grant.credentials
        record = replace(record, digest=served.snapshot, entries=served.entries, size=served.bytes)
        self.records.note(record)
        return served, record

    def _show(self, record: Publication, served: Served, left: Left, *, clear: bool) -> Publication:
        """Mount what is served, in place of what may be there if ``clear``."""
        target, request = record.target, record.request
        if clear:
            self.server.hide(target, left(SHOW_WITHIN))
        try:
            fast = self.server.show(
                served, target, request.ref, left(SHOW_WITHIN), required=request.fast_path == "on"
            )
        except UsageError as error:
            raise NoPlaceError(error.message, hint=error.hint) from None
        left(0.0)  # whoever has gone will not ask for it to be removed
        record = replace(record, fast=fast, complete=True)
        self.records.save(record)
        return record

    def _shown(self, target: str) -> Shown | None:
        return next((one for one in self.server.look() if one.target == target), None)

    def _lost(self, target: str) -> str:
        """Return the digest of what is mounted on a target whose record was lost, if known."""
        for lease in self.server.status()["mounts"]:
            if lease["mountpoint"] == target and lease["owner"] == OWNER:
                return str(lease["digest"])
        return ""

    def _save(self, record: Publication) -> None:
        """Save a record if that can be done: a full disk must keep nothing in its place."""
        try:
            self.records.save(record)
        except EnvstoreError as error:
            _log.warning("the record of %s is not up to date: %s", record.target, error)

    def _undo(self, record: Publication) -> None:
        try:
            self.withdraw(record)
        except EnvstoreError as error:
            _log.warning("something is left at %s, for later: %s", record.target, error)
            self.left_over()

    def _forget(self, lease: str) -> None:
        """Give a lease back, at the latest when orphans are looked for."""
        self._given.pop(lease, None)
        try:
            self.server.give_back(lease)
        except EnvstoreError as error:
            _log.warning("lease %s is left, for later: %s", lease, error)
            self.left_over()


def _pinned(record: Publication) -> Publication:
    """Return the record of a volume whose digest is known, with the words to ask for that."""
    request = record.request
    # Whoever may create a pod may name any digest there. Persistent volumes are made by
    # administrators, and a claim keeps its snapshot even if the ref is led elsewhere.
    of = request.ref if request.digest and request.ephemeral else ""
    return replace(record, asked=f"@{record.digest}", of=of)
