"""Leases of readers: while one lasts, garbage collection keeps what the snapshot leads to.

A ref may be removed while what it named is mounted somewhere. Whoever reads for long therefore
says so in the store, and says it again long before that runs out. Nothing depends on it being
there: a reader without permission to write reads as well, but may lose what nothing else keeps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator

from envstore.errors import AccessDeniedError, EnvstoreError, NotFoundError
from envstore.store import canonical
from envstore.store.doomed import claim, read_doomed
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import Repository
from envstore.store.roots import reachable
from envstore.store.snapshots import snapshot_key

FORMAT = 1
SECONDS = 3600.0
"""How long a lease lasts, unless it is renewed."""
RENEW_SECONDS = 1200.0
"""How often it is renewed: a store may be away for the rest of the time."""
RETRY_SECONDS = 60.0
"""How soon a renewal that failed is tried again."""

_MAX_HOLDER = 255
_END_WITHIN = 5.0

_log = logging.getLogger(__name__)


def lease_key(snapshot: bytes, name: str) -> str:
    """Return the object key of one lease; ``name`` is 16 hexadecimal digits."""
    return f"leases/{snapshot.hex()}/{name}"


def new_name() -> str:
    """Return a name for a lease that no other has."""
    return secrets.token_hex(8)


class Lease:
    """One lease. Blocking; of use to one thread at a time.

    Whoever knows its ``name`` goes on with it, for example after a crash: what it is for matters,
    and not which process writes it.
    """

    def __init__(
        self,
        store: Repository | ObjectStore,
        snapshot: bytes,
        holder: str,
        seconds: float = SECONDS,
        name: str = "",
        *,
        taken: bool = False,
    ) -> None:
        """Prepare a lease of ``snapshot``, which ``renew`` makes; ``holder`` says where and why.

        ``taken`` says that somebody may have made the one called ``name`` already.
        """
        self._objects = store.objects if isinstance(store, Repository) else store
        self._holder = holder[:_MAX_HOLDER]
        self._seconds = seconds
        self.snapshot = snapshot
        self.name = name or new_name()
        self.until = 0
        """When it runs out, in seconds since 1970 by the store's clock; 0 if it is not there."""
        self._asked = taken

    @classmethod
    def take(
        cls,
        store: Repository | ObjectStore,
        snapshot: bytes,
        holder: str,
        seconds: float = SECONDS,
    ) -> Lease:
        """Take a new lease; see ``renew``."""
        lease = cls(store, snapshot, holder, seconds)
        lease.renew()
        return lease

    @property
    def key(self) -> str:
        """The key of its object."""
        return lease_key(self.snapshot, self.name)

    def renew(self) -> None:
        """Have the lease last from now on, and take back what is to be collected of the snapshot.

        Three or four requests, and some more while anything is condemned. Raises
        ``AccessDeniedError`` if nobody may take leases with these credentials, ``NotFoundError``
        if the snapshot has been collected, and the errors of the store.
        """
        until = int(self._objects.now() + self._seconds)
        body = {
            "format": FORMAT,
            "holder": self._holder,
            "snapshot": self.snapshot.hex(),
            "until": until,
        }
        # First this: a collector that has not seen it when it marks what is live has condemned, or
        # is about to delete, what is taken back then.
        self._asked = True
        self._objects.put(self.key, canonical.encode_checked(body))
        self._claim()
        if self._objects.size(snapshot_key(self.snapshot)) is None:
            # Nobody can tell what such a lease keeps.
            with contextlib.suppress(EnvstoreError):
                self.release()
            raise NotFoundError(
                f"snapshot {self.snapshot.hex()} is not in {self._objects.url} any more",
                hint="it was collected as garbage; what is not cached cannot be read",
            )
        self.until = until

    def _claim(self) -> None:
        """Take the snapshot off the lists of what is doomed, if anything of it is there."""
        doomed = read_doomed(self._objects).keys()
        if not doomed:
            return
        keys, _ = reachable(self._objects, self.snapshot)
        profiles = tuple(
            key.replace("manifests/", "profiles/") + "/"
            for key in keys
            if key.startswith("manifests/")
        )
        wanted = {key for key in doomed if key in keys or (profiles and key.startswith(profiles))}
        if wanted:
            # Who may write leases and nothing else relies on the next mark, which sees this one.
            with contextlib.suppress(AccessDeniedError):
                claim(self._objects, wanted)

    def release(self) -> None:
        """Give the lease back: one request, none if it was never asked for."""
        if self._asked:
            self._objects.delete(self.key)
            self._asked = False
            self.until = 0


def here(what: str) -> str:
    """Return what to call a holder on this machine: its host, process and ``what`` it does."""
    return f"{socket.gethostname()}:{os.getpid()} {what}"


@contextlib.contextmanager
def leased(repository: Repository, snapshot: bytes, what: str) -> Iterator[None]:
    """Keep a snapshot while the block reads it, as far as the store can be told.

    A thread takes the lease meanwhile, renews it and gives it back: nothing waits for that but the
    end, five seconds at most. Raises nothing of its own.
    """
    keeper = _Keeper(Lease(repository, snapshot, here(what)))
    try:
        yield
    finally:
        keeper.end()


class _Keeper:
    """Holds one lease in a thread."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Have the lease given back; what cannot be given back soon runs out."""
        self._over.set()
        self._thread.join(_END_WITHIN)

    def _hold(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            try:
                self._lease.renew()
                pause = RENEW_SECONDS
            except (AccessDeniedError, NotFoundError) as error:
                _log.info("no lease is held: %s", error)
                return
            except EnvstoreError as error:
                _log.info("the lease is not renewed: %s", error)
                pause = RETRY_SECONDS
        try:
            self._lease.release()
        except EnvstoreError as error:
            _log.info("the lease is left to run out: %s", error)
