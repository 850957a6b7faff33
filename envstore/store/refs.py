"""Refs: names that are moved from snapshot to snapshot by compare-and-swap."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from envstore.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)
from envstore.store import canonical
from envstore.store.digest import parse_hex
from envstore.store.objects.base import ObjectStore
from envstore.store.snapshots import find_snapshot

FORMAT = 1
DEFAULT_NAMESPACE = "default"
DEFAULT_TAG = "latest"
_MAX_SEQUENCE = 1 << 63

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_REF = re.compile(rf"(?:(?P<namespace>{_PART})/)?(?P<name>{_PART})(?::(?P<tag>{_PART}))?")


def is_part(text: str) -> bool:
    """Return whether ``text`` may be the namespace, name or tag of a ref."""
    return re.fullmatch(_PART, text) is not None and ".." not in text


@dataclass(frozen=True, slots=True, order=True)
class RefName:
    """A parsed ``[namespace/]name[:tag]``."""

    namespace: str
    name: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> RefName:
        """Parse a ref as typed. Raises ``UsageError``."""
        match = _REF.fullmatch(text)
        if match is None or ".." in text:
            raise UsageError(
                f"{text!r} is not a valid ref",
                hint="write [namespace/]name[:tag] with letters, digits, '.', '_' and '-'",
            )
        return cls(
            match["namespace"] or DEFAULT_NAMESPACE, match["name"], match["tag"] or DEFAULT_TAG
        )

    @property
    def key(self) -> str:
        """The object key."""
        return f"refs/{self.namespace}/{self.name}/{self.tag}"

    def __str__(self) -> str:
        space = "" if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/"
        return f"{space}{self.name}:{self.tag}"


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a name points: the snapshot, how often it moved, and when (RFC 3339 UTC).

    ``nonce`` makes every body unique: equal bodies would have equal versions, and a ref that
    went from A to B and back would pass a comparison made at the first A.
    """

    snapshot: bytes
    sequence: int
    nonce: str
    updated: str

    def encode(self, name: RefName) -> bytes:
        """Return the JSON that is stored as ``name``."""
        return canonical.encode_checked(
            {
                "format": FORMAT,
                "ref": name.key.removeprefix("refs/"),
                "snapshot": self.snapshot.hex(),
                "sequence": self.sequence,
                "nonce": self.nonce,
                "updated": self.updated,
            }
        )


def _parse(data: bytes, name: RefName) -> Ref:
    what = f"ref {name}"
    value = canonical.decode(data, what)
    if canonical.field(value, "format", int, what) > FORMAT:
        raise UnsupportedFormatError(f"{what} is of a newer format", hint="upgrade envstore")
    # Those that were written before there was this field say nothing of where they belong.
    if f"refs/{value.get('ref')}" != name.key and "ref" in value:
        raise CorruptError(f"{what} holds another ref")
    snapshot = parse_hex(canonical.field(value, "snapshot", str, what))
    sequence = canonical.field(value, "sequence", int, what)
    if snapshot is None or not 0 <= sequence < _MAX_SEQUENCE:
        raise CorruptError(f"{what} holds a malformed digest or number")
    return Ref(
        snapshot,
        sequence,
        canonical.field(value, "nonce", str, what),
        canonical.field(value, "updated", str, what),
    )


def read_ref(objects: ObjectStore, name: RefName) -> Ref:
    """Return where ``name`` points. One request. Raises ``NotFoundError``."""
    return read_versioned(objects, name)[0]


def read_versioned(objects: ObjectStore, name: RefName) -> tuple[Ref, str]:
    """Return where ``name`` points and the version to pass to ``move_ref``."""
    try:
        data, version = objects.get_versioned(name.key)
    except NotFoundError:
        raise NotFoundError(
            f"no ref {name} in {objects.url}", hint="list them with: envstore ls"
        ) from None
    return _parse(data, name), version


def try_read(objects: ObjectStore, name: RefName) -> tuple[Ref, str] | None:
    """Return the ref and its version, or ``None`` if there is no such ref."""
    try:
        return read_versioned(objects, name)
    except NotFoundError:
        return None


def move_ref(
    objects: ObjectStore, name: RefName, snapshot: bytes, expected: tuple[Ref, str] | None
) -> Ref:
    """Point ``name`` at ``snapshot`` if it still is as ``expected`` (``None``: absent).

    Raises ``ConflictError`` if it moved meanwhile, ``UnavailableError`` if the outcome could not
    be learnt. After an unclear answer the ref is read again and the nonce compared, because a
    write may have landed although its answer was lost.
    """
    ref = Ref(
        snapshot,
        expected[0].sequence + 1 if expected else 1,
        secrets.token_hex(16),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        objects.put_if(name.key, ref.encode(name), expected[1] if expected else None)
    except (ConflictError, UnavailableError) as error:
        found = try_read(objects, name)
        if found is not None and found[0].nonce == ref.nonce:
            return ref
        if isinstance(error, UnavailableError) and _unmoved(found, expected):
            raise
        raise ConflictError(
            f"ref {name} was moved by someone else meanwhile", hint="look at it and try again"
        ) from None
    return ref


def _unmoved(found: tuple[Ref, str] | None, expected: tuple[Ref, str] | None) -> bool:
    before = expected[0].nonce if expected else None
    return (found[0].nonce if found else None) == before


def list_refs(objects: ObjectStore, prefix: str = "") -> Iterator[RefName]:
    """Yield every ref whose ``namespace/name/tag`` starts with ``prefix``, unordered."""
    for info in objects.list(f"refs/{prefix}"):
        parts = info.key.split("/")
        if len(parts) == 4 and all(re.fullmatch(_PART, part) for part in parts[1:]):
            yield RefName(*parts[1:])


def resolve(objects: ObjectStore, text: str) -> bytes:
    """Return the snapshot digest that a REF or ``@digest-prefix`` stands for.

    ``name@digest`` pins: the digest decides. Raises ``UsageError``, ``NotFoundError``.
    """
    head, at, pinned = text.partition("@")
    if at:
        if head:
            RefName.parse(head)
        return find_snapshot(objects, pinned)
    return read_ref(objects, RefName.parse(text)).snapshot
