"""A snapshot of very many small files, written straight into a store.

Files that existed would take longer to make and to read than everything that is measured with
them. ``python -m benchmarks.large DIRECTORY FILES`` makes one in a new store and prints what it
takes to get it ready for serving, without a cache: time, and memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from envstore.store.creation import create_store
from envstore.store.digest import digest
from envstore.store.entries import Entry
from envstore.store.index import DedupIndex, LocationsBuilder
from envstore.store.locations import locations_key
from envstore.store.manifest import Root, build_parts, manifest_key
from envstore.store.packing import PackWriter
from envstore.store.refs import RefName, move_ref
from envstore.store.repository import Repository
from envstore.store.snapshots import Snapshot, save_snapshot
from envstore.store.source import Kind

_FILES_IN_DIRECTORY = 50
_DIRECTORIES_IN_PACKAGE = 100


def make_entries(files: int) -> Iterator[tuple[Entry, list[bytes]]]:
    """Yield entries in path order, each with its chunks' bytes, as an environment mixes them.

    In packages of 100 directories of 50 files: 5 % of the files are empty, 2 % have three chunks,
    10 % share their content with many others; 1 % are links instead.
    """
    number = 0
    package = folder = b""
    while number < files:
        if number % (_FILES_IN_DIRECTORY * _DIRECTORIES_IN_PACKAGE) == 0:
            package = b"package_%06d" % number
            yield Entry(package, Kind.DIRECTORY), []
        if number % _FILES_IN_DIRECTORY == 0:
            folder = package + b"/module_%08d" % number
            yield Entry(folder, Kind.DIRECTORY), []
        path = folder + b"/source_%02d.py" % (number % _FILES_IN_DIRECTORY)
        if number % 100 == 99:
            yield Entry(path, Kind.SYMLINK, target=b"source_%02d.py" % (number % 7)), []
        else:
            count = 0 if number % 20 == 0 else 3 if number % 50 == 1 else 1
            seed = number // 5000 if number % 10 == 3 else number
            chunks = [b"content %d of file %d\n" % (at, seed) for at in range(count)]
            refs = tuple((digest(chunk), len(chunk)) for chunk in chunks)
            whole = refs[0][0] if count == 1 else digest(b"".join(chunks))
            size = sum(map(len, chunks))
            yield Entry(path, Kind.FILE, number % 30 == 0, size, whole, refs), chunks
        number += 1


def make_snapshot(repository: Repository, name: str, files: int) -> bytes:
    """Store a snapshot of so many files and links as ref ``name``; returns its digest."""
    index = DedupIndex()
    writer = PackWriter(repository.objects, index)
    places: list[tuple[int, int]] = []
    totals = [0, 0, 0]

    def stored() -> Iterator[Entry]:
        for entry, chunks in make_entries(files):
            for (chunk_name, _), chunk in zip(entry.refs, chunks, strict=True):
                places.append(index.find(chunk_name) or writer.add(chunk_name, chunk))
            totals[0] += 1
            totals[1] += entry.kind is Kind.FILE
            totals[2] += entry.size
            yield entry

    try:
        parts = list(build_parts(stored()))
        writer.end_frame()
        at = [writer.add(info.digest, raw) for info, raw in parts]
        writer.flush()
    finally:
        writer.close()
    builder = LocationsBuilder(index.frames)
    for place in at:
        builder.part(place)
    for place in places:
        builder.ref(place)
    root = Root(tuple(info for info, _ in parts), *totals)
    objects = repository.objects
    objects.put(manifest_key(root.digest), root.seal())
    objects.put(locations_key(root.digest), builder.result.seal())
    made = save_snapshot(
        objects, Snapshot("dir", root.digest, root.files, root.logical, "2026-01-01T00:00:00Z")
    )
    move_ref(objects, RefName.parse(name), made, None)
    return made


_LOAD = """
import os, sys, time
from envstore.fuse.content import load_content
from envstore.store.repository import Repository

with Repository.open(sys.argv[1]) as repository:
    start = time.perf_counter()
    content = load_content(repository, bytes.fromhex(sys.argv[2]))
    seconds = time.perf_counter() - start
with open("/proc/self/status") as stream:
    peak = next(int(line.split()[1]) for line in stream if line.startswith("VmHWM:"))
image = os.fstat(content.fd).st_size
print(
    f"{len(content.tree):,} nodes: {seconds:.2f} s, at most {peak / 1024:.0f} MiB resident, "
    f"image {image / 2**20:.0f} MiB"
)
"""


def main() -> None:
    """Make a store with one snapshot, and load it in a process of its own."""
    directory, files = sys.argv[1:]
    url = create_store(f"file://{Path(directory).resolve()}", probe=False).url
    with Repository.open(url) as repository:
        snapshot = make_snapshot(repository, f"files-{files}", int(files))
    # Its peak is of the loading alone, and only a new process has that.
    subprocess.run([sys.executable, "-c", _LOAD, url, snapshot.hex()], check=True)


if __name__ == "__main__":
    main()
