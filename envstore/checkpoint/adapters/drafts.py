"""Files of a tree that is not complete yet: stored, but under no ref.

Writers that do not know of each other put each file of a checkpoint that PyTorch is writing under
``drafts/<namespace>/<name>/<tag>/<digest of the path>``. When the last one lands, all become part
of the tree at once. Until then no reader of the ref sees any of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from envstore.checkpoint.adapters.storing import (
    StoredFile,
    save_checkpoint_snapshot,
    store_entries,
)
from envstore.errors import CorruptError, NotFoundError, UnsupportedFormatError
from envstore.store import canonical
from envstore.store.digest import digest, parse_hex
from envstore.store.locations import NOWHERE
from envstore.store.manifest import HOLE
from envstore.store.refs import RefName
from envstore.store.repository import PARALLEL, Repository
from envstore.store.sessions import claim_bases
from envstore.store.source import Kind

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Draft:
    """One file: its path in the tree, its bytes, the snapshot that holds it alone."""

    path: bytes
    size: int
    snapshot: bytes
    created: str


class Drafts:
    """The drafts of a store. Blocking; safe to share between threads."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._objects = repository.objects

    def put(self, ref: RefName, file: StoredFile) -> None:
        """Keep a stored file, in place of one of the same path. Five requests."""
        root = store_entries(self._repository, [file.entry], files=[file])
        snapshot = save_checkpoint_snapshot(self._repository, root, (), kind="dir")
        self._write(ref, Draft(file.entry.path, file.entry.size, snapshot, _now()))

    def move(self, ref: RefName, draft: Draft, path: bytes) -> None:
        """Give a draft another path."""
        file = self.load(draft).at(path)
        self.put(ref, file)
        self.remove(ref, draft.path)

    def find(self, ref: RefName, path: bytes) -> Draft | None:
        """Return the draft of ``path``, if there is one. One request."""
        return self._read(_key(ref, path))

    def below(self, ref: RefName, directory: bytes = b"") -> list[Draft]:
        """Return the drafts in and below ``directory`` by path. A listing, a request for each."""
        keys = [info.key for info in self._objects.list(_prefix(ref))]
        if not keys:
            return []
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = [draft for draft in pool.map(self._read, keys) if draft is not None]
        start = directory + b"/" if directory else b""
        return sorted(
            (draft for draft in found if draft.path.startswith(start)), key=lambda one: one.path
        )

    def load(self, draft: Draft) -> StoredFile:
        """Return where the chunks of a draft lie. Raises ``CorruptError``, ``NotFoundError``."""
        claim_bases(self._repository, [draft.snapshot])
        manifest = self._repository.snapshot(draft.snapshot).manifest
        root, locations = self._repository.located(manifest)
        places = {}
        at = 0
        for part in self._repository.parts(root, locations):
            for name in map(bytes, _digests(part.ref_digests)):
                number = locations.ref_frames[at]
                if name != HOLE and number != NOWHERE:
                    places[name] = (locations.frames[number], locations.ref_offsets[at])
                at += 1
        entries = self._repository.entries(manifest)
        for entry in entries:
            if entry.kind is Kind.FILE and entry.path == draft.path:
                return StoredFile(entry, places)
        raise CorruptError(f"draft {draft.path!r} is not in its snapshot {draft.snapshot.hex()}")

    def remove(self, ref: RefName, path: bytes) -> None:
        """Forget a draft, if there is one."""
        self._objects.delete(_key(ref, path))

    def _write(self, ref: RefName, draft: Draft) -> None:
        body = {
            "format": FORMAT,
            "path": draft.path.decode(),
            "size": draft.size,
            "snapshot": draft.snapshot.hex(),
            "created": draft.created,
        }
        self._objects.put(_key(ref, draft.path), canonical.encode_checked(body))

    def _read(self, key: str) -> Draft | None:
        try:
            data = self._objects.get(key)
        except NotFoundError:
            return None
        what = f"draft {key}"
        value = canonical.decode(data, what)
        if canonical.field(value, "format", int, what) > FORMAT:
            raise UnsupportedFormatError(f"{what} is of a newer format", hint="upgrade envstore")
        snapshot = parse_hex(canonical.field(value, "snapshot", str, what))
        path = canonical.field(value, "path", str, what).encode()
        if snapshot is None or key.rpartition("/")[2] != digest(path).hex():
            raise CorruptError(f"{what} holds a malformed digest or another's path")
        return Draft(
            path,
            canonical.field(value, "size", int, what),
            snapshot,
            canonical.field(value, "created", str, what),
        )


def _digests(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def _prefix(ref: RefName) -> str:
    return f"drafts/{ref.namespace}/{ref.name}/{ref.tag}/"


def _key(ref: RefName, path: bytes) -> str:
    return _prefix(ref) + digest(path).hex()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
