"""What keeps a checkpoint from being removed: pins, for good, and leases, while it is read."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from envstore.checkpoint.bodies import (
    FORMAT,
    MAX_TEXT,
    parse_id,
    read_body,
    read_digest,
    read_number,
    read_text,
    run_prefix,
    try_get,
)
from envstore.checkpoint.errors import NoCheckpointError
from envstore.checkpoint.layout import CheckpointId, RunName
from envstore.checkpoint.records import Commit
from envstore.errors import CorruptError, EnvstoreError, UsageError
from envstore.store import canonical
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import PARALLEL

LEASE_SECONDS = 600
SKEW_SECONDS = 300
"""By how much the clocks of two nodes may differ: so much later a lease has run out."""
RENEW_SECONDS = 150
_END = 1 << 40


class Holds:
    """Pins and leases of one run. Safe to share between threads."""

    def __init__(self, objects: ObjectStore, run: RunName) -> None:
        self._objects = objects
        self._run = run
        self._prefix = run_prefix(run)

    def pin(self, checkpoint: CheckpointId, reason: str) -> None:
        """Write a pin, over one that is there. One request."""
        if len(reason) > MAX_TEXT:
            raise UsageError(f"a reason of {len(reason)} characters is too long")
        body = {"format": FORMAT, "reason": reason}
        self._objects.put(self._pin_key(checkpoint), canonical.encode_checked(body))

    def unpin(self, checkpoint: CheckpointId) -> None:
        """Remove a pin. One request."""
        self._objects.delete(self._pin_key(checkpoint))

    def is_pinned(self, checkpoint: CheckpointId) -> bool:
        """Return whether there is a pin, even a damaged one. One request."""
        return self._objects.size(self._pin_key(checkpoint)) is not None

    def pins(self) -> dict[CheckpointId, str]:
        """Return each pinned checkpoint and the reason. A damaged pin is one without a reason."""
        prefix = f"{self._prefix}pins/"
        names = [info.key.removeprefix(prefix) for info in self._objects.list(prefix)]
        ids = sorted(id for id in map(parse_id, names) if id is not None)
        with ThreadPoolExecutor(PARALLEL) as pool:
            reasons = pool.map(self._reason, ids)
            return {id: why for id, why in zip(ids, reasons, strict=True) if why is not None}

    def _reason(self, checkpoint: CheckpointId) -> str | None:
        data = try_get(self._objects, self._pin_key(checkpoint))
        if data is None:
            return None
        what = f"pin of checkpoint {checkpoint} of {self._run}"
        try:
            return read_text(read_body(data, what), "reason", what)
        except CorruptError:
            return ""

    def put_lease(self, commit: Commit, nonce: str, until: int) -> None:
        """Write a lease until that Unix time. One request."""
        body = {
            "format": FORMAT,
            "snapshot": commit.snapshot.hex(),
            "holder": f"{socket.gethostname()[:255]}:{os.getpid()}",
            "until": until,
        }
        self._objects.put(self._lease_key(commit.checkpoint, nonce), canonical.encode_checked(body))

    def drop_lease(self, checkpoint: CheckpointId, nonce: str) -> None:
        """Remove a lease. One request."""
        self._objects.delete(self._lease_key(checkpoint, nonce))

    def leases(self, now: float | None) -> set[CheckpointId]:
        """Return what is leased, and remove what ran out before ``now`` (Unix seconds)."""
        now = time.time() if now is None else now
        prefix = f"{self._prefix}leases/"
        keys = [info.key for info in self._objects.list(prefix)]
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = set()
            for key, until in zip(keys, pool.map(self._until, keys), strict=True):
                checkpoint = parse_id(key.removeprefix(prefix).partition("/")[0])
                if until is None or checkpoint is None:
                    continue
                if until + SKEW_SECONDS < now:
                    self._objects.delete(key)
                else:
                    found.add(checkpoint)
        return found

    def _until(self, key: str) -> int | None:
        data = try_get(self._objects, key)
        if data is None:
            return None
        try:
            value: dict[str, Any] = read_body(data, key)
            read_digest(value.get("snapshot"), key)
            return read_number(value, "until", key, 0, _END)
        except CorruptError:
            return 0  # nobody reads under a lease that cannot be read

    def _pin_key(self, checkpoint: CheckpointId) -> str:
        return f"{self._prefix}pins/{checkpoint}"

    def _lease_key(self, checkpoint: CheckpointId, nonce: str) -> str:
        return f"{self._prefix}leases/{checkpoint}/{nonce}"


class Lease:
    """Keeps a checkpoint while the context lasts, by a thread that renews the lease.

    Where that cannot be renewed for ``LEASE_SECONDS``, nobody waits for its holder any longer.
    """

    def __init__(self, holds: Holds, commit: Commit, is_there: Callable[[], bool]) -> None:
        self._holds = holds
        self._commit = commit
        self._is_there = is_there
        self._nonce = secrets.token_hex(8)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Commit:
        self._put()
        # Whoever removes it looks for leases before: either they see this one, or it is gone.
        if not self._is_there():
            self._holds.drop_lease(self._commit.checkpoint, self._nonce)
            raise NoCheckpointError(
                f"checkpoint {self._commit.checkpoint} was removed meanwhile",
                hint="restore a later one",
            )
        self._thread.start()
        return self._commit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._holds.drop_lease(self._commit.checkpoint, self._nonce)
        except EnvstoreError:
            # It runs out by itself; what was read is not worse for that.
            return

    def _put(self) -> None:
        self._holds.put_lease(self._commit, self._nonce, int(time.time()) + LEASE_SECONDS)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self._put()
            except EnvstoreError:
                continue  # the next try is soon enough
