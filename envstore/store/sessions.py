"""A writer's session: from its first look at the store to the last object it stores.

    with writing(repository, "push") as (session, repository):
        ...

1. It begins by reading ``gc/state``, storing ``sessions/<name>`` with that epoch, and reading
   ``gc/state`` again: what is condemned later is not deleted while the session is there, and what
   was before is known to it as *doomed*.
2. Nothing doomed is relied on. What has to be is *claimed*: taken off the condemned list.
3. It is heard of every quarter of ``TTL``. Once nothing was heard of it for longer a collector
   may *fence* it, by compare-and-swap, so that it can declare nothing any more.
4. Before anything becomes reachable its snapshot is *declared*, by compare-and-swap of the
   session's object. From then on it is kept, however long the write that follows takes to arrive.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    EnvstoreError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from envstore.store import hosts
from envstore.store.damage import damaged_packs
from envstore.store.digest import parse_hex
from envstore.store.doomed import claim, read_deleting, read_doomed, read_state
from envstore.store.guarded import GuardedStore
from envstore.store.objects.base import ObjectStore
from envstore.store.repository import Repository
from envstore.store.roots import reachable
from envstore.store.session_records import TTL, Record, put_record, read_record, session_key
from envstore.store.snapshots import snapshot_key

__all__ = ["TTL", "Session", "SessionLostError", "claim_bases", "within", "writing"]

_ATTEMPTS = 3
_PARALLEL = 16
_RELIED_ON = ("snapshots/", "manifests/", "locations/", "locks/", "packs/")
# Answers that say for certain that nothing was stored.
_CERTAIN = (ConflictError, AccessDeniedError, NoSpaceError, UsageError, NotFoundError)

_log = logging.getLogger(__name__)


class SessionLostError(EnvstoreError):
    """A collector may have taken this writer for dead: what it has stored may be gone."""


class Session:
    """One writer at work on one store. Safe for many threads of the process that began it.

    ``epoch`` is that of ``gc/state`` when it began; ``objects`` is the store to write to.
    """

    def __init__(self, inner: ObjectStore, what: str) -> None:
        """Prepare a session; ``begin`` makes it known to the store."""
        self._inner = inner
        self._key = session_key(secrets.token_hex(16))
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._claiming = threading.Lock()
        self._asking = threading.Lock()
        self._asked: frozenset[str] = frozenset()
        self._over = threading.Event()
        self._lost: str | None = None
        self._record = Record(0, what[:200], hosts.here(), 0, "")
        self._version: str | None = None
        self._proved = (0.0, 0.0)
        self._doomed: frozenset[str] = frozenset()
        self._stored: set[str] = set()
        self._unclear: dict[str, tuple[bytes, str | None, bool]] = {}
        self._led_to: set[str] = set()
        self.damaged_packs: frozenset[bytes] = frozenset()
        """The packs that must not be reused because they are damaged."""
        self._thread: threading.Thread | None = None
        self.objects = GuardedStore(inner, self)

    @classmethod
    def begin(cls, store: Repository | ObjectStore, what: str) -> Session:
        """Begin a session for ``what`` ("push"); end it, or use it in a ``with``.

        Four requests, one of them beside the others, and one for each list of what is doomed that
        was not read lately. ``end`` takes one more, what is declared two. Raises the errors of the
        store.
        """
        objects = store.objects if isinstance(store, Repository) else store
        session = cls(objects.inner if isinstance(objects, GuardedStore) else objects, what)
        try:
            session._start()
        except BaseException:
            session.end()
            raise
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def epoch(self) -> int:
        """What is condemned after this epoch is not deleted before the session has ended."""
        return self._record.epoch

    @property
    def key(self) -> str:
        """The key of its object."""
        return self._key

    @property
    def doomed_packs(self) -> frozenset[bytes]:
        """The packs that must not be reused, because they are about to be deleted."""
        names = (parse_hex(key[-64:]) for key in self._doomed if key.startswith("packs/"))
        return frozenset(name for name in names if name is not None)

    def is_doomed(self, key: str) -> bool:
        """Return whether ``key`` is to be taken for absent until it is claimed or written."""
        return key in self._doomed

    def stored(self, key: str) -> None:
        """Learn that this session has stored ``key`` itself."""
        if key.startswith("snapshots/"):
            self._stored.add(key)

    def has_stored(self, key: str) -> bool:
        """Return whether this session has stored, or claimed, the snapshot ``key``."""
        return key in self._stored

    # What it does to the lists of what is doomed.

    def claim(self, keys: Collection[str]) -> None:
        """Take what is doomed of ``keys`` off the lists, see ``doomed.claim``.

        No request if nothing is, and one claim for all that threads wait for at the same time. What
        was being deleted does not exist afterwards.
        """
        self.check()
        wanted = self._doomed.intersection(keys)
        if not wanted:
            return
        with self._asking:
            self._asked |= wanted
        with self._claiming:
            if wanted.isdisjoint(self._doomed):
                return  # whoever was before has claimed it
            with self._asking:
                wanted, self._asked = self._doomed & (wanted | self._asked), frozenset()
            claim(self._inner, wanted)
            self._doomed -= wanted

    def claim_snapshot(self, name: bytes, *, verify: bool = False) -> None:
        """Claim what a snapshot in the store leads to, so that it may be pointed at.

        No request if nothing is doomed. With ``verify`` see that all of it is there, the packs
        by a request for each: for a snapshot that nothing is known to keep alive. Without it a
        damaged snapshot may be pointed at. Raises ``NotFoundError``, ``CorruptError``.
        """
        if self._doomed or verify:
            keys, error = reachable(self._inner, name)
            if verify and error is not None:
                raise error
            profiles = tuple(
                key.replace("manifests/", "profiles/") + "/"
                for key in keys
                if key.startswith("manifests/")
            )
            wanted = self._doomed & keys
            if profiles:
                wanted |= {key for key in self._doomed if key.startswith(profiles)}
            self.claim(wanted)
            if verify or wanted:
                self._require(keys if verify else wanted & keys, name)
        self._stored.add(snapshot_key(name))

    def _require(self, keys: Collection[str], name: bytes) -> None:
        """See that all ``keys`` are there still: a collector may have been faster."""
        ordered = sorted(keys)
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="claim") as pool:
            sizes = list(pool.map(self._inner.size, ordered))
        for key, size in zip(ordered, sizes, strict=True):
            if size is None:
                raise NotFoundError(
                    f"snapshot {name.hex()} is no longer whole: {key} is not in {self._inner.url}",
                    hint="it was collected as garbage; push it again",
                )

    # That it is alive.

    def check(self) -> None:
        """See that whatever is written now is safe from collectors.

        No request, unless nothing was heard of this session for half of ``TTL``: then it has to
        prove that it is there still. Raises ``SessionLostError``.
        """
        if os.getpid() != self._pid:
            raise SessionLostError("a session cannot be used by a child of the process it is of")
        if self._lost is None and self._version is not None and self._is_stale():
            with self._lock:
                if self._is_stale():
                    self._renew()
        if self._over.is_set():
            raise SessionLostError(f"the session {self._key} has ended")
        if self._lost is not None:
            raise SessionLostError(self._lost, hint="run it again: what was stored is used")

    def _is_stale(self) -> bool:
        monotonic, wall = _clocks()
        return max(monotonic - self._proved[0], wall - self._proved[1]) > TTL / 2

    def _renew(self) -> None:
        try:
            self._update(self._record)
        except SessionLostError:
            pass  # remembered
        except EnvstoreError as error:
            self._lose(f"nothing was heard of this session for too long: {error.message}")

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = f"the session {self._key} of this writer is lost: {why}"

    # What it is about to make reachable.

    def declare(self, snapshots: Iterable[bytes], keys: Iterable[str] = ()) -> None:
        """Say what is about to become reachable: from now on it is kept.

        ``keys`` are objects that are about to become part of something reachable. Two requests, and
        another if something is being deleted; none for what was declared before. Raises
        ``SessionLostError`` if this session was fenced, ``UnavailableError``.
        """
        self.check()
        with self._lock:
            record = self._record
            roots = tuple(dict.fromkeys((*record.roots, *snapshots)))
            further = tuple(dict.fromkeys((*record.keys, *keys)))
            if (roots, further) == (record.roots, record.keys):
                return
            self._update(replace(record, roots=roots, keys=further))
        self._recheck()

    def _recheck(self) -> None:
        """See that no collector is deleting what this session may rely on."""
        for row in read_deleting(self._inner):
            if row.key.startswith(_RELIED_ON) and row.key not in self._doomed:
                self._lose(f"{row.key} is being deleted")
                self.check()

    @contextlib.contextmanager
    def reaching(
        self,
        key: str,
        body: bytes,
        version: str | None,
        *,
        conditional: bool,
        packs: Collection[str] = (),
    ) -> Iterator[None]:
        """Watch over the write of a root, or of locations that lead a tree to other ``packs``.

        One that may arrive later keeps the session's object. The packs are claimed at the end.
        """
        self._led_to.update(packs)
        try:
            yield
        except _CERTAIN:
            raise
        except BaseException:
            self._unclear[key] = body, version, conditional
            raise

    # The session's object.

    def _start(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="session") as pool:
            damaged = pool.submit(damaged_packs, self._inner)
            found = read_doomed(self._inner)
            while True:
                self._update(replace(self._record, epoch=found.state.epoch))
                state, _ = read_state(self._inner)
                if state.epoch == found.state.epoch:
                    break
                found = read_doomed(self._inner)
            self._doomed = found.keys()
            self.damaged_packs = damaged.result()
        self._thread = threading.Thread(target=self._beat, name="session", daemon=True)
        self._thread.start()

    def _update(self, record: Record) -> None:
        """Move the session's object on. Raises ``SessionLostError`` if it is not this one's now."""
        with self._lock:
            for attempt in range(_ATTEMPTS):
                before = _clocks()
                try:
                    self._record, self._version = put_record(
                        self._inner, self._key, record, self._version
                    )
                except (ConflictError, NotFoundError) as error:
                    self._adopt(error)
                    continue
                except UnavailableError:
                    if attempt + 1 == _ATTEMPTS:
                        raise
                    continue
                self._proved = before
                return
            raise UnavailableError(
                f"cannot write {self._key}: its answers contradict each other", hint="try again"
            )

    def _adopt(self, error: EnvstoreError) -> None:
        """Go on from what the session's object is now: an earlier write of ours may have landed."""
        try:
            found = read_record(self._inner, self._key)
        except NotFoundError:
            self._lose("its object was removed")
        else:
            # Only this session and a collector that fences it write here.
            if found.record.fenced:
                self._lose("a collector took it for dead")
            self._version = found.version
        if self._lost is not None:
            raise SessionLostError(self._lost, hint="run it again") from error

    def _beat(self) -> None:
        pause = TTL / 4
        while not self._over.wait(pause):
            try:
                with self._lock:
                    if self._over.is_set() or self._lost is not None:
                        return
                    self._update(self._record)
                pause = TTL / 4
            except SessionLostError:
                return
            except EnvstoreError as error:
                _log.warning("no heartbeat of %s: %s", self._key, error.message)
                pause = TTL / 20

    def end(self) -> None:
        """End the session: one request. What it has declared but not made reachable is given up.

        If it has led trees to other packs, what was condemned of these since it began is claimed
        before, for one request more: who began later relies on locations that name them now, and
        takes for known what was condemned before. Its object stays where a write's answer never
        came that may yet arrive, until a collector removes it; and if the store cannot be reached.
        Idempotent; nothing in a forked child.
        """
        if os.getpid() != self._pid or self._over.is_set():
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            try:
                if self._version is not None and not any(map(self._may_land, self._unclear)):
                    if self._led_to:
                        claim(self._inner, self._led_to)
                    self._inner.delete(self._key)
            except EnvstoreError as error:
                _log.warning("%s is left to collectors: %s", self._key, error.message)

    def _may_land(self, key: str) -> bool:
        """Whether a write of a root whose answer never came may still arrive."""
        body, version, conditional = self._unclear[key]
        try:
            data, current = self._inner.get_versioned(key)
        except NotFoundError:
            return not conditional or version is None
        # Bodies never repeat: one that has moved on never comes back to what was expected.
        return data != body and (not conditional or current == version)


@contextlib.contextmanager
def writing(repository: Repository, what: str) -> Iterator[tuple[Session, Repository]]:
    """Write to ``repository`` in a session, which ends with the block, however that ends.

    Yields the session, and the repository to use in it, with the same cache. Within another
    session's repository that one goes on.
    """
    if isinstance(repository.objects, GuardedStore):
        yield repository.objects.session, repository
        return
    with Session.begin(repository, what) as session:
        yield session, within(repository, session)


def claim_bases(repository: Repository, snapshots: Iterable[bytes]) -> None:
    """Claim what these lead to if ``repository`` is in a session: nobody has the bytes besides.

    No request if nothing is doomed, else three for each, 16 at a time.
    """
    if isinstance(repository.objects, GuardedStore):
        session = repository.objects.session
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="claim") as pool:
            for _ in pool.map(session.claim_snapshot, dict.fromkeys(snapshots)):
                pass


def within(repository: Repository, session: Session) -> Repository:
    """Return ``repository`` as it is to be used in a session: with the same cache."""
    inside = copy.copy(repository)
    inside.objects = session.objects
    return inside


def _clocks() -> tuple[float, float]:
    # Both go on while the machine sleeps, and only the second while a container is frozen.
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
