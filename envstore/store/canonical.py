"""Canonical JSON, so that equal small objects have equal bytes and digests (after RFC 8785)."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from envstore.errors import CorruptError, UsageError
from envstore.store.digest import digest

MAX_BODY = 1 << 20
_MAX_DIGITS = 20
_MAX_DEPTH = 32
_CHECK = "check"
_CHECK_DIGITS = 16


def encode(value: dict[str, Any]) -> bytes:
    """Return ``value`` as UTF-8 JSON with sorted keys and no spaces.

    Raises ``UsageError`` for what no reader would take: text that is not Unicode, or too much.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end]
        raise UsageError(f"{found!r} is not valid Unicode text", hint="leave it out") from None
    if len(data) > MAX_BODY:
        raise UsageError(f"{len(data)} bytes of text are too many", hint="write a shorter message")
    return data


def encode_checked(value: dict[str, Any]) -> bytes:
    """Return ``value`` as ``encode`` does, with a field ``check`` that ``decode`` looks at.

    For objects whose name says nothing of what is in them: without it a letter that has changed
    would pass for what was written.
    """
    return encode({**value, _CHECK: _digest(value)})


def _digest(value: dict[str, Any]) -> str:
    return digest(encode(value)).hex()[:_CHECK_DIGITS]


def _verified(value: dict[str, Any], data: bytes, what: str) -> dict[str, Any]:
    """Return ``value`` without its check. Raises ``CorruptError`` if that does not hold.

    Objects that have none were written before there was one, unless it is the name of the field
    that has changed by a letter.
    """
    found = value.pop(_CHECK, None)
    if found is not None:
        intact = encode({**value, _CHECK: found}) == data and found == _digest(value)
    else:
        intact = not any(_is_nearly_check(key) for key in value)
    if not intact:
        raise CorruptError(f"{what} does not match its check")
    return value


def _is_nearly_check(key: str) -> bool:
    return len(key) == len(_CHECK) and sum(map(str.__ne__, key, _CHECK)) == 1


def decode(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``data``. Raises ``CorruptError`` naming ``what``.

    Refused is what two readers could understand in two ways, or could not write again: a key given
    twice, text that is not Unicode, numbers beyond all 64 bits, more than 32 levels. So is what has
    a ``check`` that does not match; the field is not returned.
    """
    if len(data) > MAX_BODY:
        raise CorruptError(f"{what} is {len(data)} bytes long, more than {MAX_BODY}")
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse
        )
        if text.count("[") + text.count("{") > _MAX_DEPTH:
            _check_depth(value)
        if "\\u" in text:
            check_text(value)
    except (ValueError, RecursionError):
        raise CorruptError(f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{what} is not a JSON object")
    return _verified(value, data, what)


def check_text(value: Any) -> None:
    """Raise ``ValueError`` if text in ``value``, parsed JSON, is none: escapes can spell half of a
    surrogate pair, which nobody can write again.
    """
    json.dumps(value, ensure_ascii=False).encode()


def _check_depth(value: Any) -> None:
    """See that whoever walks ``value`` needs no deep stack. Raises ``ValueError``."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        nested = [item for item in level if isinstance(item, (dict, list))]
        if not nested:
            return
        level = [
            inner
            for item in nested
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    raise ValueError("too many levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else _refuse(digits)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text[:_MAX_DIGITS])


def field(value: dict[str, Any], name: str, kind: type, what: str) -> Any:
    """Return ``value[name]`` if it is a ``kind``. Raises ``CorruptError`` otherwise."""
    found = value.get(name)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise CorruptError(f"{what} has no valid {name!r}")
    return found
