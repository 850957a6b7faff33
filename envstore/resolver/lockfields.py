"""Reads and writes typed fields of JSON documents, strictly; errors say where in the document.

A ``Record`` describes how a value's fields are written: in its own order, defaults left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

from envstore.resolver.secrets import secret_in

MAX_TEXT = 1 << 16
"""Characters of one text."""
MAX_DEPTH = 16
_OPEN = "x-"
_INTEGER_LIMIT = 1 << 63


class FieldError(Exception):
    """A field cannot be read: ``where`` it is (``packages[3].sha256``), and what is wrong."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where
        self.problem = problem


class Codec(Protocol):
    """One way to write a value in JSON."""

    def read(self, value: Any, where: str) -> Any:
        """Return the value that ``value``, out of a JSON document, stands for.

        Raises ``FieldError``.
        """
        ...

    def write(self, value: Any) -> Any:
        """Return what stands for ``value`` in a JSON document."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A string that ``check``, which says what is wrong with it, has no objection to."""

    check: Callable[[str], str] | None = None
    lines: bool = False

    def read(self, value: Any, where: str) -> str:
        """Return the string; raises ``FieldError``."""
        if not isinstance(value, str):
            raise FieldError(where, f"must be a string, not {_kind(value)}")
        check_text(value, where, lines=self.lines)
        problem = self.check(value) if self.check else ""
        if problem:
            raise FieldError(where, problem)
        return value

    def write(self, value: str) -> str:
        """Return the string."""
        return value


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from 0 to ``most``."""

    most: int

    def read(self, value: Any, where: str) -> int:
        """Return the number; raises ``FieldError``."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise FieldError(where, f"must be a whole number, not {_kind(value)}")
        if not 0 <= value <= self.most:
            raise FieldError(where, f"must be from 0 to {self.most}")
        return value

    def write(self, value: int) -> int:
        """Return the number."""
        return value


@dataclass(frozen=True, slots=True)
class Boolean:
    """``true`` or ``false``."""

    def read(self, value: Any, where: str) -> bool:
        """Return the truth; raises ``FieldError``."""
        if not isinstance(value, bool):
            raise FieldError(where, f"must be true or false, not {_kind(value)}")
        return value

    def write(self, value: bool) -> bool:
        """Return the truth."""
        return value


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, as a tuple in memory; its order has a meaning."""

    item: Codec

    def read(self, value: Any, where: str) -> tuple[Any, ...]:
        """Return the items; raises ``FieldError``."""
        if not isinstance(value, list):
            raise FieldError(where, f"must be a list, not {_kind(value)}")
        return tuple(self.item.read(item, f"{where}[{i}]") for i, item in enumerate(value))

    def write(self, value: tuple[Any, ...]) -> list[Any]:
        """Return the items."""
        return [self.item.write(item) for item in value]


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object with any keys that ``key`` takes, written in their order."""

    key: Codec
    item: Codec

    def read(self, value: Any, where: str) -> dict[str, Any]:
        """Return the mapping; raises ``FieldError``."""
        found: dict[str, Any] = {}
        for name, item in _object(value, where).items():
            place = f"{where}.{_shown(name)}"
            found[self.key.read(name, place)] = self.item.read(item, place)
        return found

    def write(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mapping with its keys sorted."""
        return {name: self.item.write(value[name]) for name in sorted(value)}


@dataclass(frozen=True, slots=True)
class Free:
    """Any JSON value of finite numbers, at most 16 levels deep."""

    def read(self, value: Any, where: str) -> Any:
        """Return the value; raises ``FieldError``."""
        _check_free(value, where, 0)
        return value

    def write(self, value: Any) -> Any:
        """Return the value with all keys sorted."""
        if isinstance(value, dict):
            return {name: self.write(value[name]) for name in sorted(value)}
        if isinstance(value, list | tuple):
            return [self.write(item) for item in value]
        return value


class Record:
    """An object that stands for a dataclass: ``codecs`` in the order they are written.

    A field with a default may be missing and is not written where it has that default, but for
    those in ``always``. Fields that are unknown are refused unless they begin with ``x-``.
    """

    def __init__(
        self, build: type[Any], codecs: Mapping[str, Codec], *, always: tuple[str, ...] = ()
    ) -> None:
        self._build = build
        self._codecs = dict(codecs)
        self._defaults: dict[str, Any] = {}
        for item in fields(build):
            if item.name in always:
                continue
            if item.default is not MISSING:
                self._defaults[item.name] = item.default
            elif item.default_factory is not MISSING:
                self._defaults[item.name] = item.default_factory()

    def read(self, value: Any, where: str) -> Any:
        """Return the dataclass; raises ``FieldError``."""
        found = _object(value, where)
        dot = f"{where}." if where else ""
        for name in found:
            if name not in self._codecs and not name.startswith(_OPEN):
                raise FieldError(f"{dot}{_shown(name)}", "is not a field of this format")
        values = {}
        for name, codec in self._codecs.items():
            if name in found:
                values[name] = codec.read(found[name], f"{dot}{name}")
            elif name not in self._defaults:
                raise FieldError(f"{dot}{name}", "is missing")
        return self._build(**values)

    def write(self, value: Any) -> dict[str, Any]:
        """Return the fields that do not have their default."""
        written = {}
        for name, codec in self._codecs.items():
            item = getattr(value, name)
            if name not in self._defaults or item != self._defaults[name]:
                written[name] = codec.write(item)
        return written


def check_text(text: str, where: str, *, lines: bool = False) -> None:
    """Refuse what is not text for every reader: too long, no Unicode, control characters, secrets.

    With ``lines`` it may have line breaks and tabs. Raises ``FieldError``.
    """
    if len(text) > MAX_TEXT:
        raise FieldError(where, f"has {len(text)} characters; the limit is {MAX_TEXT}")
    for character in text if not text.isprintable() else "":
        code = ord(character)
        if 0xD800 <= code < 0xE000:
            raise FieldError(where, f"holds U+{code:04X}, which is no character")
        if (code < 0x20 or 0x7F <= code < 0xA0) and not (lines and character in "\t\n\r"):
            raise FieldError(where, f"holds the control character U+{code:04X}")
    secret = secret_in(text)
    if secret:
        raise FieldError(where, f"a URL holds {secret}: a lock must hold no credentials")


def matching(pattern: str, problem: str) -> Callable[[str], str]:
    """Return a check for text that ``pattern`` matches as a whole."""
    compiled = re.compile(pattern)
    return lambda text: "" if compiled.fullmatch(text) else problem


def _check_free(value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FieldError(where, f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{where}.{_shown(name)}"
            check_text(name, place)
            _check_free(item, place, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_free(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, str):
        check_text(value, where, lines=True)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FieldError(where, "is not a finite number")
    elif isinstance(value, int):
        if not -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            raise FieldError(where, "is a number of more than 64 bits")
    elif value is not None:
        raise FieldError(where, f"holds a {type(value).__name__}, which is no JSON value")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(where, f"must be an object, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _shown(name: str) -> str:
    short = name if len(name) <= 100 else f"{name[:100]}..."
    return short if short.isprintable() else ascii(short)
