"""Complete files in the cache: whole or not there, under one cap with the blobs, pinned or not."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from envstore.errors import CorruptError, NoSpaceError
from envstore.fuse.local import LocalFiles
from envstore.fuse.tree import Tree
from envstore.store.cache import BlobCache
from envstore.store.cachespace import CacheFullError
from envstore.store.digest import digest
from envstore.store.entries import HOLE
from tests.manifests import file, must_find, tree_of
from tests.trees import noise

BLOCK = 4096
CHUNK = 10_000
CONTENTS = {b"%02d" % number: noise(number, 3 * CHUNK - number) for number in range(20)}


def tree() -> Tree:
    return tree_of([file(name, data, chunk=CHUNK) for name, data in CONTENTS.items()])


def fill(local: LocalFiles, found: Tree, name: bytes) -> bytes:
    """Make one file; returns its key."""
    node = must_find(found, name)
    new = local.begin(found, node)
    for at, ref in reversed(list(enumerate(found.file_refs(node)))):
        new.write(ref, CONTENTS[name][at * CHUNK : (at + 1) * CHUNK])
    local.keep([new])
    return found.content_key(node)


def named(cache: BlobCache) -> list[str]:
    return sorted(path.name for path in cache.files.glob("*/*"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    made = BlobCache(tmp_path / "cache", 1 << 20)
    yield made
    assert os.listdir(made.root / "partial") == []


def test_a_file_is_there_when_it_is_whole(cache: BlobCache) -> None:
    local, found = LocalFiles(cache), tree()
    node = must_find(found, b"07")
    key, size = found.content_key(node), found.size(node)
    new = local.begin(found, node)
    for at, ref in enumerate(found.file_refs(node)):
        assert not local.contains(key, size)
        assert not new.complete
        new.write(ref, CONTENTS[b"07"][at * CHUNK : (at + 1) * CHUNK])
    assert new.complete
    assert named(cache) == []
    local.keep([new])
    assert local.contains(key, size)
    assert not local.contains(key, size + 1)
    path = Path(os.fsdecode(local.path(key)))
    assert path == local.directory / key.hex()[:2] / key.hex()
    assert path.read_bytes() == CONTENTS[b"07"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.stat().st_nlink == 1
    assert (cache.usage().bytes, cache.usage().files) == (8 * BLOCK, 1)


def test_wrong_bytes_are_refused(cache: BlobCache) -> None:
    local, found = LocalFiles(cache), tree()
    node = must_find(found, b"01")
    new = local.begin(found, node)
    first, *others = found.file_refs(node)
    good = CONTENTS[b"01"][:CHUNK]
    for wrong in (good[:-1] + b"?", good[:-1], good + b"?", b""):
        with pytest.raises(CorruptError, match="is not where its locations say"):
            new.write(first, wrong)
    for at, ref in enumerate(others, 1):
        new.write(ref, CONTENTS[b"01"][at * CHUNK : (at + 1) * CHUNK])
    with pytest.raises(CorruptError, match="not complete"):
        local.keep([new])
    assert named(cache) == []
    assert cache.usage().bytes == 0


def test_holes_take_no_space(cache: BlobCache) -> None:
    island = b"an island"
    refs = ((HOLE, 600_000), (digest(island), len(island)), (HOLE, 200_000))
    size = sum(size for _, size in refs)
    found = tree_of(
        [file(b"sparse", size=size, refs=refs), file(b"hole", size=9, refs=((HOLE, 9),))]
    )
    local = LocalFiles(cache)
    node, hole = must_find(found, b"sparse"), must_find(found, b"hole")
    new, empty = local.begin(found, node), local.begin(found, hole)
    assert empty.complete
    new.write(found.file_refs(node)[1], island)
    local.keep([new, empty])
    path = local.path(found.content_key(node))
    with open(path, "rb") as opened:
        assert opened.read() == bytes(600_000) + island + bytes(200_000)
    assert os.stat(path).st_blocks * 512 <= 2 * BLOCK
    with open(local.path(found.content_key(hole)), "rb") as opened:
        assert opened.read() == bytes(9)


def test_batches_get_their_names_together(cache: BlobCache) -> None:
    local, found = LocalFiles(cache), tree()
    files = []
    for name, data in CONTENTS.items():
        node = must_find(found, name)
        new = local.begin(found, node)
        for at, ref in enumerate(found.file_refs(node)):
            new.write(ref, data[at * CHUNK : (at + 1) * CHUNK])
        files.append(new)
    local.keep(files)
    assert len(named(cache)) == len(CONTENTS)
    assert cache.usage().bytes == 20 * 8 * BLOCK
    # Whoever comes second with the same file changes nothing.
    fill(local, found, b"03")
    assert cache.usage().bytes == 20 * 8 * BLOCK


def test_one_cap_for_files_and_blobs(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 40 * BLOCK)
    local, found = LocalFiles(cache), tree()
    blobs = [noise(f"blob {number}", 2 * BLOCK) for number in range(8)]
    for blob in blobs:
        cache.put(digest(blob), blob)
    for name in CONTENTS:
        fill(local, found, name)
        assert cache.usage().bytes <= cache.capacity
    assert not any(cache.contains(digest(blob)) for blob in blobs)
    kept = len(named(cache))
    assert 0 < kept <= 5
    for number in range(20):
        blob = noise(f"new {number}", 2 * BLOCK)
        cache.put(digest(blob), blob)
        assert cache.usage().bytes <= cache.capacity
    assert len(named(cache)) < kept


def test_nothing_is_evicted_for_what_does_not_want_that(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * BLOCK)
    blob = noise("blob", 4 * BLOCK)
    cache.put(digest(blob), blob)
    local, found = LocalFiles(cache), tree()
    with pytest.raises(CacheFullError):
        local.begin(found, must_find(found, b"01"), evict=False)
    assert cache.contains(digest(blob))
    assert cache.usage().bytes == 4 * BLOCK


def test_pinned_files_stay(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 40 * BLOCK)
    local, found = LocalFiles(cache), tree()
    pins = tmp_path / "cache/pins"
    keys = [fill(local, found, name) for name in (b"01", b"02", b"03")]
    sizes = [len(CONTENTS[name]) for name in (b"01", b"02", b"03")]
    absent = digest(b"absent")
    wanted = [*zip(keys, sizes, strict=True), (absent, 1)]
    assert local.pin(wanted, pins) == [absent]
    assert local.pin(wanted, pins) == [absent]
    assert cache.usage().pinned == 24 * BLOCK
    for number in range(20):
        blob = noise(f"new {number}", 2 * BLOCK)
        cache.put(digest(blob), blob)
        assert cache.usage().bytes <= cache.capacity
    assert all(local.contains(key, size) for key, size in wanted[:3])
    with pytest.raises(CacheFullError, match="pinned"):
        cache.put(digest(b"large"), bytes(20 * BLOCK))
    cache.clear()
    assert (cache.usage().bytes, cache.usage().blobs) == (24 * BLOCK, 0)
    for pin in pins.glob("*/*"):
        pin.unlink()
    cache.clear()
    assert (cache.usage().bytes, cache.usage().files) == (0, 0)


def test_pinning_mends_names(cache: BlobCache) -> None:
    local, found = LocalFiles(cache), tree()
    pins = cache.root / "pins"
    key, size = fill(local, found, b"05"), len(CONTENTS[b"05"])
    local.pin([(key, size)], pins)
    # Somebody removed the name, but not the pin.
    os.unlink(local.path(key))
    assert local.pin([(key, size)], pins) == []
    assert local.contains(key, size)
    # Removed and made again: the pin was of another file.
    os.unlink(local.path(key))
    fill(local, found, b"05")
    assert local.pin([(key, size)], pins) == []
    assert os.stat(local.path(key)).st_nlink == 2
    # Cut short, as after a power cut: neither is worth anything.
    os.truncate(local.path(key), 5)
    assert local.pin([(key, size)], pins) == [key]
    assert named(cache) == []


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 16 * BLOCK)
    script = """
