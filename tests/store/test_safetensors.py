from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.store.chunking import HOLE_BLOCK, TENSOR_PIECE, Chunk, Cutter, Hole
from envstore.store.digest import digest
from envstore.store.safetensors import MAX_HEADER, MAX_TENSORS, tensor_cuts
from envstore.store.source import WINDOW
from tests.trees import noise

_PIECE = 1000


def _header(spans: dict[str, tuple[int, int]], **extra: Any) -> bytes:
    table: dict[str, Any] = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in spans.items()
    }
    return _prefixed(json.dumps({**extra, **table}).encode())


def _prefixed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _layout(sizes: list[int]) -> dict[str, tuple[int, int]]:
    spans, at = {}, 0
    for i, size in enumerate(sizes):
        spans[f"t{i}"] = (at, at + size)
        at += size
    return spans


def _cut(data: bytes, *, tensors: bool = True) -> list[Chunk | Hole]:
    windows = (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))
    *pieces, whole = Cutter().cut(windows, len(data), tensors=tensors)
    assert whole == digest(data)
    return [piece for piece in pieces if not isinstance(piece, bytes)]


def _names(data: bytes) -> list[bytes]:
    return [piece.digest for piece in _cut(data) if isinstance(piece, Chunk)]


@given(st.lists(st.integers(0, 5 * _PIECE), max_size=12), st.booleans())
def test_cuts_are_at_the_header_the_tensors_and_every_piece(
    sizes: list[int], metadata: bool
) -> None:
    extra = {"__metadata__": {"format": "pt"}} if metadata else {}
    head = _header(_layout(sizes), **extra)
    cuts = tensor_cuts(head, len(head) + sum(sizes), _PIECE)
    expected = [len(head)]
    for size in sizes:
        start = expected[-1]
        expected += [*range(start + _PIECE, start + size, _PIECE), start + size]
    assert cuts == list(dict.fromkeys(expected))


@given(st.permutations(range(6)))
def test_the_order_of_the_header_does_not_matter(order: list[int]) -> None:
    spans = _layout([10, 0, 3000, 5, 1000, 999])
    names = list(spans)
    head = _header({names[i]: spans[names[i]] for i in order})
    plain = _header(spans)
    size = len(head) + 5014
    assert len(head) == len(plain)
    assert tensor_cuts(head, size, _PIECE) == tensor_cuts(plain, size, _PIECE) is not None


_BAD: dict[str, tuple[bytes, int]] = {
    "empty file": (b"", 0),
    "shorter than the length": (b"\1\0\0", 3),
    "length alone": (bytes(8), 8),
    "no header": (_prefixed(b""), 8),
    "length beyond the file": ((1 << 20).to_bytes(8, "little") + b"{}", 10),
    "length beyond any bound": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", 1 << 40),
    "largest length": (b"\xff" * 8 + b"{}", 1 << 40),
    "not JSON": (_prefixed(b"{nothing}"), 17),
    "not UTF-8": (_prefixed(b'{"\xff": 1}'), 17),
    "deeply nested": (_prefixed(b"[" * 100_000), 100_008),
    "endless number": (_prefixed(b'{"a":{"data_offsets":[0,' + b"9" * 9999 + b"]}}"), 1 << 40),
    "a list": (_prefixed(b"[]"), 10),
    "tensor is no object": (_prefixed(b'{"a":1}'), 100),
    "no offsets": (_prefixed(b'{"a":{}}'), 100),
    "one offset": (_prefixed(b'{"a":{"data_offsets":[0]}}'), 100),
    "three offsets": (_prefixed(b'{"a":{"data_offsets":[0,1,2]}}'), 100),
    "offsets are text": (_prefixed(b'{"a":{"data_offsets":["0","1"]}}'), 100),
    "offsets are fractions": (_prefixed(b'{"a":{"data_offsets":[0.0,1.0]}}'), 100),
    "offsets are truths": (_prefixed(b'{"a":{"data_offsets":[false,true]}}'), 44),
    "negative": (_header({"a": (-1, 1)}), 100),
    "backwards": (_header({"a": (2, 1)}), 100),
    "gap at the start": (_header({"a": (1, 2)}), len(_header({"a": (1, 2)})) + 2),
    "gap": (_header({"a": (0, 1), "b": (2, 3)}), len(_header({"a": (0, 1), "b": (2, 3)})) + 3),
    "overlap": (_header({"a": (0, 2), "b": (1, 3)}), len(_header({"a": (0, 2), "b": (1, 3)})) + 3),
    "twice": (_header({"a": (0, 2), "b": (0, 2)}), len(_header({"a": (0, 2), "b": (0, 2)})) + 2),
    "bytes after the last": (_header({"a": (0, 2)}), len(_header({"a": (0, 2)})) + 3),
    "bytes missing": (_header({"a": (0, 2)}), len(_header({"a": (0, 2)})) + 1),
    "only metadata, then bytes": (_header({}, __metadata__={}), 200),
    "same name twice": (
        _prefixed(b'{"a":{"data_offsets":[0,1]},"a":{"data_offsets":[1,2]}}'),
        8 + 55 + 2,
    ),
}


