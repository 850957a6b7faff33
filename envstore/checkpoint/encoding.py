"""Nested Python values as JSON and back, exactly: the same types, bits and order.

What JSON has is written as it is; all else as an object ``{"$": tag, ...}`` (a mapping that has a
key ``$`` of its own is tagged too, so that nothing can be mistaken). What is no plain value goes
to ``Encoder.other``, which a subclass overrides to store tensors and objects elsewhere; what it
returns comes back through ``Decoder.other``.

=============  =========================================================================
tag            further members
=============  =========================================================================
``dict``       ``v``: a JSON object, or pairs if a key is no string
``odict``      the same; ``m`` is its ``_metadata``, as a module's state has
``tuple``      ``v``: a list; so ``set`` and ``frozenset``
``int``        ``v``: hexadecimal, for what 64 bits do not hold
``float``      ``v``: the 8 big-endian bytes in hexadecimal, for NaN and infinity
``complex``    ``v``: the 16 bytes of both its parts
``str``        ``v``: UTF-8 of text with surrogates, in hexadecimal
``bytes``      ``v``: base64; so ``bytearray``
``slice``      ``v``: start, stop and step; so ``range``
``number``     ``d``: the dtype of a numpy scalar, ``v``: its bytes in hexadecimal
``npdtype``    ``v``: a numpy dtype
``dtype``      ``v``: a torch dtype; so ``device`` and ``size``
=============  =========================================================================
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from envstore.checkpoint.errors import CheckpointError
from envstore.errors import CorruptError

MAX_DEPTH = 100
MAX_JSON = 256 << 20

_INT64 = 1 << 63
_MAX_NAME = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMPY_DTYPE = re.compile(r"[<>|=](?:[biufcSU][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[a-zA-Zμ]{1,3}\])?)")
_SCALAR = re.compile(r"[<>|=](?:[biufc][0-9]{1,2}|[mM]8(?:\[[0-9]{0,9}[a-zA-Zμ]{1,3}\])?)")
_PLAIN = frozenset({str, int, float, bool, type(None)})
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


class Encoder:
    """Turns values into JSON. One value at a time; not safe to share between threads."""

    def __init__(self) -> None:
        self.in_key = False
        self._kinds: dict[type, Callable[[Any, str, int], Any]] = {
            int: self._int,
            float: self._float,
            list: self._list,
            dict: self._dict,
            OrderedDict: self._ordered,
            tuple: lambda value, name, depth: _tag("tuple", self._list(value, name, depth)),
            set: lambda value, name, depth: _tag("set", self._set(value, name, depth)),
            frozenset: lambda value, name, depth: _tag("frozenset", self._set(value, name, depth)),
            complex: lambda value, _name, _depth: _tag(
                "complex", struct.pack(">dd", value.real, value.imag).hex()
            ),
            bytes: lambda value, _name, _depth: _tag("bytes", _base64(value)),
            bytearray: lambda value, _name, _depth: _tag("bytearray", _base64(value)),
            slice: lambda value, name, depth: _tag(
                "slice", self._list([value.start, value.stop, value.step], name, depth)
            ),
            range: lambda value, name, depth: _tag(
                "range", self._list([value.start, value.stop, value.step], name, depth)
            ),
        }

    def encode(self, value: Any, name: str = "", depth: int = 0) -> Any:
        """Return ``value`` as what ``json.dumps`` takes.

        ``name`` is where it stands, as dotted keys. Raises ``CheckpointError`` for what nests
        deeper than ``MAX_DEPTH`` (as a value that holds itself does) and what ``other`` raises.
        """
        kind = type(value)
        if kind is str:
            return _text(value)
        if value is None or kind is bool:
            return value
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{name[:200]!r} nests deeper than {MAX_DEPTH} levels",
                hint="a state must not hold itself",
            )
        known = self._kinds.get(kind)
        if known is not None:
            return known(value, name, depth)
        tagged = _foreign(value)
        return self.other(value, name, depth) if tagged is None else tagged

    def other(self, value: Any, name: str, _depth: int) -> Any:
        """Return JSON for what is not a plain value. Here: raises ``CheckpointError``."""
        raise CheckpointError(
            f"{name or 'the value'} is a {type_name(type(value))}, which JSON cannot hold"
        )

    def _int(self, value: int, _name: str, _depth: int) -> Any:
        return value if -_INT64 <= value < _INT64 else _tag("int", f"{value:x}")

    def _float(self, value: float, _name: str, _depth: int) -> Any:
        if value - value == 0.0:  # finite
            return value
        return _tag("float", struct.pack(">d", value).hex())

    def _list(self, value: Any, name: str, depth: int) -> list[Any]:
        if _is_plain(value):
            return list(value)
        return [
            self.encode(item, f"{name}.{index}" if name else str(index), depth + 1)
            for index, item in enumerate(value)
        ]

    def _set(self, value: Any, name: str, depth: int) -> list[Any]:
        keys = [self._key(item, name, depth) for item in value]
        return sorted(keys, key=json.dumps)  # equal sets are written equally in every process

    def _key(self, value: Any, name: str, depth: int) -> Any:
        before, self.in_key = self.in_key, True
        try:
            return self.encode(value, name, depth + 1)
        finally:
            self.in_key = before

    def _dict(self, value: dict[Any, Any], name: str, depth: int) -> Any:
        body = self._members(value, name, depth)
        return _tag("dict", body) if isinstance(body, list) or "$" in body else body

    def _ordered(self, value: OrderedDict[Any, Any], name: str, depth: int) -> Any:
        tagged = _tag("odict", self._members(value, name, depth))
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            tagged["m"] = self.encode(metadata, f"{name}._metadata", depth + 1)
        return tagged

    def _members(self, value: Mapping[Any, Any], name: str, depth: int) -> Any:
        prefix = f"{name}." if name else ""
        deeper = depth + 1
        plain = True
        pairs = []
        for key, item in value.items():
            if type(key) is str:
                plain = plain and _SURROGATE.search(key) is None
                pairs.append((key, self.encode(item, prefix + key, deeper)))
            else:
                plain = False
                pairs.append((key, self.encode(item, prefix + label(key), deeper)))
        if plain:
            return dict(pairs)
        return [[self._key(key, name, depth), item] for key, item in pairs]


class Decoder:
    """Turns JSON back into values; the JSON may come from anybody."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tags: dict[str, Callable[[dict[str, Any], str, int], Any]] = {
            "dict": lambda body, name, depth: dict(self._pairs(body, name, depth)),
            "odict": self._ordered,
            "tuple": lambda body, name, depth: tuple(self._list(body, name, depth)),
            "set": lambda body, name, depth: set(self._list(body, name, depth)),
            "frozenset": lambda body, name, depth: frozenset(self._list(body, name, depth)),
            "int": lambda body, _name, _depth: int(_member(body, "v", str), 16),
            "float": lambda body, _name, _depth: struct.unpack(">d", _hex(body))[0],
            "complex": lambda body, _name, _depth: complex(*struct.unpack(">dd", _hex(body))),
            "str": lambda body, _name, _depth: _hex(body).decode("utf-8", "surrogatepass"),
            "bytes": lambda body, _name, _depth: _unbase64(body),
            "bytearray": lambda body, _name, _depth: bytearray(_unbase64(body)),
            "slice": lambda body, name, depth: slice(*self._three(body, name, depth)),
            "range": lambda body, name, depth: range(*self._three(body, name, depth)),
            "number": _number,
            "npdtype": lambda body, _name, _depth: numpy_dtype(_member(body, "v", str)),
            "dtype": lambda body, _name, _depth: torch_dtype(_member(body, "v", str)),
            "device": lambda body, _name, _depth: _torch().device(_member(body, "v", str)),
            "size": lambda body, _name, _depth: _torch().Size(_sizes(body)),
        }

    def decode(self, value: Any, name: str = "", depth: int = 0) -> Any:
        """Return the value that was encoded as ``value``, parsed JSON. Raises ``CorruptError``."""
        kind = type(value)
        if kind is str or kind is int or kind is float or value is None or kind is bool:
            return value
        if depth > MAX_DEPTH:
            raise CorruptError(f"{self._what} nests deeper than {MAX_DEPTH} levels")
        if kind is list:
            if _PLAIN.issuperset(map(type, value)):
                return list(value)
            return [self.decode(item, _below(name, at), depth + 1) for at, item in enumerate(value)]
        if kind is not dict:
            self.corrupt(name)
        if "$" not in value:
            return {
                key: self.decode(item, _below(name, key), depth + 1) for key, item in value.items()
            }
        tag = value["$"]
        known = self._tags.get(tag) if isinstance(tag, str) else None
        try:
            return self.other(value, name, depth) if known is None else known(value, name, depth)
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, struct.error):
            self.corrupt(name)

    def other(self, body: dict[str, Any], name: str, _depth: int) -> Any:
        """Return the value of a tag that is not a plain value's. Here: raises ``CorruptError``."""
        self.corrupt(f"{name} ({body.get('$')!r})")

    def corrupt(self, name: str) -> NoReturn:
        """Raise ``CorruptError`` for what stands at ``name``."""
        raise CorruptError(f"{self._what} has no valid value at {name[:200]!r}")

    def _list(self, body: dict[str, Any], name: str, depth: int) -> list[Any]:
        found: list[Any] = _member(body, "v", list)
        if _PLAIN.issuperset(map(type, found)):
            return found
        return [self.decode(item, _below(name, at), depth + 1) for at, item in enumerate(found)]

    def _three(self, body: dict[str, Any], name: str, depth: int) -> list[Any]:
        found = self._list(body, name, depth)
        if len(found) != 3:
            self.corrupt(name)
        return found

    def _pairs(self, body: dict[str, Any], name: str, depth: int) -> list[tuple[Any, Any]]:
        found = body.get("v")
        deeper = depth + 1
        if isinstance(found, dict):
            return [
                (key, self.decode(item, _below(name, key), deeper)) for key, item in found.items()
            ]
        pairs = []
        for pair in _member(body, "v", list):
            key, item = pair
            key = self.decode(key, name, deeper)
            pairs.append((key, self.decode(item, _below(name, key), deeper)))
        return pairs

    def _ordered(self, body: dict[str, Any], name: str, depth: int) -> OrderedDict[Any, Any]:
        result = OrderedDict(self._pairs(body, name, depth))
        if "m" in body:
            metadata = self.decode(body["m"], f"{name}._metadata", depth + 1)
            result._metadata = metadata  # type: ignore[attr-defined]
        return result


