"""The types of elements: their sizes, and what safetensors calls them.

A type has torch's name (``float32``, ``bfloat16``), which numpy shares where it has the type, or
``numpy:`` and numpy's own code for what only numpy has (``numpy:>f4``, ``numpy:<M8[ns]``).
"""

from __future__ import annotations

import re

from envstore.errors import CorruptError

# Names that safetensors (format table of its README, version 0.4.4) can say; other elements are
# written as U8 with one more dimension, and the real type stands in state.json alone.
_SAFETENSORS = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
}
_OTHER = {
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "bits8": 1,
    "bits16": 2,
}
_SIZES = {name: size for name, (_, size) in _SAFETENSORS.items()} | _OTHER
_NUMPY = re.compile(
    r"numpy:[<>|=](?:([biufcSU])([0-9]{1,9})|[mM]8(?:\[[0-9]{0,9}[a-zA-Zμ]{1,3}\])?)"
)


def item_size(dtype: str) -> int:
    """Return the bytes of one element. Raises ``CorruptError`` for a type that is not known."""
    size = _SIZES.get(dtype)
    if size is not None:
        return size
    match = _NUMPY.fullmatch(dtype)
    if match is None:
        raise CorruptError(f"{dtype[:80]!r} is not a known type of elements")
    kind, count = match.groups()
    if kind is None:
        return 8
    return int(count) * (4 if kind == "U" else 1)


def is_known(dtype: str) -> bool:
    """Tell whether elements of that type can be stored as they are."""
    return dtype in _SIZES or _NUMPY.fullmatch(dtype) is not None


def is_float(dtype: str) -> bool:
    """Tell whether elements of that type may be NaN or infinite."""
    return dtype.startswith(("float", "bfloat", "complex", "numpy:>f", "numpy:>c"))


def in_safetensors(dtype: str, shape: tuple[int, ...]) -> tuple[str, list[int]]:
    """Return the type and shape that a safetensors header states for such a tensor."""
    known = _SAFETENSORS.get(dtype)
    if known is not None:
        return known[0], list(shape)
    return "U8", [*shape, item_size(dtype)]
