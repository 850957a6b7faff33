"""What collectors have found dead: ``gc/state``, the lists it names, and how a writer takes back.

A key on the *condemned* list was dead at some epoch and is there still; one on the *deleting* list
is being deleted. Both are *doomed*. ``gc/state`` is the one small object that says which lists
hold, moved by compare-and-swap alone; the lists are immutable. A store without it was never
collected: epoch 0, nothing doomed.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from envstore.errors import (
    AccessDeniedError,
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store import canonical, hosts
from envstore.store.binary import U32, U64, Cursor, pack_array, seal, unseal
from envstore.store.digest import digest, parse_hex
from envstore.store.objects.base import ObjectStore, TooLateError
from envstore.store.objects.keys import is_key

_T = TypeVar("_T")

FORMAT = 1
STATE_KEY = "gc/state"
LISTS = "gc/lists/"
MAGIC = b"ESGARB01"
MAX_BODY = 256 << 20
"""Bytes of a list: about two and a half million keys."""
PREFIXES = (
    "snapshots/",
    "manifests/",
    "locations/",
    "profiles/",
    "locks/",
    "packages/",
    "index/",
    "samples/",
    "packs/",
    "probe/",
)
"""What the keys that may be doomed begin with."""
LEASE_SECONDS = 60.0
"""How long a collector is the owner without saying so again."""
SLACK_SECONDS = 60.0
"""How much longer nobody takes over from one that is not known to be gone."""
DELETION_SECONDS = 30.0
"""Until when the store takes a deletion, from before its owner looks at its lease.

That is in the first half of the lease, so that none arrives once ``SLACK_SECONDS`` are over.
"""
PATIENCE = 600.0
"""Seconds that a writer waits for a collector to finish with a key."""

_MAX_TEXT = 1024
_NONCE = 16
_END = 1 << 63
_PAUSE = 0.5
_RACES = 100

# Of the lists that were read last, so many with so many entries are kept, for processes that have
# one session after the other. Their names are digests, whatever store they are of.
_KEPT, _MAX_KEPT = 4, 200_000


@dataclass(frozen=True, slots=True)
class Owner:
    """The one collector at work: its random id, its process, until when (seconds since 1970)."""

    id: str
    host: str
    until: int

    def is_dead(self, now: float) -> bool:
        """Whether it has ended for certain, or its lease ran out long enough before ``now``."""
        return self.until + SLACK_SECONDS < now or hosts.is_gone(self.host)


@dataclass(frozen=True, slots=True)
class State:
    """``gc/state``: the epoch, and the names of the lists that hold (``None``: nothing on it).

    ``nonce`` is new at each write, ``updated`` when that was, in seconds since 1970.
    """

    epoch: int = 0
    nonce: str = ""
    updated: int = 0
    condemned: bytes | None = None
    deleting: bytes | None = None
    owner: Owner | None = None

    def encode(self) -> bytes:
        """Return the stored JSON."""
        owner = self.owner
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "epoch": self.epoch,
                "nonce": self.nonce,
                "updated": self.updated,
                "condemned": "" if self.condemned is None else self.condemned.hex(),
                "deleting": "" if self.deleting is None else self.deleting.hex(),
                "owner": {}
                if owner is None
                else {"id": owner.id, "host": owner.host, "until": owner.until},
            }
        )


@dataclass(frozen=True, slots=True, order=True)
class Condemned:
    """A key found dead: at which epoch, and when, in seconds since 1970 by the store's clock."""

    key: str
    epoch: int
    time: float


def parse_state(data: bytes) -> State:
    """Decode ``gc/state``. Raises ``CorruptError``, ``UnsupportedFormatError``."""
    what = STATE_KEY
    value = canonical.decode(data, what)
    if canonical.field(value, "format", int, what) > FORMAT:
        raise UnsupportedFormatError(f"{what} is of a newer format", hint="upgrade envstore")
    owner = canonical.field(value, "owner", dict, what)
    return State(
        _number(value, "epoch"),
        _text(value, "nonce"),
        _number(value, "updated"),
        _list_name(value, "condemned"),
        _list_name(value, "deleting"),
        Owner(_text(owner, "id"), _text(owner, "host"), _number(owner, "until")) if owner else None,
    )


def _number(value: dict[str, Any], name: str) -> int:
    found: int = canonical.field(value, name, int, STATE_KEY)
    if not 0 <= found < _END:
        raise CorruptError(f"{STATE_KEY} has no valid {name!r}")
    return found


def _text(value: dict[str, Any], name: str) -> str:
    found: str = canonical.field(value, name, str, STATE_KEY)
    if len(found) > _MAX_TEXT:
        raise CorruptError(f"{STATE_KEY} has no valid {name!r}")
    return found


def _list_name(value: dict[str, Any], name: str) -> bytes | None:
    text = _text(value, name)
    found = parse_hex(text)
    if text and found is None:
        raise CorruptError(f"{STATE_KEY} has no valid {name!r}")
    return found


