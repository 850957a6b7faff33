"""What every backend promises, asked of each of them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import accumulate
from pathlib import Path

import pytest

from envstore.errors import ConflictError, CorruptError, NotFoundError, UsageError
from envstore.store.objects import ObjectInfo, ObjectStore, open_objects
from envstore.store.objects.base import TooLateError
from tests.s3server import S3Server

THREADS = 16
OpenStore = Callable[[str], ObjectStore]


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture(params=["file", "s3"])
def open_prefix(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenStore]:
    """A function that opens the store below a prefix that no other test has."""
    with ExitStack() as stack:
        if request.param == "file":

            def url(prefix: str) -> str:
                return f"file://{tmp_path / 'objects' / prefix}"

        else:
            server: S3Server = request.getfixturevalue("s3_server")
            for name, value in server.env.items():
                monkeypatch.setenv(name, value)
            bucket: str = request.getfixturevalue("bucket")
            own = os.urandom(8).hex()

            def url(prefix: str) -> str:
                return server.url(bucket, f"{own}/{prefix}")

        yield lambda prefix: stack.enter_context(closing(open_objects(url(prefix), create=True)))


@pytest.fixture
def objects(open_prefix: OpenStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty store, of each backend in turn."""
    # A server on a busy machine may take its time over many writers of one key.
    monkeypatch.setenv("ENVSTORE_S3_TIMEOUT", "120")
    return open_prefix("some/prefix")


