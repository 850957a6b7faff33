"""Where an ELF file looks for libraries, and how to make it look beside itself.

The search path is rewritten where it stands, so nothing else of the file moves. That works as
long as the new one is not longer: installation paths seldom are shorter than ``$ORIGIN/../lib``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HEADER = struct.Struct("16sHHIQQQIHHH")  # as far as the number of program headers
_SEGMENT = struct.Struct("IIQQQQ")
_TAG = struct.Struct("qQ")
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB, _RPATH, _RUNPATH = 1, 5, 15, 29
_LONGEST = 4096


@dataclass(frozen=True, slots=True)
class Searching:
    """The libraries that a file needs by name, its search path, and where that string lies.

    ``path`` is empty, and ``offset`` 0, for a file without one.
    """

    needed: tuple[str, ...]
    path: str = ""
    offset: int = 0


def searching(data: bytes) -> Searching | None:
    """Return what a 64-bit ELF file says of its libraries, ``None`` for what is none."""
    if data[:5] != b"\x7fELF\x02":
        return None
    order = ">" if data[5:6] == b"\x02" else "<"
    try:
        return _searching(data, order)
    except (struct.error, ValueError, OverflowError):
        return None


def with_path(data: bytes, found: Searching, path: str) -> bytes | None:
    """Return ``data`` with ``path`` in place of its search path; ``None`` where it does not fit.

    A linker may let another string, the name of a symbol, be the end of the path's last
    component. That is why the component must stay what and where it is.
    """
    old, new = found.path.encode(), path.encode()
    last = old[max(old.rfind(b"/"), old.rfind(b":")) + 1 :]
    spare = len(old) - len(new) - len(last) - 1
    if spare >= 0:
        filled = new + bytes(spare + 1) + last
    elif len(new) == len(old) and new.endswith(last):
        filled = new
    else:
        return None
    at = found.offset
    # Where another string ends with the whole path, it would be changed too.
    if data[at - 1] or data[at : at + len(old) + 1] != old + b"\0":
        return None
    return data[:at] + filled + data[at + len(old) :]


def _searching(data: bytes, order: str) -> Searching | None:
    header = struct.unpack_from(order + _HEADER.format, data)
    start, size, count = header[5], header[9], header[10]
    loads, dynamic = [], None
    for number in range(count):
        kind, _, offset, address, _, length = struct.unpack_from(
            order + _SEGMENT.format, data, start + number * size
        )
        if kind == _LOAD:
            loads.append((address, offset, length))
        elif kind == _DYNAMIC:
            dynamic = (offset, length)
    if dynamic is None:
        return None
    tags: dict[int, int] = {}
    needed = []
    for at in range(dynamic[0], dynamic[0] + dynamic[1], _TAG.size):
        tag, value = struct.unpack_from(order + _TAG.format, data, at)
        if tag == 0:
            break
        if tag == _NEEDED:
            needed.append(value)
        else:
            tags[tag] = value
    table = tags.get(_STRTAB, -1)
    places = [at + table - base for base, at, length in loads if base <= table < base + length]
    if not places:
        return None
    strings = places[0]

    def text(at: int) -> str:
        end = data.index(b"\0", strings + at, strings + at + _LONGEST)
        return data[strings + at : end].decode()

    names = tuple(map(text, needed))
    where = tags.get(_RUNPATH, tags.get(_RPATH))
    if where is None:
        return Searching(names)
    return Searching(names, text(where), strings + where)
