from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from envstore.errors import AccessDeniedError, EnvstoreError, NoSpaceError, UsageError
from envstore.store.cache import (
    DEFAULT_CAPACITY,
    BlobCache,
    default_cache,
    default_directory,
    parse_size,
)
from envstore.store.cachespace import CacheFullError, CacheSpace
from envstore.store.digest import digest
from tests.trees import noise

_BLOCK = 4096


def _blob(seed: int | str, size: int = 10_000) -> tuple[bytes, bytes]:
    data = noise(seed, size)
    return digest(data), data


def _real(root: Path) -> int:
    """Return the bytes that blobs take on disk right now; nobody reserves or evicts meanwhile."""
    with open(root / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inodes = {}
        for folder in ("blobs", "partial"):
            for path, _, files in os.walk(root / folder):
                for name in files:
                    try:
                        st = os.stat(os.path.join(path, name))
                    except FileNotFoundError:
                        continue
                    inodes[st.st_ino] = st.st_blocks * 512
        return sum(inodes.values())


def _use(cache: BlobCache, name: bytes, *, ago: float) -> None:
    """Say that a blob was last used so many seconds ago."""
    then = time.time_ns() - int(ago * 1e9)
    os.utime(cache.path(name), ns=(then, then))


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache", 100 * _BLOCK)


def test_put_and_read(cache: BlobCache) -> None:
    name, data = _blob(1)
    assert cache.read(name) is None
    assert not cache.contains(name)
    cache.put(name, data)
    assert cache.contains(name)
    assert cache.read(name) == data
    assert cache.read(name, 10, 20) == data[10:30]
    assert cache.read(name, 9_990) == data[9_990:]
    assert cache.read(name, 10_000, 0) == b""
    assert cache.usage() == type(cache.usage())(12_288, 1, cache.capacity)
    assert cache.filled() == 12_288


def test_a_cache_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert BlobCache(tmp_path / "none").filled() == 0


def test_a_view_may_be_put(cache: BlobCache) -> None:
    name, data = _blob(1)
    cache.put(name, memoryview(b"x" + data)[1:])
    assert cache.read(name) == data


def test_an_empty_blob(cache: BlobCache) -> None:
    cache.put(digest(b""), b"")
    assert cache.read(digest(b"")) == b""
    assert cache.usage().bytes == 0


def test_a_blob_shorter_than_asked_is_not_cached(cache: BlobCache) -> None:
    name, data = _blob(1)
    cache.put(name, data)
    assert cache.read(name, 9_990, 11) is None
    assert cache.read(name, 20_000, 1) is None
    os.truncate(cache.path(name), 5_000)
    assert cache.read(name, 0, 10_000) is None
    assert cache.read(name, 0, 10_000, nowait=True) is None


def test_reading_without_waiting(cache: BlobCache) -> None:
    name, data = _blob(1, 1 << 16)
    cache.put(name, data)
    assert cache.read(digest(b"other"), 0, 1, nowait=True) is None
    fd = os.open(cache.path(name), os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    try:
        assert cache.read(name, 5, 1000, nowait=True) == data[5:1005]
    except BlockingIOError:
        # The ordinary read brings it into memory.
        assert cache.read(name) == data
        assert cache.read(name, 5, 1000, nowait=True) == data[5:1005]


def test_no_wait_is_told_where_the_file_system_cannot_promise_it(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    name, data = _blob(1)
    cache.put(name, data)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(BlockingIOError):
        cache.read(name, 0, 10, nowait=True)


def test_putting_again_counts_once(cache: BlobCache) -> None:
    name, data = _blob(1)
    for _ in range(3):
        cache.put(name, data)
    assert cache.usage().bytes == 12_288


def test_dropping_and_clearing(cache: BlobCache) -> None:
    blobs = [_blob(i) for i in range(5)]
    for name, data in blobs:
        cache.put(name, data)
    cache.drop(blobs[0][0])
    cache.drop(blobs[0][0])
    cache.drop(digest(b"never there"))
    assert cache.read(blobs[0][0]) is None
    assert (cache.usage().bytes, cache.usage().blobs) == (4 * 12_288, 4)
    assert cache.clear() == 4 * 12_288
    assert (cache.usage().bytes, cache.usage().blobs) == (0, 0)
    assert cache.read(blobs[1][0]) is None
    cache.put(*blobs[0])
    assert cache.read(blobs[0][0]) == blobs[0][1]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 100 * _BLOCK)
    blobs = [_blob(i) for i in range(33)]
    for i, (name, data) in enumerate(blobs):
        cache.put(name, data)
        _use(cache, name, ago=100 - i)
    # Reading counts as use, by any process.
    for i in (0, 3):
        assert BlobCache(cache.root, cache.capacity).read(blobs[i][0]) is not None
    cache.put(*_blob("new"))
    gone = [i for i, (name, _) in enumerate(blobs) if not cache.contains(name)]
    assert gone == [1, 2, 4]  # a tenth of the cap is freed at a time
    assert cache.contains(_blob("new")[0])
    assert cache.usage().bytes <= cache.capacity


def test_as_much_is_evicted_as_is_needed(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 30 * _BLOCK)
    blobs = [_blob(i) for i in range(10)]
    for i, (name, data) in enumerate(blobs):
        cache.put(name, data)
        _use(cache, name, ago=100 - i)
    cache.put(*_blob("large", 25 * _BLOCK))
    assert [cache.contains(name) for name, _ in blobs] == [False] * 9 + [True]


def test_a_blob_above_the_cap_is_refused_and_costs_nobody(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 10 * _BLOCK)
    cache.put(*_blob(1))
    with pytest.raises(NoSpaceError, match=f"capped at {10 * _BLOCK} bytes") as caught:
        cache.put(*_blob("huge", 10 * _BLOCK + 1))
    assert "ENVSTORE_CACHE_SIZE" in str(caught.value)
    assert cache.contains(_blob(1)[0])
    cache.put(*_blob("fits", 10 * _BLOCK))


def test_a_cap_that_is_in_the_way_is_told_from_a_full_disk(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 10 * _BLOCK)
    with pytest.raises(CacheFullError):
        cache.put(*_blob("huge", 11 * _BLOCK))
    assert issubclass(CacheFullError, NoSpaceError)


def test_bytes_being_written_are_not_evicted(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 10 * _BLOCK)
    filling = cache.begin(8 * _BLOCK)
    with pytest.raises(NoSpaceError, match="being written"):
        cache.put(*_blob(1))
    os.close(filling.fd)  # as if its writer had died
    cache.put(*_blob(1))
    assert not os.path.exists(filling.path)
    assert cache.usage().bytes == 3 * _BLOCK


def test_many_threads_on_one_cache(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 60 * _BLOCK)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                name, data = _blob(rng.randrange(40), 1 + rng.randrange(9_000))
                cache.put(name, data)
                found = cache.read(name)
                assert found is None or found == data
                if rng.random() < 0.1:
                    cache.drop(name)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    accounted = cache.usage().bytes
    assert _real(cache.root) <= accounted <= cache.capacity
    assert os.listdir(cache.root / "partial") == []


_WRITER = """
import random, sys
from pathlib import Path
from envstore.store.cache import BlobCache
from envstore.store.digest import digest

root, capacity, seed, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache = BlobCache(root, capacity)
rng = random.Random(seed)
for _ in range(count):
    data = random.Random(rng.randrange(300)).randbytes(rng.choice((1, 4096, 4097, 60_000, 250_000)))
    name = digest(data)
    cache.put(name, data)
    found = cache.read(name)
    assert found is None or found == data
    print(flush=True)
"""


def _writer(root: Path, capacity: int, seed: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(root), str(capacity), str(seed), str(count)],
        stdout=subprocess.PIPE,
    )


def test_the_cap_holds_while_many_processes_write(tmp_path: Path) -> None:
    capacity = 3_000_000
    cache = BlobCache(tmp_path / "cache", capacity)
    cache.usage()  # makes the lock
    writers = [_writer(cache.root, capacity, seed, 150) for seed in range(4)]
    most = counted = 0
    while any(writer.poll() is None for writer in writers):
        pipes = [writer.stdout for writer in writers if writer.stdout]
        for pipe in select.select(pipes, [], [], 10)[0]:
            os.read(pipe.fileno(), 4096)
        most = max(most, _real(cache.root))
        counted += 1
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
        assert writer.wait() == 0
    assert counted > 3
    assert 0.3 * capacity < most <= capacity
    assert _real(cache.root) <= cache.usage().bytes <= capacity
    assert os.listdir(cache.root / "partial") == []


# Kills itself as it enters the n-th call that changes anything on disk.
_DOOMED = """
import os, signal, sys
doom = int(sys.argv.pop())
calls = 0

def deadly(call):
    def wrapped(*args, **more):
        global calls
        calls += 1
        if calls == doom:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)
    return wrapped

""" + _WRITER.replace(
    "rng = random",
    """for name in ("pwrite", "link", "unlink", "ftruncate", "open", "makedirs"):
    setattr(os, name, deadly(getattr(os, name)))
rng = random""",
)


def test_a_writer_killed_anywhere_leaves_the_cap_and_the_count_right(tmp_path: Path) -> None:
    # Three blobs fill the cap, so that every kind of step, evicting included, is met soon.
    capacity = 300_000
    cache = BlobCache(tmp_path / "cache", capacity)
    died = 0
    for doom in [*range(1, 15), 23, 32, 41, 57]:
        done = subprocess.run(
            [
                *(sys.executable, "-c", _DOOMED, str(cache.root)),
                *(str(capacity), str(doom), "30", str(doom)),
            ],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        died += done.returncode == -9
        accounted = cache.usage().bytes
        assert _real(cache.root) <= accounted <= capacity
        for folder, _, files in os.walk(cache.root / "blobs"):
            for name in files:
                path = Path(folder) / name
                # Only whole blobs have a name.
                assert digest(path.read_bytes()).hex() == name
    assert died >= 15
    # The next eviction counts anew; nothing is lost for good.
    for seed in range(4):
        cache.put(*_blob(seed, 100_000))
    assert os.listdir(cache.root / "partial") == []
    blobs = sum(
        -(-os.stat(os.path.join(folder, name)).st_size // _BLOCK) * _BLOCK
        for folder, _, files in os.walk(cache.root / "blobs")
        for name in files
    )
    assert cache.usage().bytes == blobs


def test_a_lost_count_is_made_again(cache: BlobCache) -> None:
    for i in range(5):
        cache.put(*_blob(i))
    before = cache.usage()
    for damage in (b"", b"\1\2"):
        (cache.root / "lock").write_bytes(damage)
        assert cache.usage() == before
    (cache.root / "lock").unlink()
    cache.put(*_blob("more"))
    assert cache.usage().bytes == before.bytes + 12_288
    (cache.root / "lock").unlink()
    cache.drop(_blob("more")[0])
    assert cache.usage() == before


def test_a_cache_that_was_removed_is_made_again(cache: BlobCache) -> None:
    for part in (".", "partial", "blobs", "blobs/" + _blob(1)[0].hex()[:2]):
        cache.put(*_blob(1))
        shutil.rmtree(cache.root / part)
        assert cache.read(_blob(1)[0]) is None or part == "partial"
        cache.drop(_blob(1)[0])
        cache.put(*_blob(2))
        assert cache.read(_blob(2)[0]) == _blob(2)[1]
        cache.usage()
        cache.clear()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", root], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield root
    subprocess.run(["umount", root], check=True)


def test_a_full_disk_gives_back_old_blobs_first(tiny_disk: Path) -> None:
    cache = BlobCache(tiny_disk / "cache", 1 << 30)
    for i in range(40):
        name, data = _blob(i, 200_000)
        cache.put(name, data)
        assert cache.read(name) == data
    usage = cache.usage()
    assert usage.blobs >= 1
    assert usage.bytes <= 2 << 20
    assert os.listdir(cache.root / "partial") == []


def test_a_disk_that_others_fill_is_told_and_mends(tiny_disk: Path) -> None:
    cache = BlobCache(tiny_disk / "cache", 1 << 30)
    cache.put(*_blob(0, 100_000))
    other = tiny_disk / "other"
    with open(other, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(_BLOCK))
    with pytest.raises(NoSpaceError, match="No space left") as caught:
        cache.put(*_blob(1, 300_000))
    assert "free space" in str(caught.value)
    assert os.listdir(cache.root / "partial") == []
    assert _real(cache.root) <= cache.usage().bytes
    other.unlink()
    cache.put(*_blob(1, 300_000))
    assert cache.read(_blob(1, 300_000)[0]) == _blob(1, 300_000)[1]
    assert cache.usage().bytes == _real(cache.root)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1000", 1000), ("20G", 20 << 30), ("512M", 512 << 20), ("512MiB", 512 << 20),
        ("512MB", 512 << 20), ("1k", 1024), ("3T", 3 << 40), (" 5B ", 5),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1 G", "1E", "ten", "1GG", "1iB2"])
def test_malformed_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_the_environment_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "envstore"
    assert default_cache().capacity == DEFAULT_CAPACITY
    monkeypatch.setenv("ENVSTORE_CACHE_DIR", str(tmp_path / "chosen"))
    monkeypatch.setenv("ENVSTORE_CACHE_SIZE", "7M")
    assert (default_cache().root, default_cache().capacity) == (tmp_path / "chosen", 7 << 20)
    monkeypatch.setenv("ENVSTORE_CACHE_SIZE", "seven")
    with pytest.raises(UsageError):
        default_cache()


def test_places_that_cannot_hold_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvstoreError, match=r"the cache .*file"):
        BlobCache(tmp_path / "file", 100)
    with pytest.raises(EnvstoreError):
        BlobCache(tmp_path / "file" / "below", 100)


def test_errors_of_the_disk_say_what_and_how_to_mend(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, data = _blob(1)
    for code, kind in (
        (errno.EACCES, AccessDeniedError),
        (errno.EROFS, AccessDeniedError),
        (errno.EIO, EnvstoreError),
        (errno.EDQUOT, NoSpaceError),
    ):

        def fail(*_: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            # The count is kept with the same call, so only the blob itself may be refused.
            patch.setattr(CacheSpace, "_set_total", lambda self, lock, total: None)
            with pytest.raises(kind, match="the cache ") as caught:
                cache.put(name, data)
        assert caught.value.hint
        assert not cache.contains(name)
        assert os.listdir(cache.root / "partial") == []


def test_nobody_else_may_look(cache: BlobCache) -> None:
    cache.put(*_blob(1))
    for path, _, files in os.walk(cache.root / "blobs"):
        assert os.stat(path).st_mode & 0o077 == 0
        for name in files:
            assert os.stat(os.path.join(path, name)).st_mode & 0o077 == 0