def read_state(objects: ObjectStore) -> tuple[State, str | None]:
    """Return the state and its version for ``put_state``. One request."""
    try:
        data, version = objects.get_versioned(STATE_KEY)
    except NotFoundError:
        return State(), None
    return parse_state(data), version


def put_state(objects: ObjectStore, state: State, version: str | None) -> tuple[State, str]:
    """Move ``gc/state`` on from ``version``; returns what is stored, with its nonce and time.

    One request, three after an unclear answer. Raises ``ConflictError`` if somebody else moved it,
    ``UnavailableError`` if that cannot be learnt.
    """
    new = replace(state, nonce=secrets.token_hex(16), updated=int(objects.now()))
    try:
        return new, objects.put_if(STATE_KEY, new.encode(), version)
    except (ConflictError, UnavailableError):
        # The write may have landed although its answer was lost.
        found, current = read_state(objects)
        if found.nonce == new.nonce and current is not None:
            return new, current
        raise


def list_key(name: bytes) -> str:
    """Return the object key of a list."""
    return f"{LISTS}{name.hex()}"


def encode_list(entries: Iterable[Condemned], written: float, nonce: bytes) -> tuple[bytes, bytes]:
    """Return the name and the bytes of the list of ``entries``, of which no key comes twice.

    ``written`` is the time by the store's clock, and ``nonce`` 16 random bytes: no two lists have
    one name, so that a list that is no longer named by ``gc/state`` never is again.

    Raises ``UsageError`` for more than fits into one list.
    """
    rows = sorted(entries)
    keys = "\n".join(row.key for row in rows).encode("ascii")
    body = b"".join(
        (
            U64.pack(int(written)),
            nonce,
            U32.pack(len(rows)),
            U32.pack(len(keys)),
            keys,
            pack_array(array("Q", (row.epoch for row in rows))),
            pack_array(array("Q", (int(row.time) for row in rows))),
        )
    )
    if len(body) > MAX_BODY:
        raise UsageError(f"{len(rows)} keys do not fit into one list", hint="make it shorter")
    return digest(body), seal(MAGIC, body)


def open_list(data: bytes, name: bytes) -> tuple[int, list[Condemned]]:
    """Return when the list ``name`` was written, and its entries by key.

    Raises ``CorruptError``, ``UnsupportedFormatError``.
    """
    what = f"list {name.hex()} of what is doomed"
    body, found = unseal(MAGIC, data, limit=MAX_BODY, what=what)
    if found != name:
        raise CorruptError(f"{what} does not match its name")
    return parse_list(body)


def parse_list(body: bytes) -> tuple[int, list[Condemned]]:
    """Return when a list was written, and the entries in its body. Raises ``CorruptError``."""
    what = "a list of what is doomed"
    cursor = Cursor(body)
    written = cursor.u64()
    cursor.take(_NONCE)
    count = cursor.u32()
    try:
        text = bytes(cursor.take(cursor.u32())).decode("ascii")
    except UnicodeDecodeError:
        raise CorruptError(f"{what} holds malformed keys") from None
    epochs, times = (cursor.array(count, 8) for _ in range(2))
    cursor.finish()
    keys = text.split("\n") if text else []
    # Who finishes a deletion trusts the list: nothing else than these can be on it.
    if len(keys) != count or not all(key.startswith(PREFIXES) and is_key(key) for key in keys):
        raise CorruptError(f"{what} holds malformed keys")
    if any(a >= b for a, b in pairwise(keys)):
        raise CorruptError(f"{what} is not in order")
    rows = zip(keys, epochs, map(float, times), strict=True)
    return written, [Condemned(*row) for row in rows]


class _Recent:
    """Lists by name, the newest first. Replaced as a whole, so that no thread needs a lock."""

    lists: tuple[tuple[bytes, tuple[Condemned, ...]], ...] = ()


_recent = _Recent()


def read_list(objects: ObjectStore, name: bytes | None) -> list[Condemned]:
    """Return the entries of a list, by key; those of ``None`` are none. At most one request.

    Raises ``NotFoundError`` if it was removed: ``gc/state`` has moved on.
    """
    if name is None:
        return []
    for known, rows in _recent.lists:
        if known == name:
            return list(rows)
    found = open_list(objects.get(list_key(name)), name)[1]
    if len(found) <= _MAX_KEPT:
        _recent.lists = ((name, tuple(found)), *_recent.lists[: _KEPT - 1])
    return found


def write_list(objects: ObjectStore, entries: Collection[Condemned]) -> bytes | None:
    """Store a list and return its name for ``State``; ``None`` if nothing is on it."""
    if not entries:
        return None
    name, data = encode_list(entries, objects.now(), secrets.token_bytes(_NONCE))
    objects.put(list_key(name), data)
    return name


@dataclass(frozen=True, slots=True)
class Doomed:
    """``gc/state`` with what is on its lists."""

    state: State
    version: str | None
    condemned: Sequence[Condemned]
    deleting: Sequence[Condemned]

    def keys(self) -> frozenset[str]:
        """Return all doomed keys."""
        return frozenset(row.key for rows in (self.condemned, self.deleting) for row in rows)


