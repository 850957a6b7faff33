"""The writer of packs, above all in its raw mode: nothing copied, nothing lost, memory bounded."""

from __future__ import annotations

import io
import os
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import NoSpaceError
from envstore.store import packs
from envstore.store.digest import digest
from envstore.store.frames import Codec, decode_frame, encode_frame
from envstore.store.index import DedupIndex, open_segment
from envstore.store.objects import ObjectStore, open_objects
from envstore.store.objects.body import Body, BodyFile, length, views
from envstore.store.packing import SEGMENT_PACKS, UPLOADS, PackWriter
from envstore.store.packs import frame_bytes, pack_key, parse_pack
from tests.faulty import FaultyStore
from tests.trees import noise, prose

pytestmark = pytest.mark.usefixtures("_no_fsync")

MIB = 1 << 20


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_objects(str(tmp_path / "store"), create=True)


def _write(objects: ObjectStore, chunks: list[memoryview], codec: Codec = Codec.RAW) -> DedupIndex:
    index = DedupIndex()
    writer = PackWriter(objects, index, codec=codec)
    try:
        for chunk in chunks:
            writer.add(digest(chunk), chunk)
        writer.flush()
    finally:
        writer.close()
    return index


def _read(objects: ObjectStore, index: DedupIndex, name: bytes, size: int) -> bytes:
    place = index.find(name)
    assert place is not None
    frame = index.frames[place[0]]
    stored = objects.get_range(pack_key(frame.pack), frame.offset, frame.stored)
    raw = decode_frame(stored, frame.codec, frame.raw, frame.digest)
    return raw[place[1] : place[1] + size]