@pytest.mark.parametrize("case", _BAD, ids=str)
def test_any_doubt_means_content_defined_cuts(case: str) -> None:
    head, size = _BAD[case]
    assert tensor_cuts(head, size, _PIECE) is None


def test_too_many_tensors() -> None:
    header = b"{" + b",".join(b'"%d":{}' % i for i in range(MAX_TENSORS + 1)) + b"}"
    assert len(header) < MAX_HEADER
    assert tensor_cuts(_prefixed(header), 1 << 40, _PIECE) is None


@given(st.data())
@settings(max_examples=300)
def test_altered_headers_give_sound_cuts_or_none(data: st.DataObject) -> None:
    head = bytearray(_header(_layout([100, 2500, 0, 7]), __metadata__={"a": "b"}))
    size = len(head) + 2607
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(head) - 1))
        head[at] = data.draw(st.sampled_from(b'0123456789,:[]{}" \0\xffa'))
    size += data.draw(st.sampled_from([0, 0, 0, -1, 1, -3000]))
    cuts = tensor_cuts(bytes(head), size, _PIECE)
    if cuts is not None:
        assert cuts[-1] == size
        assert all(0 < b - a <= _PIECE for a, b in pairwise(cuts))
        assert cuts[0] == 8 + int.from_bytes(head[:8], "little") <= min(len(head), size)


@given(st.binary(max_size=400), st.integers(0, 1000))
def test_arbitrary_bytes_never_raise(head: bytes, more: int) -> None:
    tensor_cuts(head, len(head) + more, _PIECE)
    tensor_cuts(_prefixed(head), 8 + len(head) + more, _PIECE)


def _model(order: list[int], *, note: str = "", sizes: dict[int, int]) -> bytes:
    spans, at = {}, 0
    for i in order:
        spans[f"layer.{i}"] = (at, at + sizes[i])
        at += sizes[i]
    head = _header(spans, __metadata__={"note": note})
    return head + b"".join(noise(f"tensor {i}", sizes[i]) for i in order)


_SIZES = {0: 6 << 20, 1: 300_000, 2: 1, 3: (4 << 20) + 5, 4: 70_000}


def test_another_header_costs_the_header_alone() -> None:
    one = _names(_model([0, 1, 2, 3, 4], sizes=_SIZES))
    two = _names(_model([0, 1, 2, 3, 4], note="x" * 301, sizes=_SIZES))
    assert one[0] != two[0]
    assert one[1:] == two[1:]


def test_another_order_of_tensors_costs_the_header_alone() -> None:
    one = _names(_model([0, 1, 2, 3, 4], sizes=_SIZES))
    two = _names(_model([3, 0, 4, 2, 1], sizes=_SIZES))
    assert set(one[1:]) == set(two[1:])


def test_other_shards_cost_the_headers_alone() -> None:
    whole = set(_names(_model([0, 1, 2, 3, 4], sizes=_SIZES)))
    shards = [_names(_model(part, sizes=_SIZES)) for part in ([0, 1], [2, 3], [4])]
    assert len(shards[2]) == 2
    assert all(set(names[1:]) <= whole for names in shards)


def test_pieces_count_from_the_start_of_their_tensor() -> None:
    pieces = _cut(_model([0, 1, 2, 3, 4], sizes=_SIZES))
    sizes = [len(piece.data) for piece in pieces[1:] if isinstance(piece, Chunk)]
    assert sizes == [TENSOR_PIECE, 2 << 20, 300_000, 1, TENSOR_PIECE, 5, 70_000]


def test_a_tensor_of_zeros_is_data_not_a_hole() -> None:
    # Holes would cut tensors at places that depend on where in the file they lie.
    head = _header({"a": (0, 5 << 20)})
    pieces = _cut(head + bytes(5 << 20))
    assert [type(piece) for piece in pieces] == [Chunk, Chunk, Chunk]


def test_a_header_as_long_as_allowed_is_used() -> None:
    spans = {"a": (0, 5)}
    padding = MAX_HEADER - len(_header(spans, __metadata__={"p": ""})) + 8
    head = _header(spans, __metadata__={"p": "x" * padding})
    assert len(head) == MAX_HEADER + 8
    pieces = _cut(head + b"12345")
    assert [len(piece.data) for piece in pieces if isinstance(piece, Chunk)] == [len(head), 5]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_safetensors_is_cut_by_content(seed: int) -> None:
    rng = random.Random(seed)
    data = noise(seed, 3 * HOLE_BLOCK + rng.randrange(1000))
    assert _cut(data) == _cut(data, tensors=False)


def test_a_lying_header_is_cut_by_content() -> None:
    data = _header({"a": (0, 1 << 20), "b": (1 << 20, 9 << 20)}) + noise("short", 2 << 20)
    assert _cut(data) == _cut(data, tensors=False)
