"""The sections of a tree image: every column of a tree and its locations, and their item types."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

RELOCATED = 8
"""In the kind of a file: it is not shown as it is stored."""

Buffer: TypeAlias = "array[int] | bytes | bytearray"

TYPES: dict[str, Literal["B", "H", "I", "Q", "q"]] = {
    "text": "B",
    "digests": "B",
    "long_keys": "B",
    "prefix": "B",
    "plans": "B",
    "relocated_sizes": "Q",
    "ends": "Q",
    "mtimes": "q",
    "hole_bytes": "Q",
    "multiplier": "Q",
    "name_starts": "I",
    "parents": "I",
    "slots": "I",
    "inodes": "I",
    "directories": "I",
    "child_starts": "I",
    "children": "I",
    "file_starts": "I",
    "target_starts": "I",
    "linked": "I",
    "link_counts": "I",
    "holed": "I",
    "long": "I",
    "relocated": "I",
    "plan_starts": "I",
    "table": "I",
    "ref_frames": "I",
    "ref_offsets": "I",
    "frame_packs": "I",
    "frame_offsets": "I",
    "frame_stored": "I",
    "frame_raw": "I",
    "modes": "H",
    "kinds": "B",
    "frame_codecs": "B",
    "frame_digests": "B",
    "packs": "B",
}
"""Sections in the order in which an image holds them, with the type of their items."""


def _numbers() -> array[int]:
    return array("I")


def _sizes() -> array[int]:
    return array("Q")


@dataclass(slots=True)
class TreeSections:
    """The columns of ``tree.Columns`` as they are built; the second half comes by joining files."""

    text: bytearray
    kinds: bytearray
    name_starts: array[int]
    parents: array[int]
    slots: array[int]
    modes: array[int]
    mtimes: array[int]
    directories: array[int]
    child_starts: array[int]
    children: array[int]
    file_starts: array[int]
    digests: bytearray
    ends: array[int]
    target_starts: array[int]
    prefix: bytes = b""
    plans: bytes = b""
    plan_starts: array[int] = field(default_factory=_numbers)
    relocated: array[int] = field(default_factory=_numbers)
    relocated_sizes: array[int] = field(default_factory=_sizes)
    inodes: array[int] = field(default_factory=_numbers)
    linked: array[int] = field(default_factory=_numbers)
    link_counts: array[int] = field(default_factory=_numbers)
    holed: array[int] = field(default_factory=_numbers)
    hole_bytes: array[int] = field(default_factory=_numbers)
    long: array[int] = field(default_factory=_numbers)
    long_keys: bytes = b""
    table: array[int] = field(default_factory=_numbers)
    multiplier: array[int] = field(default_factory=_numbers)
