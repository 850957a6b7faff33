"""The objects below ``sessions/``: who is writing to the store, since which epoch, to what end."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
)
from envstore.store import canonical, hosts
from envstore.store.digest import parse_hex
from envstore.store.doomed import PREFIXES
from envstore.store.objects.base import ObjectStore
from envstore.store.objects.keys import is_key

FORMAT = 1
PREFIX = "sessions/"
TTL = 300.0
"""Seconds without a heartbeat after which a session is over. Writers stop at half of it."""
EXPIRY_SLACK = 60.0
"""Seconds that a collector waits besides before it fences a session."""
KEEP_SECONDS = 7 * 86_400.0
"""How long what a fenced session declared is kept: a write of it may still be on its way."""
GONE_SECONDS = 300.0
"""The same for a session whose process has ended for certain."""

_NAME = re.compile(r"[0-9a-f]{32}")
_MAX_TEXT = 1024
_END = 1 << 63
_PARALLEL = 16


@dataclass(frozen=True, slots=True)
class Record:
    """What a session's object says; times are whole seconds since 1970 by the store's clock.

    ``epoch`` is that of ``gc/state`` when it began, ``beat`` when it was heard of last, ``nonce``
    new at each write. ``fenced`` is when a collector ended it (0: open), ``gone`` whether its
    process was known to have ended then. ``roots`` are the snapshots it is about to make
    reachable, ``keys`` further objects that it is about to make part of what is reachable.
    """

    epoch: int
    what: str
    host: str
    beat: int
    nonce: str
    fenced: int = 0
    gone: bool = False
    roots: tuple[bytes, ...] = ()
    keys: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the stored JSON. Raises ``UsageError`` if that is too long."""
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "epoch": self.epoch,
                "what": self.what,
                "host": self.host,
                "beat": self.beat,
                "nonce": self.nonce,
                "state": "fenced" if self.fenced else "open",
                "fenced": self.fenced,
                "gone": int(self.gone),
                "roots": [root.hex() for root in self.roots],
                "keys": list(self.keys),
            }
        )

    def is_over(self, now: float) -> bool:
        """Whether a collector may fence it at ``now``, by the store's clock."""
        return self.beat + TTL + EXPIRY_SLACK < now or hosts.is_gone(self.host)

    @property
    def kept_until(self) -> float | None:
        """Until when what it declared is kept; ``None`` while it is open."""
        if not self.fenced:
            return None
        return self.fenced + (GONE_SECONDS if self.gone else KEEP_SECONDS)


@dataclass(frozen=True, slots=True)
class Stored:
    """A session's object: its key, what it says, and the version for ``put_if``."""

    key: str
    record: Record
    version: str


def session_key(name: str) -> str:
    """Return the object key of the session called ``name``, 32 hexadecimal digits."""
    return f"{PREFIX}{name}"


def parse_record(data: bytes, key: str) -> Record:
    """Decode a session's object. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    value = canonical.decode(data, key)
    if canonical.field(value, "format", int, key) > FORMAT:
        raise UnsupportedFormatError(f"{key} is of a newer format", hint="upgrade envstore")
    epoch, beat, fenced, gone = (
        canonical.field(value, name, int, key) for name in ("epoch", "beat", "fenced", "gone")
    )
    what, host, nonce, state = (
        canonical.field(value, name, str, key) for name in ("what", "host", "nonce", "state")
    )
    roots = [parse_hex(str(root)) for root in canonical.field(value, "roots", list, key)]
    keys = [str(name) for name in canonical.field(value, "keys", list, key)]
    if (
        not all(0 <= number < _END for number in (epoch, beat, fenced, gone))
        or not all(len(text) <= _MAX_TEXT for text in (what, host, nonce))
        or state != ("fenced" if fenced else "open")
        or not all(name.startswith(PREFIXES) and is_key(name) for name in keys)
    ):
        raise CorruptError(f"{key} holds what cannot be", hint="run `envstore repair`")
    known = tuple(root for root in roots if root is not None)
    if len(known) != len(roots):
        raise CorruptError(f"{key} holds a malformed digest", hint="run `envstore repair`")
    return Record(epoch, what, host, beat, nonce, fenced, bool(gone), known, tuple(keys))


def read_record(objects: ObjectStore, key: str) -> Stored:
    """Return one session. One request. Raises ``NotFoundError``, ``CorruptError``."""
    data, version = objects.get_versioned(key)
    return Stored(key, parse_record(data, key), version)


def read_sessions(objects: ObjectStore) -> list[Stored]:
    """Return all sessions there are. One listing, and a request for each.

    Raises ``CorruptError`` for one that cannot be read: nobody knows what it protects.
    """
    keys = [info.key for info in objects.list(PREFIX)]
    found = [key for key in keys if _NAME.fullmatch(key.removeprefix(PREFIX))]

    def read(key: str) -> Stored | None:
        try:
            return read_record(objects, key)
        except NotFoundError:
            return None  # it has ended since it was listed

    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="sessions") as pool:
        return [stored for stored in pool.map(read, found) if stored is not None]


def put_record(
    objects: ObjectStore, key: str, record: Record, version: str | None
) -> tuple[Record, str]:
    """Write a session's object if it has ``version`` still (``None``: create it).

    Returns what was written, its nonce and beat new, and the new version. One request, two after
    an unclear answer. Raises ``ConflictError``, ``NotFoundError`` (it was removed), and
    ``UnavailableError`` if the outcome is not known.
    """
    new = replace(record, nonce=secrets.token_hex(16), beat=int(objects.now()))
    return new, put_exactly(objects, key, new, version)


def put_exactly(objects: ObjectStore, key: str, record: Record, version: str | None) -> str:
    """Write ``record`` as it is, see ``put_record``; returns the new version."""
    try:
        return objects.put_if(key, record.encode(), version)
    except (ConflictError, UnavailableError) as error:
        try:
            found = read_record(objects, key)
        except NotFoundError:
            if version is None:
                raise error from None
            raise
        if found.record.nonce != record.nonce:
            raise
        return found.version


def fence(objects: ObjectStore, stored: Stored) -> Stored:
    """End a session that is over: its writer can declare nothing any more.

    Raises ``ConflictError`` if it has moved meanwhile, so that it may be alive, and
    ``NotFoundError`` if it has ended.
    """
    record = replace(
        stored.record,
        nonce=secrets.token_hex(16),
        fenced=int(objects.now()),
        gone=hosts.is_gone(stored.record.host),
    )
    return Stored(stored.key, record, put_exactly(objects, stored.key, record, stored.version))


def kept_keys(sessions: Iterable[Stored], now: float) -> frozenset[str]:
    """Return what ``sessions`` declared to be about to become part of something reachable."""
    return frozenset(
        key
        for stored in sessions
        if (until := stored.record.kept_until) is None or until >= now
        for key in stored.record.keys
    )