@pytest.mark.parametrize("size", [0, 1, 70_000, 3 << 20, 9 << 20])
def test_what_was_put_is_got(objects: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    objects.put("packs/aa/x", data)
    assert objects.get("packs/aa/x") == data
    assert objects.get_versioned("packs/aa/x")[0] == data
    assert objects.size("packs/aa/x") == size


@pytest.mark.parametrize(
    "sizes", [[], [0, 0], [5, 0, 7], [70_000, 1, 3 << 20], [5 << 20, 1, 9 << 20], [1] * 3000]
)
def test_buffers_are_stored_one_after_the_other(objects: ObjectStore, sizes: list[int]) -> None:
    data = os.urandom(sum(sizes))
    ends = list(accumulate(sizes))
    buffers = [memoryview(data)[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    before = objects.traffic.bytes_out
    objects.put("packs/aa/x", buffers)
    assert objects.traffic.bytes_out - before == len(data)
    assert objects.get("packs/aa/x") == data
    objects.put("packs/aa/x", memoryview(data))
    assert objects.get("packs/aa/x") == data


def test_a_second_put_replaces_the_first(objects: ObjectStore) -> None:
    objects.put("index/x", b"a longer object")
    objects.put("index/x", b"short")
    assert objects.get("index/x") == b"short"
    assert objects.size("index/x") == 5


def test_nothing_there(objects: ObjectStore) -> None:
    objects.put("a/there", b"x")
    for key in ("missing", "a/missing", "b/c/missing", "a", "a/there/below"):
        with pytest.raises(NotFoundError, match="does not exist"):
            objects.get(key)
        with pytest.raises(NotFoundError, match="does not exist"):
            objects.get_versioned(key)
        with pytest.raises(NotFoundError, match="does not exist"):
            objects.get_range(key, 0, 1)
        assert objects.size(key) is None
        objects.delete(key)
    assert objects.get("a/there") == b"x"


def test_ranges(objects: ObjectStore) -> None:
    data = os.urandom(100_000)
    objects.put("packs/x", data)
    chosen = random.Random(1)
    cases = [(0, 1), (0, len(data)), (len(data) - 1, 1), (50_000, 50_000), (7, 0), (10**9, 0)]
    for _ in range(20):
        start = chosen.randrange(len(data))
        cases.append((start, chosen.randrange(len(data) - start + 1)))
    for start, length in cases:
        assert objects.get_range("packs/x", start, length) == data[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 5), (10**12, 1)])
def test_a_range_that_is_not_all_there(objects: ObjectStore, start: int, length: int) -> None:
    objects.put("packs/x", b"0123456789")
    with pytest.raises(CorruptError, match="packs/x"):
        objects.get_range("packs/x", start, length)


def test_a_negative_range_is_a_mistake_of_the_caller(objects: ObjectStore) -> None:
    objects.put("x", b"0123456789")
    for start, length in ((-1, 5), (0, -1)):
        with pytest.raises(ValueError, match="negative"):
            objects.get_range("x", start, length)


@pytest.mark.parametrize(("start", "length"), [(0, 0), (0, 1), (7, 2_999_000), (3_000_000, 1)])
def test_a_range_comes_in_pieces(objects: ObjectStore, start: int, length: int) -> None:
    data = os.urandom(3_000_001)
    objects.put("packs/x", data)
    before = objects.traffic.bytes_in
    assert b"".join(objects.iter_range("packs/x", start, length)) == data[start : start + length]
    assert objects.traffic.bytes_in - before == length
    if length > 1:
        pieces = objects.iter_range("packs/x", start, length)
        first = next(pieces)
        assert first == data[start : start + len(first)]
        assert len(first) < length
        pieces.close()  # type: ignore[attr-defined]


def test_pieces_of_what_is_not_there(objects: ObjectStore) -> None:
    objects.put("packs/x", bytes(1000))
    for start, length in ((0, 1001), (999, 2), (1000, 1), (5000, 10)):
        with pytest.raises(CorruptError, match="too short"):
            list(objects.iter_range("packs/x", start, length))
    with pytest.raises(NotFoundError):
        list(objects.iter_range("packs/y", 0, 1))
    with pytest.raises(ValueError, match="negative"):
        list(objects.iter_range("packs/x", -1, 1))


def test_delete(objects: ObjectStore) -> None:
    objects.put("refs/a", b"1")
    objects.put("refs/b", b"2")
    objects.delete("refs/a")
    with pytest.raises(NotFoundError):
        objects.get("refs/a")
    assert objects.size("refs/a") is None
    assert [info.key for info in objects.list("")] == ["refs/b"]


def test_delete_within(objects: ObjectStore) -> None:
    for key in ("packs/a", "packs/b"):
        objects.put(key, b"1")
    checked: list[int | None] = []
    objects.delete_within("packs/a", 30, lambda: checked.append(objects.size("packs/a")))
    assert checked == [1]
    assert [info.key for info in objects.list("")] == ["packs/b"]
    objects.delete_within("packs/a", 30, lambda: None)
    objects.settle(0)


def test_nothing_is_deleted_when_the_check_fails(objects: ObjectStore) -> None:
    objects.put("packs/a", b"1")

    def check() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        objects.delete_within("packs/a", 30, check)
    assert objects.get("packs/a") == b"1"
    objects.settle(0)


def test_a_deletion_is_done_in_time_or_not_at_all(objects: ObjectStore) -> None:
    objects.put("packs/a", b"1")
    late = threading.Event()

    def check() -> None:
        # Longer than the server takes it for: it counts whole seconds.
        time.sleep(2.5)
        late.set()

    def delete() -> None:
        with suppress(TooLateError):
            objects.delete_within("packs/a", 1, check)

    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(delete)
        while objects.url.startswith("file") and not late.is_set():
            # Whoever has settled may write the key anew: only when the other is done.
            objects.settle(0)
        deleting.result()
    assert objects.size("packs/a") == (None if objects.url.startswith("file") else 1)
    objects.delete_within("packs/a", 30, lambda: None)
    assert objects.size("packs/a") is None


def test_list_goes_by_the_characters_of_the_key(objects: ObjectStore) -> None:
    sizes = {"refs/a/x": 1, "refs/a/y/z": 2, "refs/ab": 3, "refs-2": 4, "packs/ff/q": 5}
    for key, size in sizes.items():
        objects.put(key, bytes(size))

    def listed(prefix: str) -> list[ObjectInfo]:
        return sorted(objects.list(prefix), key=lambda info: info.key)

    def expected(prefix: str) -> list[ObjectInfo]:
        return [ObjectInfo(k, sizes[k]) for k in sorted(sizes) if k.startswith(prefix)]

    for prefix in ("", "refs", "refs/", "refs/a", "refs/a/", "refs/a/y", "refs/a/x", "p", "packs/"):
        assert listed(prefix) == expected(prefix), prefix
    for prefix in ("nothing", "nothing/", "refs/a/x/", "refs/a/xx", "packs/ff/q/deep/"):
        assert listed(prefix) == [], prefix


def test_list_of_more_than_one_page(objects: ObjectStore) -> None:
    keys = {f"packs/{number % 7:02x}/{number:05}" for number in range(1100)}
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda key: objects.put(key, key.encode()), keys))
    found = list(objects.list("packs/"))
    assert len(found) == len(keys)
    assert {info.key for info in found} == keys
    assert all(info.size == len(info.key) for info in found)


