"""Snapshots: small objects that say what a manifest is; their digest is their identity."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError, UsageError
from envstore.store import canonical
from envstore.store.digest import digest, parse_hex
from envstore.store.objects.base import ObjectStore

FORMAT = 1
KINDS = ("env", "model", "checkpoint", "dir")
_KIND = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was pushed. ``created`` is RFC 3339 UTC; sizes are bytes; digests are 32 bytes."""

    kind: str
    manifest: bytes
    files: int
    logical_bytes: int
    created: str
    parents: tuple[bytes, ...] = ()
    lock: bytes | None = None
    message: str = ""
    attributes: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the canonical JSON that is stored and hashed."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "manifest": self.manifest.hex(),
            "files": self.files,
            "logical_bytes": self.logical_bytes,
            "created": self.created,
            "parents": [parent.hex() for parent in self.parents],
            "attributes": self.attributes,
        }
        if self.lock is not None:
            body["lock"] = self.lock.hex()
        if self.message:
            body["message"] = self.message
        return canonical.encode(body)

    @property
    def digest(self) -> bytes:
        """The snapshot's identity."""
        return digest(self.encode())


def snapshot_key(name: bytes) -> str:
    """Return the object key of a snapshot."""
    return f"snapshots/{name.hex()}"


def save_snapshot(objects: ObjectStore, snapshot: Snapshot) -> bytes:
    """Store ``snapshot`` and return its digest."""
    body = snapshot.encode()
    name = digest(body)
    objects.put(snapshot_key(name), body)
    return name


def load_snapshot(objects: ObjectStore, name: bytes) -> Snapshot:
    """Read and check one snapshot. Raises ``NotFoundError``, ``CorruptError``."""
    what = f"snapshot {name.hex()}"
    try:
        data = objects.get(snapshot_key(name))
    except NotFoundError as error:
        raise NotFoundError(f"{what} is not in {objects.url}", hint=error.hint) from None
    return parse_snapshot(data, name)


def parse_snapshot(data: bytes, name: bytes) -> Snapshot:
    """Decode the stored snapshot called ``name``. Raises ``CorruptError``."""
    what = f"snapshot {name.hex()}"
    if digest(data) != name:
        raise CorruptError(f"{what} does not match its name")
    value = canonical.decode(data, what)
    if canonical.field(value, "format", int, what) > FORMAT:
        raise UnsupportedFormatError(f"{what} is of a newer format", hint="upgrade envstore")
    attributes = canonical.field(value, "attributes", dict, what)
    lock = value.get("lock")
    kind = canonical.field(value, "kind", str, what)
    numbers = [canonical.field(value, name, int, what) for name in ("files", "logical_bytes")]
    if not _KIND.fullmatch(kind) or not all(0 <= number < 1 << 64 for number in numbers):
        raise CorruptError(f"{what} holds a kind or numbers that cannot be")
    return Snapshot(
        kind=kind,
        manifest=_digest(value.get("manifest"), what),
        files=numbers[0],
        logical_bytes=numbers[1],
        created=canonical.field(value, "created", str, what),
        parents=tuple(_digest(p, what) for p in canonical.field(value, "parents", list, what)),
        lock=None if lock is None else _digest(lock, what),
        message=str(value.get("message", "")),
        attributes={str(key): str(item) for key, item in attributes.items()},
    )


def _digest(text: object, what: str) -> bytes:
    found = parse_hex(text) if isinstance(text, str) else None
    if found is None:
        raise CorruptError(f"{what} holds a malformed digest")
    return found


def find_snapshot(objects: ObjectStore, prefix: str) -> bytes:
    """Return the digest of the one snapshot whose hex digest starts with ``prefix``.

    Raises ``UsageError`` (malformed or ambiguous), ``NotFoundError``.
    """
    if not _PREFIX.fullmatch(prefix):
        raise UsageError(f"@{prefix} is not a digest", hint="give 4 to 64 hex digits after the @")
    whole = parse_hex(prefix)
    if whole is not None:
        return whole
    found = [info.key.rpartition("/")[2] for info in objects.list(f"snapshots/{prefix}")]
    names = [name for name in map(parse_hex, found) if name is not None]
    if not names:
        raise NotFoundError(f"no snapshot starts with {prefix}", hint="see: envstore ls")
    if len(names) > 1:
        raise UsageError(f"@{prefix} matches {len(names)} snapshots", hint="give more digits")
    return names[0]
