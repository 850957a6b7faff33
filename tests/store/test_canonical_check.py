from __future__ import annotations

import pytest

from envstore.errors import CorruptError
from envstore.store import canonical

_VALUE = {"format": 1, "name": 'é\n"x"', "list": [1, "a"], "at": 10}


def test_any_bit_that_flips_is_noticed() -> None:
    data = canonical.encode_checked(_VALUE)
    assert canonical.decode(data, "it") == _VALUE
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(CorruptError, match=r"^it "):
            canonical.decode(bytes(damaged), "it")
    for end in range(len(data)):
        with pytest.raises(CorruptError):
            canonical.decode(data[:end], "it")


def test_what_was_written_without_a_check_is_read() -> None:
    assert canonical.decode(canonical.encode(_VALUE), "it") == _VALUE


def test_one_that_was_written_otherwise_is_not() -> None:
    data = canonical.encode_checked(_VALUE)
    for wrong in (data.replace(b":1,", b": 1,"), data + b"\n", data.replace(b'"at":10,', b"")):
        with pytest.raises(CorruptError, match="check"):
            canonical.decode(wrong, "it")