def test_put_if_creates_once(objects: ObjectStore) -> None:
    version = objects.put_if("refs/r", b"first", None)
    assert objects.get_versioned("refs/r") == (b"first", version)
    with pytest.raises(ConflictError):
        objects.put_if("refs/r", b"second", None)
    assert objects.get_versioned("refs/r") == (b"first", version)


def test_put_if_moves_only_what_it_saw(objects: ObjectStore) -> None:
    first = objects.put_if("refs/r", b"first", None)
    second = objects.put_if("refs/r", b"second", first)
    assert first != second
    with pytest.raises(ConflictError):
        objects.put_if("refs/r", b"third", first)
    assert objects.get_versioned("refs/r") == (b"second", second)
    objects.put("refs/r", b"put by force")
    with pytest.raises(ConflictError):
        objects.put_if("refs/r", b"third", second)
    assert objects.get("refs/r") == b"put by force"


def test_put_if_on_what_is_gone(objects: ObjectStore) -> None:
    version = objects.put_if("refs/r", b"first", None)
    objects.delete("refs/r")
    with pytest.raises(ConflictError):
        objects.put_if("refs/r", b"second", version)
    assert objects.size("refs/r") is None
    objects.put_if("refs/r", b"again", None)
    assert objects.get("refs/r") == b"again"


def test_a_counter_moved_by_many_threads_is_exact(objects: ObjectStore) -> None:
    objects.put_if("refs/counter", b"0", None)
    start = threading.Barrier(THREADS)

    def count(_: int) -> None:
        start.wait()
        for _ in range(3):
            while True:
                data, version = objects.get_versioned("refs/counter")
                try:
                    objects.put_if("refs/counter", b"%d" % (int(data) + 1), version)
                    break
                except ConflictError:
                    continue

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(count, range(THREADS)))
    assert int(objects.get("refs/counter")) == 3 * THREADS


def test_of_many_creators_one_wins(objects: ObjectStore) -> None:
    for number in range(3):
        start = threading.Barrier(THREADS)

        def create(body: bytes, key: str, start: threading.Barrier) -> bytes | None:
            start.wait()
            try:
                objects.put_if(key, body, None)
            except ConflictError:
                return None
            return body

        key = f"refs/{number}"
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(create, b"%d" % i, key, start) for i in range(THREADS)]
        winners = [won for future in futures if (won := future.result()) is not None]
        assert winners == [objects.get(key)]


def test_a_reader_sees_one_write_or_another_never_a_mixture(objects: ObjectStore) -> None:
    bodies = {bytes([letter]) * 300_000 for letter in b"abcdefgh"}
    objects.put("index/x", min(bodies))
    stop = threading.Event()

    def write() -> None:
        try:
            for _ in range(5):
                for body in bodies:
                    objects.put("index/x", body)
        finally:
            stop.set()

    def read() -> int:
        seen = 0
        while not (last := stop.is_set()) or not seen:
            assert objects.get("index/x") in bodies
            assert objects.get_range("index/x", 1000, 5) in {body[:5] for body in bodies}
            seen += not last
        return seen

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(read) for _ in range(3)]
        pool.submit(write).result()
        assert all(future.result() for future in futures)


def test_many_threads_at_once(objects: ObjectStore) -> None:
    def work(number: int) -> None:
        data = random.Random(number).randbytes(50_000)
        objects.put(f"packs/{number}", data)
        assert objects.get(f"packs/{number}") == data
        assert objects.get_range(f"packs/{number}", 100, 1000) == data[100:1100]
        assert objects.size(f"packs/{number}") == len(data)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(4 * THREADS)))


def test_two_prefixes_know_nothing_of_each_other(open_prefix: OpenStore) -> None:
    one, longer = open_prefix("team"), open_prefix("team-2")
    one.put("refs/x", b"one")
    longer.put("refs/x", b"longer")
    longer.put("refs/y", b"only here")
    assert one.get("refs/x") == b"one"
    assert [info.key for info in one.list("")] == ["refs/x"]
    assert one.size("refs/y") is None
    one.delete("refs/x")
    assert longer.get("refs/x") == b"longer"


