"""A tree as checkpoints have it, stores that seem far away, and what a read costs."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from envstore.store.locations import Locations
from envstore.store.manifest import read_entries
from envstore.store.objects.base import ObjectStore
from envstore.store.ranges import Content, Range
from envstore.store.repository import Repository
from envstore.store.scatter import scatter
from envstore.store.source import Kind
from envstore.store.whereabouts import Whereabouts
from tests.faulty import FaultyStore
from tests.trees import noise, prose

MIB = 1 << 20
TENSORS = {
    "embed": 5 * MIB,
    "a": 2 * MIB,
    "scale": 400,
    "b": 2 * MIB,
    "bias": 100_000,
    "c": MIB,
    "d": 3 * MIB,
}
"""Bytes of each tensor of ``model.safetensors``, in order."""
OTHER = "ranks/00001/model.safetensors"
"""A file that holds the tensor ``a`` too."""


def fill(root: Path) -> None:
    """Write files of every sort that is stored in its own way."""
    root.mkdir(parents=True)
    (root / "ranks" / "00001").mkdir(parents=True)
    (root / "model.safetensors").write_bytes(_safetensors(TENSORS))
    (root / OTHER).write_bytes(_safetensors({"a": TENSORS["a"]}))
    (root / "state.json").write_bytes(prose("state", 30_000))
    (root / "text").write_bytes(prose("text", 2 * MIB))
    (root / "holes").write_bytes(noise(1, MIB) + bytes(3 * MIB) + noise(2, 100))
    (root / "empty").write_bytes(b"")


def _safetensors(sizes: dict[str, int]) -> bytes:
    table, at = {}, 0
    for name, size in sizes.items():
        table[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    body = b"".join(noise(name, size) for name, size in sizes.items())
    return len(header).to_bytes(8, "little") + header + body


def tensor_start(root: Path, name: str, path: str = "model.safetensors") -> int:
    """Return where a tensor begins in a file."""
    data = (root / path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    start: int = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    return 8 + length + start


class FarStore(FaultyStore):
    """A store in a directory that says of itself that it is a server."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.url = "s3://far/away?endpoint=http://127.0.0.1:1"


def unmoved(locations: Locations) -> Whereabouts:
    """Return locations that the store has no others of."""
    return Whereabouts(locations, lambda: locations)


class Opened:
    """A snapshot's files, by the plain means of the store."""

    def __init__(self, repository: Repository, snapshot: bytes) -> None:
        self.repository = repository
        manifest = repository.snapshot(snapshot).manifest
        self.root, self.locations = repository.located(manifest)
        self.contents: dict[str, Content] = {}
        first = 0
        for entry in read_entries(repository.parts(self.root, self.locations)):
            if entry.kind is Kind.FILE:
                path = entry.path.decode()
                self.contents[path] = Content.of(path, entry.refs, first)
                first += len(entry.refs)

    def read(
        self, wanted: Sequence[tuple[str, int, int]], *, threads: int | None = None
    ) -> list[bytes]:
        """Return the bytes of ``(path, start, length)`` each."""
        buffers = [bytearray(length) for _, _, length in wanted]
        ranges = [
            Range(self.contents[path], start, memoryview(buffer))
            for (path, start, _), buffer in zip(wanted, buffers, strict=True)
        ]
        scatter(self.repository, unmoved(self.locations), ranges, threads=threads)
        return list(map(bytes, buffers))

    def everything(self) -> list[tuple[str, int, int]]:
        """Return what stands for all bytes of all files."""
        return [(path, 0, content.size) for path, content in self.contents.items()]


def some_ranges(rng: random.Random, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return random ranges of files of these sizes, from nothing up to all."""
    found = []
    for _ in range(rng.randrange(12)):
        path = rng.choice(sorted(sizes))
        start = rng.choice((0, rng.randint(0, sizes[path])))
        length = rng.choice((sizes[path] - start, rng.randint(0, sizes[path] - start)))
        found.append((path, start, length))
    return found


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Check that whatever is done here ends with as many threads as it began with."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
