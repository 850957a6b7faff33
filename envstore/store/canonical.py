"""Canonical JSON, so that equal small objects have equal bytes and digests (after RFC 8785)."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from envstore.errors import CorruptError, UsageError

MAX_BODY = 1 << 20
_MAX_DIGITS = 20


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


def decode(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``data``. Raises ``CorruptError`` naming ``what``.

    Refused is what two readers could understand in two ways, or could not write again: a key given
    twice, text that is not Unicode, numbers beyond all 64 bits.
    """
    if len(data) > MAX_BODY:
        raise CorruptError(f"{what} is {len(data)} bytes long, more than {MAX_BODY}")
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse
        )
        # Escapes can spell half of a pair, which is no character.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise CorruptError(f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{what} is not a JSON object")
    return value


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
