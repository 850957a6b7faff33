from __future__ import annotations

import math
import pickle
import random
import struct
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.checkpoint import encoding
from envstore.checkpoint.errors import CheckpointError
from envstore.errors import CorruptError

floats = st.one_of(
    st.floats(),
    st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]),
)
texts = st.text(st.characters(exclude_categories=()), max_size=8)
keys = st.one_of(
    texts,
    st.sampled_from(["$", "v", "$dict"]),
    st.integers(),
    st.booleans(),
    st.none(),
    st.binary(max_size=4),
    st.tuples(st.integers(), texts),
    st.frozensets(st.integers(), max_size=3),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    floats,
    st.builds(complex, floats, floats),
    texts,
    st.binary(max_size=20),
    st.binary(max_size=20).map(bytearray),
    st.slices(5),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])]),
    st.sampled_from([np.dtype("<f4"), np.dtype(">i8"), np.dtype("bool"), np.dtype("<M8[ns]")]),
    st.sampled_from([np.float64(-0.0), np.float32("nan"), np.int8(-3), np.bool_(True)]),
    st.sampled_from([np.complex64(1 + 2j), np.datetime64("2026-01-01"), np.float16(65504)]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=15,
)


def same(a: Any, b: Any) -> bool:
    """Equal types, bits and order of keys."""
    if type(a) is not type(b):
        return False
    if type(a) is float:
        return struct.pack("<d", a) == struct.pack("<d", b)
    if type(a) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def round_trip(value: Any) -> Any:
    data = encoding.dumps(encoding.Encoder().encode(value))
    return encoding.Decoder("it").decode(encoding.loads(data, "it"))


@given(values)
@settings(max_examples=400, deadline=None)
def test_any_nest_of_values_comes_back_exactly(value: Any) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        1.7976931348623157e308,
        2**63 - 1,
        2**63,
        -(2**63) - 1,
        "\ud83d\ude00",
        "\ud83d" + "\ude00",
        {"$": "tuple", "v": [1]},
        {"$": {"$": 1}},
        {2: "a", "2": "b", True: "c"},
        {(1, 2): {frozenset({3}): None}},
        OrderedDict([("b", 1), ("a", 2)]),
        slice(None, -1, None),
        [1.5, float("inf")],
        [1.5, -0.0],
        ["ascii", "ä\ud800"],
        [2**63, 1],
        [True, 1, 1.0],
    ],
    ids=repr,
)
def test_awkward_values_come_back_exactly(value: Any) -> None:
    assert same(round_trip(value), value)


def test_an_integer_of_many_digits_comes_back() -> None:
    assert round_trip(-(10**6000)) == -(10**6000)
    assert round_trip({10**6000: [1]}) == {10**6000: [1]}


@pytest.mark.parametrize("bits", [0x7FF8000000000000, 0x7FF0000000000001, 0xFFFFDEADBEEF0001])
def test_a_nan_keeps_its_payload(bits: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    assert struct.unpack("<Q", struct.pack("<d", round_trip(value)))[0] == bits


def test_the_state_of_pythons_generator_comes_back() -> None:
    generator = random.Random(7)
    generator.gauss(0, 1)
    other = random.Random()
    other.setstate(round_trip(generator.getstate()))
    assert [other.gauss(0, 1) for _ in range(5)] == [generator.gauss(0, 1) for _ in range(5)]


def test_the_versions_of_a_modules_state_come_back() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    versions = OrderedDict(a=1)
    versions._metadata = state._metadata  # type: ignore[attr-defined]
    found = round_trip(versions)
    assert found._metadata == state._metadata


def test_equal_sets_are_written_equally() -> None:
    one, other = set("abcdefgh"), set("hgfedcba")
    encode = encoding.Encoder().encode
    assert encoding.dumps(encode(one)) == encoding.dumps(encode(other))


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="deeper than 100"):
        encoding.Encoder().encode(value)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("value", [object(), Pair(1, 2), Exception("x"), print])
def test_other_objects_are_no_plain_values(value: Any) -> None:
    with pytest.raises(CheckpointError, match="JSON cannot hold"):
        encoding.Encoder().encode({"deep": [value]})


@pytest.mark.parametrize(
    "text",
    [
        '{"$":"tensor","n":"x"}',
        '{"$":"nothing"}',
        '{"$":1}',
        '{"$":"int","v":"xyz"}',
        '{"$":"int","v":12}',
        '{"$":"float","v":"00"}',
        '{"$":"complex","v":"0011223344556677"}',
        '{"$":"bytes","v":"***"}',
        '{"$":"str","v":"ff"}',
        '{"$":"tuple","v":{}}',
        '{"$":"set","v":[[1]]}',
        '{"$":"dict","v":[[1]]}',
        '{"$":"dict","v":[[[], 1]]}',
        '{"$":"range","v":[0,1,0]}',
        '{"$":"slice","v":[0]}',
        '{"$":"number","d":"|O8","v":"0000000000000000"}',
        '{"$":"number","d":"<f4","v":"00"}',
        '{"$":"number","d":"<f3","v":"000000"}',
        '{"$":"npdtype","v":"O"}',
        '{"$":"npdtype","v":"<f4,<f4"}',
        '{"$":"dtype","v":"nn"}',
        '{"$":"dtype","v":"__class__"}',
        '{"$":"device","v":"toaster"}',
        '{"$":"size","v":["a"]}',
        "NaN",
        "[Infinity]",
        "[1",
        "[" * 150 + "]" * 150 + "x",
        "1" * 5000,
        "\udcff",
    ],
)
def test_what_nobody_wrote_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptError, match="it "):
        encoding.Decoder("it").decode(encoding.loads(text.encode("utf-8", "surrogateescape"), "it"))


@pytest.mark.parametrize("depth", [250, 200_000])
def test_deep_json_is_corrupt(depth: int) -> None:
    with pytest.raises(CorruptError):
        encoding.Decoder("it").decode(encoding.loads(b"[" * depth + b"]" * depth, "it"))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.fixed_dictionaries(
            {
                "$": st.sampled_from(sorted(encoding.Decoder("it")._tags)),
                "v": inner,
            },
            optional={"d": inner, "m": inner},
        ),
    ),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=300, deadline=None)
def test_any_json_decodes_or_is_corrupt(value: Any) -> None:
    try:
        found = encoding.Decoder("it").decode(value)
    except CorruptError:
        return
    pickle.dumps(found)


def test_what_may_be_written_may_be_read() -> None:
    value: Any = 1
    for at in range(encoding.MAX_DEPTH):
        value = [value] if at % 3 else ({"$": value} if at % 2 else (value,))
    assert round_trip(value) == value
    with pytest.raises(CheckpointError, match="deeper than 100"):
        encoding.Encoder().encode([[value]])