def dumps(value: Any) -> bytes:
    """Return encoded JSON as ASCII bytes; floats as their shortest exact digits."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def loads(data: bytes, what: str) -> Any:
    """Parse JSON from anybody. Raises ``CorruptError`` naming ``what``."""
    if len(data) > MAX_JSON:
        raise CorruptError(f"{what} is {len(data)} bytes long, more than {MAX_JSON}")
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise CorruptError(f"{what} is not valid JSON") from None


def label(key: Any) -> str:
    """Return how a key of a mapping stands in dotted names: itself, or its class if it is odd."""
    if type(key) is str:
        return key
    if key is None or (isinstance(key, int) and -_INT64 <= key < _INT64):
        return str(key)
    return type(key).__name__


def join(name: str, key: Any) -> str:
    """Return the dotted name of what stands under ``key`` in what stands at ``name``."""
    return f"{name}.{label(key)}" if name else label(key)


def _below(name: str, key: Any) -> str:
    """``join`` for what anybody may have written: long keys in each other must not cost a lot."""
    return name if len(name) > _MAX_NAME else join(name, key)


def type_name(kind: type) -> str:
    """Return the dotted name of a class, for people."""
    return f"{kind.__module__}.{kind.__qualname__}"


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of that name. Raises ``ValueError`` if torch has none."""
    torch = _torch()
    found = getattr(torch, name, None) if _NAME.fullmatch(name) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(name)
    return found


