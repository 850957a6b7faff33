"""The object store as a writer's session sees it: nothing is written behind a collector's back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from envstore.errors import CorruptError, NotFoundError
from envstore.store.locations import packs_named
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.body import Body, joined
from envstore.store.objects.passing import PassingObjects
from envstore.store.packs import pack_key
from envstore.store.roots import is_root, parse_root
from envstore.store.snapshots import snapshot_key

if TYPE_CHECKING:
    from envstore.store.sessions import Session

_T = TypeVar("_T")


class GuardedStore(PassingObjects):
    """An ``ObjectStore`` for one session; reads pass as they are.

    Whatever is written while the session is lost raises ``SessionLostError``. A doomed object
    counts as absent: ``size`` does not see it, and writing it takes it off the condemned list
    before. Writing a root, such as a ref, first claims what its snapshot leads to, unless that was
    stored in this very session, and declares it. Locations that replace others declare their packs,
    which the session claims at its end.

    Besides the write itself: none for what is not doomed, about four requests for what is; two for
    a root whose snapshot was not declared yet, and what ``Session.claim_snapshot`` takes if that
    was there before; one to three for locations that replace others.
    """

    def __init__(self, inner: ObjectStore, session: Session) -> None:
        super().__init__(inner)
        self.session = session

    def put(self, key: str, data: Body) -> None:
        """Store ``data`` under ``key`` in this session."""
        self._write(key, data, lambda: self.inner.put(key, data), None, conditional=False)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Store ``data`` in this session, only if the object still has ``version``."""
        return self._write(
            key, data, lambda: self.inner.put_if(key, data, version), version, conditional=True
        )

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, ``None`` if it does not exist or is doomed."""
        return None if self.session.is_doomed(key) else self.inner.size(key)

    def delete(self, key: str) -> None:
        """Remove the object in this session."""
        self.session.check()
        self.inner.delete(key)

    def delete_within(self, key: str, seconds: float, check: Callable[[], None]) -> None:
        """Remove the object in this session while ``check`` holds, in time or not at all."""

        def both() -> None:
            self.session.check()
            check()

        self.inner.delete_within(key, seconds, both)

    def _write(
        self,
        key: str,
        data: Body,
        write: Callable[[], _T],
        version: str | None,
        *,
        conditional: bool,
    ) -> _T:
        session = self.session
        session.check()
        if not is_root(key):
            if session.is_doomed(key):
                session.claim((key,))
            if key.startswith("locations/") and (version is not None or not conditional):
                body = joined(data)
                packs = self._declared(key, body)
                with session.reaching(key, body, version, conditional=conditional, packs=packs):
                    return write()
            result = write()
            session.stored(key)
            return result
        body = joined(data)
        name = parse_root(key, body).snapshot
        if not session.has_stored(snapshot_key(name)):
            session.claim_snapshot(name)
        session.declare((name,))
        with session.reaching(key, body, version, conditional=conditional):
            return write()

    def _declared(self, key: str, data: bytes) -> set[str]:
        """Declare the packs in which a reachable tree may be found only once this is written.

        They are kept for as long as it may take to arrive, like what a root leads to.
        """
        new = packs_named(data, key)
        with contextlib.suppress(CorruptError, NotFoundError):  # then it leads nowhere
            new -= packs_named(self.inner.get(key), key)
        packs = set(map(pack_key, new))
        self.session.declare((), packs)
        return packs
