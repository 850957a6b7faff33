from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from envstore.errors import EnvstoreError
from envstore.store import chunking
from envstore.store.chunking import (
    AVERAGE_SIZE,
    HOLE_BLOCK,
    MAX_SIZE,
    MIN_SIZE,
    TENSOR_PIECE,
    Chunk,
    Cutter,
    Hole,
)
from envstore.store.digest import EMPTY, digest
from envstore.store.source import WINDOW
from tests.trees import noise, prose

# Blocks of a file as a seed and how it is filled; "almost" blocks differ from a hole in one byte.
_NOISE = noise("block", HOLE_BLOCK)
_BLOCKS = {
    "noise": _NOISE,
    "prose": prose("block", HOLE_BLOCK),
    "zero": bytes(HOLE_BLOCK),
    "almost, last": bytes(HOLE_BLOCK - 1) + b"\1",
    "almost, first": b"\1" + bytes(HOLE_BLOCK - 1),
    "zero start": bytes(HOLE_BLOCK // 2) + _NOISE[: HOLE_BLOCK // 2],
    "zero end": _NOISE[: HOLE_BLOCK // 2] + bytes(HOLE_BLOCK // 2),
}
_blocks = st.lists(st.sampled_from(sorted(_BLOCKS)), max_size=7)
_tails = st.tuples(
    st.sampled_from(["noise", "prose", "zero"]),
    st.one_of(
        st.integers(0, HOLE_BLOCK - 1),
        st.sampled_from([0, 1, MIN_SIZE, MIN_SIZE + 1, AVERAGE_SIZE, MAX_SIZE, HOLE_BLOCK - 1]),
    ),
)


def _file(blocks: list[str], tail: tuple[str, int]) -> bytes:
    return b"".join(_BLOCKS[name] for name in blocks) + _BLOCKS[tail[0]][: tail[1]]


def _windows(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut ``data`` into windows of so many blocks each, the last size being repeated."""
    at, size = 0, 1
    sizes = iter(sizes)
    while at < len(data):
        size = next(sizes, size)
        yield data[at : at + size * HOLE_BLOCK]
        at += size * HOLE_BLOCK


def _cut(data: bytes, sizes: Iterable[int] = (4,), *, tensors: bool = False) -> list[Chunk | Hole]:
    """Return the pieces, after checking the whole-file digest that must come last."""
    *pieces, whole = Cutter().cut(_windows(data, sizes), len(data), tensors=tensors)
    assert whole == digest(data)
    return [piece for piece in pieces if not isinstance(piece, bytes)]


def _joined(pieces: list[Chunk | Hole]) -> bytes:
    return b"".join(
        bytes(piece.length) if isinstance(piece, Hole) else piece.data for piece in pieces
    )


def _shape(pieces: list[Chunk | Hole]) -> list[tuple[str, int, bytes]]:
    return [
        ("hole", piece.length, b"")
        if isinstance(piece, Hole)
        else ("chunk", len(piece.data), piece.digest)
        for piece in pieces
    ]


def _expected(data: bytes) -> list[tuple[str, int, bytes]]:
    """What the format says, done in the plainest way: holes first, then each run as a whole."""
    if len(data) <= MIN_SIZE:
        return [("chunk", len(data), digest(data))] if data else []
    blocks = [data[at : at + HOLE_BLOCK] for at in range(0, len(data), HOLE_BLOCK)]
    found: list[tuple[str, int, bytes]] = []
    run = b""
    for block in [*blocks, b""]:
        zero = block == bytes(HOLE_BLOCK)
        if run and (zero or not block):
            cdc = FastCDC(
                min_size=MIN_SIZE,
                avg_size=AVERAGE_SIZE,
                max_size=MAX_SIZE,
                normalized_chunking=1,
                seed=0,
            )
            found += [("chunk", c.length, digest(bytes(c.data))) for c in cdc.cut_buf(run)]
            run = b""
        if not zero:
            run += block
        elif found and found[-1][0] == "hole":
            found[-1] = ("hole", found[-1][1] + HOLE_BLOCK, b"")
        else:
            found.append(("hole", HOLE_BLOCK, b""))
    return found


@given(_blocks, _tails, st.lists(st.integers(1, 5), max_size=4))
@settings(max_examples=60)
def test_cuts_are_those_of_the_whole_file_however_it_is_read(
    blocks: list[str], tail: tuple[str, int], sizes: list[int]
) -> None:
    data = _file(blocks, tail)
    pieces = _cut(data, sizes)
    assert _shape(pieces) == _expected(data)
    assert _joined(pieces) == data


@given(_blocks, _tails)
@settings(max_examples=30)
def test_chunks_keep_their_bounds_and_their_names(blocks: list[str], tail: tuple[str, int]) -> None:
    data = _file(blocks, tail)
    pieces = _cut(data)
    for piece, following in pairwise([*pieces, None]):
        if isinstance(piece, Hole):
            assert piece.length > 0
            assert piece.length % HOLE_BLOCK == 0
            assert not isinstance(following, Hole)
        else:
            assert digest(piece.data) == piece.digest
            assert 0 < len(piece.data) <= MAX_SIZE
            if isinstance(following, Chunk):
                assert len(piece.data) >= MIN_SIZE


@given(st.integers(0, 3 * MIN_SIZE))
def test_sizes_around_the_smallest_chunk(size: int) -> None:
    data = _NOISE[:size]
    pieces = _cut(data)
    assert _joined(pieces) == data
    assert (len(pieces) <= 1) or size > MIN_SIZE


def test_an_empty_file_has_no_chunk() -> None:
    assert list(Cutter().cut(iter(()), 0)) == [EMPTY]


@pytest.mark.parametrize("size", [HOLE_BLOCK, 4 * HOLE_BLOCK, 9 * HOLE_BLOCK])
def test_zeros_are_one_hole(size: int) -> None:
    assert _shape(_cut(bytes(size))) == [("hole", size, b"")]


def test_a_hole_is_found_only_at_its_own_granularity() -> None:
    # Two MiB of zeros that start one byte late hold one aligned MiB.
    data = b"x" + bytes(2 * HOLE_BLOCK) + b"y"
    shape = _shape(_cut(data))
    assert [piece for piece in shape if piece[0] == "hole"] == [("hole", HOLE_BLOCK, b"")]


@given(st.integers(0, 5 * HOLE_BLOCK), st.integers(1, 4000), st.booleans())
@settings(max_examples=25)
def test_an_edit_changes_only_the_chunks_near_it(at: int, size: int, insert: bool) -> None:
    data = noise("edited", 5 * HOLE_BLOCK)
    edited = data[:at] + noise("edit", size) + data[at + (0 if insert else size) :]
    old = {piece[2] for piece in _shape(_cut(data))}
    new = [piece for piece in _shape(_cut(edited)) if piece[2] not in old]
    # Resynchronising takes a few chunks; measured means are near two.
    assert sum(length for _, length, _ in new) <= 12 * AVERAGE_SIZE + size


def test_average_chunk_size() -> None:
    sizes = [length for _, length, _ in _shape(_cut(noise("average", 24 << 20)))]
    assert AVERAGE_SIZE / 2 < sum(sizes) / len(sizes) < AVERAGE_SIZE * 2


def test_one_cutter_cuts_file_after_file() -> None:
    # The library keeps state, which must not leak from one file into the next.
    cutter = Cutter()
    files = [noise(i, 700_000 + i) for i in range(4)]
    for data in (*files, *files):
        *pieces, _ = cutter.cut(_windows(data, (1,)), len(data))
        assert _shape(pieces) == _expected(data)  # type: ignore[arg-type]


def test_an_abandoned_file_leaves_nothing_behind() -> None:
    cutter = Cutter()
    data = noise("abandoned", 3 * HOLE_BLOCK)
    cut = cutter.cut(_windows(data, (1,)), len(data))
    next(cut)
    cut.close()  # type: ignore[attr-defined]
    *pieces, _ = cutter.cut(_windows(data, (1,)), len(data))
    assert _shape(pieces) == _expected(data)  # type: ignore[arg-type]


def test_errors_of_the_reader_pass_through() -> None:
    def windows() -> Iterator[bytes]:
        yield noise("error", HOLE_BLOCK)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Cutter().cut(windows(), 2 * HOLE_BLOCK))


def test_windows_of_a_source_never_split_a_hole_or_a_tensor_piece() -> None:
    assert WINDOW % HOLE_BLOCK == 0
    assert WINDOW >= TENSOR_PIECE


def test_the_slow_python_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        pass

    Slow.__module__ = "pyfastcdc.py.fastcdc"
    monkeypatch.setattr(chunking, "FastCDC", Slow)
    with pytest.raises(EnvstoreError, match="compiled core"):
        Cutter()


def test_the_cut_library_is_the_compiled_one() -> None:
    assert FastCDC.__module__ == "pyfastcdc.cy.fastcdc"
    assert sys.modules[FastCDC.__module__].__file__ is not None
