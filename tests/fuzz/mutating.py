"""Changes inputs at random: bytes, numbers, words, and the values of JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE)
_WIDE = (*_NUMBERS, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_TEXTS = (
    "", ".", "..", "/", "../../x", "/etc/passwd", "a/../../b", "\0", "\n", "\x1b[2J", "\ud800",
    "A" * 300, "a/" * 300, "0" * 64, "f" * 64, "nan", "-1", "\u202e", "é", "é", "%s", "-",
)  # fmt: skip
_DEEP = "@deep@"
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1,
    1 << 31, 1 << 32, 1 << 63, 1 << 64, -(1 << 63), 10**400, 0.5, 1e308,
    float("nan"), float("inf"), _DEEP, _DEEP, [], {}, [[]], [None], {"": None}, "",
)  # fmt: skip


def mutate(data: bytes, random: Random, others: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """Return ``data`` with one to five changes; pieces may come of ``others`` and ``words``."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        _change(changed, random, others, words)
    return bytes(changed)


def _change(data: bytearray, random: Random, others: list[bytes], words: tuple[bytes, ...]) -> None:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 32, 256)))
    what = random.randrange(9)
    if what == 0 and at < len(data):
        data[at] ^= 1 << random.randrange(8)
    elif what == 1 and at < len(data):
        data[at] = random.randrange(256)
    elif what == 2:
        del data[at:end]
    elif what == 3:
        data[at:at] = data[at:end] * random.choice((1, 1, 2, 16))
    elif what == 4:
        width = random.choice((1, 2, 4, 8))
        number = random.choice(_WIDE) + random.choice((0, 0, 1, -1))
        order = random.choice(("little", "little", "big"))
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    elif what == 5 and others:
        other = random.choice(others)
        start = random.randrange(len(other) + 1)
        data[at:end] = other[start : start + random.choice((4, 16, 64, 1024))]
    elif what == 6 and words:
        data[at : random.choice((at, end))] = random.choice(words)
    elif what == 7:
        data[at:at] = random.randbytes(random.choice((1, 2, 4, 8)))
    elif at < len(data):
        del data[random.choice((at, len(data) - 1)) :]


def unchecked(data: bytes) -> bytes:
    """Return a JSON object without its ``check``, which every change would break."""
    value = json.loads(data)
    value.pop("check", None)
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def mutate_json(data: bytes, random: Random) -> bytes:
    """Return JSON with one to three of its values changed; other bytes as they are."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _changed(value, random)
    try:
        text = json.dumps(value, separators=(",", ":"))
    except (ValueError, RecursionError):
        return data
    if random.randrange(20) == 0:
        depth = random.choice((10, 200, 990, 5000))
        text = text.replace("null", "[" * depth + "]" * depth).replace('""', '{"a":' * depth, 1)
    if _DEEP in text:
        depth = random.choice((20, 150, 900, 980, 1500, 5000))
        opening, closing = random.choice((("[", "]"), ('{"a":', "}"), ('{"v":[', "]}")))
        text = text.replace(f'"{_DEEP}"', opening * depth + "1" + closing * depth)
    if random.randrange(20) == 0 and text.startswith('{"'):
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, random: Random) -> Any:
    if isinstance(value, dict) and value and random.randrange(6):
        key = random.choice(list(value))
        found = dict(value)
        what = random.randrange(10)
        if what == 0:
            del found[key]
        elif what == 1:
            found[random.choice(_TEXTS)] = found.pop(key)
        else:
            found[key] = _changed(value[key], random)
        return found
    if isinstance(value, list) and value and random.randrange(6):
        at = random.randrange(len(value))
        what = random.randrange(10)
        if what == 0:
            return value[:at] + value[at + 1 :]
        if what == 1:
            return [*value, value[at]] * random.choice((1, 1, 50))
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    if isinstance(value, str) and random.randrange(3):
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice(_TEXTS) + value[at + random.randrange(3) :]
    if isinstance(value, int) and not isinstance(value, bool) and random.randrange(2):
        return random.choice((value + 1, value - 1, -value, value * 2, value << 32, 0))
    return random.choice((*_VALUES, *_TEXTS))


class Plan:
    """Reads decisions off bytes, so that an input can stand for an archive or a tree.

    When the bytes are used up everything is zero or empty.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or what is left."""
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    def number(self, width: int = 1) -> int:
        """Return a number of ``width`` bytes."""
        return int.from_bytes(self.take(width), "little")

    def text(self) -> bytes:
        """Return bytes up to a newline, which is skipped."""
        end = self._data.find(b"\n", self._at)
        end = len(self._data) if end < 0 else end
        found = self._data[self._at : end]
        self._at = end + 1
        return found

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))
