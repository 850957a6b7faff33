"""Whatever a lock file holds, reading it ends with a lock or with one line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envstore.errors import EnvstoreError
from envstore.resolver.lockfile import MAX_BYTES, encode_lock, parse_lock
from envstore.resolver.secrets import secret_in
from tests.locks import full_lock

_DATA = encode_lock(full_lock())
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for name, item in value.items():
            found += _places(item, (*path, name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += _places(item, (*path, i))
    return found


_PLACES = _places(json.loads(_DATA))


def _read(data: bytes) -> None:
    complaint = ""
    try:
        again = encode_lock(parse_lock(data, "env.lock"))
    except EnvstoreError as error:
        complaint = error.message
    else:
        assert encode_lock(parse_lock(again, "env.lock")) == again
        return
    assert complaint.startswith("env.lock")
    assert complaint.isprintable()
    assert len(complaint) < 600


@settings(max_examples=400)
@given(st.sampled_from(_PLACES), _VALUES)
def test_any_value_in_any_place(path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(_DATA)
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    _read(json.dumps(document).encode("utf-8", "surrogatepass"))


@settings(max_examples=300)
@given(st.integers(0, len(_DATA) - 1), st.binary(min_size=1, max_size=3))
def test_any_bytes_in_any_place(at: int, data: bytes) -> None:
    _read(_DATA[:at] + data + _DATA[at + len(data) :])


@settings(max_examples=100)
@given(st.integers(0, len(_DATA) - 1))
def test_the_beginning_of_a_lock(length: int) -> None:
    with pytest.raises(EnvstoreError):
        parse_lock(_DATA[:length].rstrip(b"\n}"), "env.lock")


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_anything(data: bytes) -> None:
    _read(data)


def test_what_is_made_to_take_long_does_not() -> None:
    # Each of these took minutes while something was quadratic.
    names = ",".join(f'"{i}": 1' for i in range(200_000))
    _read(f'{{{names}, "199999": 1}}'.encode())
    assert secret_in("a" * 1_000_000 + "://") == ""
    assert secret_in("a." * 500_000 + " ://") == ""
    assert secret_in("https://a.example/?" + "token" * 100_000) == ""
    assert secret_in("https://a.example" + "/t/" * 300_000) == ""
    assert secret_in("https://a.example/?" + "a=b&" * 100_000) == ""


def test_what_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(EnvstoreError, match=re.escape("longer than 64 MiB")):
        parse_lock(b"[" * (MAX_BYTES + 1), "env.lock")