def test_any_printable_character_may_be_in_a_key(objects: ObjectStore) -> None:
    names = [
        "a b",
        "a+b",
        "100%",
        "%2e%2e",
        "q?x=1&y=2",
        "x#y",
        "~!$'()*,:;=@[]^`{|}",
        'quo"te',
    ]
    for name in names:
        objects.put(f"refs/{name}/{name}", name.encode())
    for name in names:
        assert objects.get(f"refs/{name}/{name}") == name.encode()
        assert [i.key for i in objects.list(f"refs/{name}/")] == [f"refs/{name}/{name}"]
    assert {info.key for info in objects.list("")} == {f"refs/{n}/{n}" for n in names}
    for name in names:
        objects.delete(f"refs/{name}/{name}")
    assert list(objects.list("")) == []


BAD_KEYS = [
    *("", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../x", "a/../../x", "a/./b", "a/.."),
    *(
        ".tmp/x",
        ".locks/00",
        "a\\b",
        "a\0b",
        "a\nb",
        "caf\u00e9",
        "\ud800",
        "x" * 256,
        "a/" * 500 + "a",
    ),
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_malformed_key_is_refused_by_every_operation(objects: ObjectStore, key: str) -> None:
    operations: list[Callable[[], object]] = [
        lambda: objects.get(key),
        lambda: objects.get_range(key, 0, 1),
        lambda: objects.get_range(key, 0, 0),
        lambda: objects.get_versioned(key),
        lambda: objects.put(key, b""),
        lambda: objects.put_if(key, b"", None),
        lambda: objects.size(key),
        lambda: objects.delete(key),
        lambda: objects.delete_within(key, 30, lambda: None),
    ]
    for operation in operations:
        with pytest.raises(UsageError, match="malformed object key"):
            operation()
    assert objects.traffic.requests <= 1  # opening may have asked for the bucket


@pytest.mark.parametrize("prefix", ["/", "../", "a/../b", "a//", ".tmp/", "\n"])
def test_a_malformed_prefix_is_refused(objects: ObjectStore, prefix: str) -> None:
    with pytest.raises(UsageError, match="malformed object key"):
        list(objects.list(prefix))


def test_traffic_is_counted(objects: ObjectStore) -> None:
    requests, sent = objects.traffic.requests, objects.traffic.bytes_out
    objects.put("packs/x", bytes(5000))
    objects.get("packs/x")
    objects.get_range("packs/x", 0, 100)
    objects.size("packs/x")
    assert objects.traffic.requests == requests + 4
    assert objects.traffic.bytes_out == sent + 5000
    assert objects.traffic.bytes_in == 5100


def test_closing_twice(objects: ObjectStore) -> None:
    objects.put("x", b"")
    objects.close()
    objects.close()


@pytest.mark.parametrize("sizes", [[], [0], [1], [3 << 20], [5, 0, 700_000, 1], [7] * 3000])
def test_a_range_fills_buffers(objects: ObjectStore, sizes: list[int]) -> None:
    data = os.urandom(3 << 20)
    objects.put("packs/x", data)
    buffers = [bytearray(size) for size in sizes]
    start = min(1000, len(data) - sum(sizes))
    before = objects.traffic.bytes_in
    arrived: list[int] = []
    objects.get_range_into("packs/x", start, [memoryview(one) for one in buffers], arrived.append)
    assert b"".join(buffers) == data[start : start + sum(sizes)]
    assert objects.traffic.bytes_in - before == sum(arrived) == sum(sizes)


def test_buffers_that_cannot_be_filled(objects: ObjectStore) -> None:
    objects.put("packs/x", bytes(1000))
    for start, length in ((0, 1001), (999, 2), (1000, 1), (5000, 10)):
        with pytest.raises(CorruptError, match="too short"):
            objects.get_range_into("packs/x", start, [memoryview(bytearray(length))])
    with pytest.raises(NotFoundError):
        objects.get_range_into("packs/y", 0, [memoryview(bytearray(1))])
    with pytest.raises(ValueError, match="negative"):
        objects.get_range_into("packs/x", -1, [memoryview(bytearray(1))])

    class GivenUpError(Exception):
        """Raised by whoever waits."""

    def give_up(size: int) -> None:
        raise GivenUpError

    with pytest.raises(GivenUpError):
        objects.get_range_into("packs/x", 0, [memoryview(bytearray(1000))], give_up)
    filled = bytearray(b"x" * 1000)
    objects.get_range_into("packs/x", 0, [memoryview(filled)])
    assert filled == bytes(1000)


def test_the_time_is_that_of_the_store(objects: ObjectStore) -> None:
    before = time.time()
    objects.put("envstore.json", b"{}")
    first = objects.now()
    assert abs(first - before) < 60  # the server is this machine
    assert objects.now() >= first
    assert [info.key for info in objects.list("")] == ["envstore.json"]