import os, sys
from pathlib import Path
from envstore.fuse.local import LocalFiles
from envstore.store.cache import BlobCache
from tests.fuse.test_local import CONTENTS, CHUNK, must_find, tree
found = tree()
new = LocalFiles(BlobCache(Path(sys.argv[1]), 16 * 4096)).begin(found, must_find(found, b"01"))
new.write(found.file_refs(must_find(found, b"01"))[0], CONTENTS[b"01"][:CHUNK])
print("written", flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", script, str(cache.root)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.returncode) == (b"written\n", -signal.SIGKILL)
    assert named(cache) == []
    assert cache.usage().bytes == 8 * BLOCK
    local, found = LocalFiles(cache), tree()
    fill(local, found, b"01")
    fill(local, found, b"02")
    assert cache.usage().bytes == 16 * BLOCK
    assert os.listdir(cache.root / "partial") == []


def test_a_full_disk(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=52k", "none", tmp_path], check=True)
    try:
        cache = BlobCache(tmp_path / "cache")
        local, found = LocalFiles(cache), tree()
        fill(local, found, b"01")
        node = must_find(found, b"02")
        new = local.begin(found, node)
        refs, data = found.file_refs(node), CONTENTS[b"02"]
        new.write(refs[0], data[:CHUNK])
        with pytest.raises(NoSpaceError):
            new.write(refs[1], data[CHUNK : 2 * CHUNK])
        local.abandon([new])
        assert len(named(cache)) == 1
        assert cache.usage().bytes == 8 * BLOCK
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