@given(
    st.lists(
        st.sampled_from([1, 700, 300_000, MIB - 1, MIB, MIB + 1, 4 * MIB]), min_size=1, max_size=7
    ),
    st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("codec", [Codec.RAW, Codec.ZSTD])
def test_every_chunk_is_where_the_index_says(
    tmp_path_factory: pytest.TempPathFactory, codec: Codec, sizes: list[int], seed: int
) -> None:
    objects = open_objects(str(tmp_path_factory.mktemp("objects")), create=True)
    slot = memoryview(noise(seed, sum(sizes)))
    chunks, at = [], 0
    for size in sizes:
        chunks.append(slot[at : at + size])
        at += size
    index = _write(objects, chunks, codec)
    for chunk in chunks:
        assert _read(objects, index, digest(chunk), len(chunk)) == chunk


def test_large_chunks_have_frames_of_their_own_and_small_ones_share(objects: ObjectStore) -> None:
    sizes = [300_000, 300_000, 4 * MIB, 10, MIB, 700_000, 700_000, 5]
    chunks = [memoryview(noise(number, size)) for number, size in enumerate(sizes)]
    index = _write(objects, chunks)
    (info,) = objects.list("packs/")
    data = objects.get(info.key)
    pack = parse_pack(data, index.frames[0].pack)
    assert [list(frame.sizes) for frame in pack.frames] == [
        [300_000, 300_000], [4 * MIB], [10], [MIB], [700_000, 700_000], [5],
    ]  # fmt: skip
    assert {frame.codec for frame in pack.frames} == {Codec.RAW}
    assert b"".join(stored for _, stored in frame_bytes(pack, data)) == b"".join(chunks)
    (segment,) = objects.list("index/")
    name = bytes.fromhex(segment.key.removeprefix("index/"))
    assert open_segment(objects.get(segment.key), name) == [pack]


def test_what_would_compress_stays_raw(objects: ObjectStore) -> None:
    chunk = memoryview(prose(1, 2 * MIB))
    index = _write(objects, [chunk, memoryview(b"a" * 1000)])
    assert [(frame.stored, frame.codec) for frame in index.frames] == [
        (2 * MIB, Codec.RAW),
        (1000, Codec.RAW),
    ]


class _Watching(FaultyStore):
    """Notes what it is given to store, as it is given."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.bodies: list[Body] = []

    def put(self, key: str, data: Body) -> None:
        if key.startswith("packs/"):
            self.bodies.append(data)
        super().put(key, data)


def test_large_chunks_are_written_from_where_they_lie(objects: ObjectStore) -> None:
    watching = _Watching(objects)
    slot = bytearray(noise(1, 5 * MIB))
    _write(watching, [memoryview(slot)[: 4 * MIB], memoryview(slot)[4 * MIB :]])
    (body,) = watching.bodies
    held = [view for view in views(body) if len(view) >= MIB]
    before = bytes(slot[:1])
    slot[:1] = slot[4 * MIB : 4 * MIB + 1] = b"\xff" if before != b"\xff" else b"\0"
    assert [bytes(view[:1]) for view in held] == [bytes(slot[:1])] * 2


def test_one_large_chunk_is_not_hashed_again() -> None:
    data = noise(1, 2 * MIB)
    frame, stored = encode_frame([(b"n" * 32, memoryview(data))], codec=Codec.RAW)
    assert (frame.digest, frame.digests, frame.sizes) == (b"n" * 32,) * 2 + (array("I", [2 * MIB]),)
    assert isinstance(stored, memoryview)
    assert stored.obj is data


def test_few_packs_wait_for_the_store(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", MIB)
    store = FaultyStore(objects)
    gate = store.gate("put", key="packs/")
    slot = memoryview(noise(1, 40 * MIB))
    writer = PackWriter(store, DedupIndex(), codec=Codec.RAW)
    added = 0

    def fill() -> None:
        nonlocal added
        for at in range(0, len(slot), MIB):
            writer.add(digest(slot[at : at + MIB]), slot[at : at + MIB])
            added += 1
        writer.flush()

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        gate.wait_entered()
        thread.join(0.3)
        waiting = UPLOADS + 1 + 4 * len(os.sched_getaffinity(0)) + 4
        assert added <= waiting + 2
    finally:
        gate.open()
        thread.join()
        writer.close()
    assert added == 40
    assert len(list(objects.list("packs/"))) == 40
    assert len(list(objects.list("index/"))) == 40 // SEGMENT_PACKS


def test_an_interrupted_raw_push_leaves_lists_of_its_packs(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "TARGET_SIZE", MIB)
    store = FaultyStore(objects)
    store.fail("put", NoSpaceError("full"), key="packs/", skip=2)
    slot = memoryview(noise(1, 12 * MIB))
    writer = PackWriter(store, DedupIndex(), pending=tmp_path / "state", codec=Codec.RAW)

    def fill() -> None:
        for at in range(0, len(slot), MIB):
            writer.add(digest(slot[at : at + MIB]), slot[at : at + MIB])
        writer.flush()

    with pytest.raises(NoSpaceError, match="full"):
        fill()
    writer.close()
    stored = {info.key[-64:] for info in objects.list("packs/")}
    assert len(stored) == 2
    assert {path.name for path in (tmp_path / "state").iterdir()} == stored


def _pieces(body: bytes, cuts: list[int]) -> Iterator[memoryview]:
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        yield memoryview(body)[start:end]


@given(st.lists(st.integers(0, 5000)).map(sorted), st.data())
def test_a_file_of_buffers_is_a_file_of_their_bytes(cuts: list[int], data: st.DataObject) -> None:
    body = noise(1, 5000)
    file, same = BodyFile(list(_pieces(body, cuts))), io.BytesIO(body)
    assert len(file) == length(body) == 5000
    steps = st.one_of(
        st.tuples(st.just("read"), st.integers(0, 6000)),
        st.tuples(st.just("seek"), st.integers(0, 5000)),
    )
    for call, number in data.draw(st.lists(steps, max_size=12)):
        assert getattr(file, call)(number) == getattr(same, call)(number)
        assert file.tell() == same.tell()
    assert file.read() == same.read()
    assert file.seek(0, os.SEEK_END) == 5000
    assert file.seek(0) == 0
    assert file.readall() == body