def numpy_dtype(name: str) -> Any:
    """Return the plain numpy dtype of that name. Raises ``ValueError`` and ``TypeError``."""
    if not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(name)
    import numpy as np

    return np.dtype(name)


def _foreign(value: Any) -> dict[str, Any] | None:
    """Encode the small values of torch and numpy; ``None`` if it is none of them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        if isinstance(value, torch.dtype):
            return _tag("dtype", str(value).removeprefix("torch."))
        if isinstance(value, torch.device):
            return _tag("device", str(value))
        if isinstance(value, torch.Size):
            return _tag("size", list(value))
    np = sys.modules.get("numpy")
    if np is not None:
        if isinstance(value, np.generic):
            text = value.dtype.str
            if _SCALAR.fullmatch(text) and type(value) is value.dtype.type:
                return {"$": "number", "d": text, "v": value.tobytes().hex()}
        elif isinstance(value, np.dtype) and _NUMPY_DTYPE.fullmatch(value.str):
            return _tag("npdtype", value.str)
    return None


def _is_plain(values: Any) -> bool:
    """Tell at once whether a long list can be written as it is: one kind, nothing awkward."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return bool(min(values) >= -_INT64 and max(values) < _INT64)
    if kinds == {float}:
        return all(map(math.isfinite, values))
    return kinds == {str} and all(map(str.isascii, values))


def _text(value: str) -> Any:
    if value.isascii() or _SURROGATE.search(value) is None:
        return value
    return _tag("str", value.encode("utf-8", "surrogatepass").hex())


def _number(body: dict[str, Any], _name: str, _depth: int) -> Any:
    text = _member(body, "d", str)
    if not _SCALAR.fullmatch(text):
        raise ValueError(text)
    import numpy as np

    dtype = np.dtype(text)
    data = _hex(body)
    if len(data) != dtype.itemsize:
        raise ValueError(text)
    return np.frombuffer(data, dtype)[0]


def _sizes(body: dict[str, Any]) -> list[int]:
    found: list[int] = _member(body, "v", list)
    if not all(type(size) is int for size in found):
        raise ValueError(found)
    return found


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            "the checkpoint holds values of torch, which is missing here"
        ) from None
    return torch


def _tag(tag: str, body: Any) -> dict[str, Any]:
    return {"$": tag, "v": body}


def _member(body: dict[str, Any], name: str, kind: type) -> Any:
    found = body.get(name)
    if type(found) is not kind:
        raise ValueError(name)
    return found


def _hex(body: dict[str, Any]) -> bytes:
    return bytes.fromhex(_member(body, "v", str))


def _base64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _unbase64(body: dict[str, Any]) -> bytes:
    return base64.b64decode(_member(body, "v", str), validate=True)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)