def read_doomed(objects: ObjectStore) -> Doomed:
    """Return the state and both lists as they belong together. One request, three if not empty."""

    def read(state: State) -> tuple[list[Condemned], list[Condemned]]:
        return read_list(objects, state.condemned), read_list(objects, state.deleting)

    state, version, (condemned, deleting) = _consistent(objects, read)
    return Doomed(state, version, condemned, deleting)


def read_deleting(objects: ObjectStore) -> list[Condemned]:
    """Return what is being deleted just now. One request, two if that is anything."""
    return _consistent(objects, lambda state: read_list(objects, state.deleting))[2]


def _consistent(objects: ObjectStore, read: Callable[[State], _T]) -> tuple[State, str | None, _T]:
    """Return the state, its version, and what ``read`` finds in the lists it names."""
    for _ in range(_RACES):
        state, version = read_state(objects)
        try:
            return state, version, read(state)
        except NotFoundError:
            # A list is removed once no state names it.
            again, _ = read_state(objects)
            if again.nonce == state.nonce:
                raise CorruptError(
                    f"{objects.url} has lost a list that {STATE_KEY} names",
                    hint="run `envstore repair`",
                ) from None
    raise ConflictError(f"{STATE_KEY} moves too fast to be read", hint="try again")


def settle(objects: ObjectStore, state: State) -> None:
    """Return once no deletion of those who owned ``state`` can take effect any more.

    To be called before ``owner`` is taken from one that is dead, or from none. None of these
    deletes anything from then on: whoever is about to notices that its lease is over, or is not
    there. No request; waits up to ``SLACK_SECONDS`` after a deletion without an answer. Raises
    ``UnavailableError`` if a process in between hinders it.
    """
    if state.deleting is None:
        return
    left = 0.0
    if state.owner is None:
        # It gave back its lease, and left here what it has had no answer to.
        left = min(state.updated + SLACK_SECONDS - objects.now(), SLACK_SECONDS)
    # Else its lease ran out SLACK_SECONDS ago, or the process is gone: then its kernel, which is
    # ours too, has sent what it had to send, and every connection of it is being closed.
    objects.settle(max(left, 0.0))


def claim(objects: ObjectStore, keys: Collection[str]) -> Doomed:
    """Take ``keys`` off the lists, so that they can be relied on or written; returns what is left.

    What is condemned stays where it is. What is being deleted is waited for while its collector
    lives; if that is dead the deletion is finished, after which the key does not exist. At least
    one request, about four for each attempt. Raises ``UnavailableError`` after ten minutes.
    """
    wanted = frozenset(keys)
    until = time.monotonic() + PATIENCE
    while True:
        found = read_doomed(objects)
        state = found.state
        if any(row.key in wanted for row in found.deleting):
            if state.owner is None or state.owner.is_dead(objects.now()):
                _finish(objects, found, wanted)
            elif time.monotonic() > until:
                raise UnavailableError(
                    f"{objects.url} has been deleting what is needed here for {PATIENCE:.0f} s",
                    hint="see whether its `envstore gc` hangs, and end that",
                )
            else:
                time.sleep(_PAUSE)
            continue
        left = [row for row in found.condemned if row.key not in wanted]
        if len(left) == len(found.condemned):
            return found
        try:
            new = replace(state, condemned=write_list(objects, left))
            stored, version = put_state(objects, new, found.version)
        except ConflictError:
            _check_patience(until)
            continue
        return Doomed(stored, version, left, found.deleting)


def _check_patience(until: float) -> None:
    if time.monotonic() > until:
        raise ConflictError(f"{STATE_KEY} moves too fast", hint="try again")


def _finish(objects: ObjectStore, found: Doomed, wanted: frozenset[str]) -> None:
    """Delete those of ``wanted`` that a dead collector has left half deleted.

    As the owner, and for no longer than a lease: what another has written since must not be hit.
    """
    settle(objects, found.state)
    begun = _elapsed()
    owner = Owner(secrets.token_hex(16), hosts.here(), int(objects.now() + LEASE_SECONDS))

    def check() -> None:
        if _elapsed() - begun > LEASE_SECONDS / 2:
            raise TooLateError("a deletion took too long", hint="try again")

    try:
        state, version = put_state(objects, replace(found.state, owner=owner), found.version)
        for row in found.deleting:
            if row.key not in wanted:
                continue
            try:
                objects.delete_within(row.key, DELETION_SECONDS, check)
            except TooLateError:
                return  # the next attempt goes on
            except AccessDeniedError:
                # Then it stays, and nobody else is about to delete it.
                continue
        left = [row for row in found.deleting if row.key not in wanted]
        after = replace(state, deleting=write_list(objects, left), owner=None)
        put_state(objects, after, version)
    except ConflictError:
        return  # another does it, or has


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
