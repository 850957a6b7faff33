"""What the kernel says is mounted, read without touching any mount."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount: where, the device number as ``major:minor``, the type and the source.

    ``id`` is the mount's own, ``parent`` that of the mount it is mounted in; both are used again.
    """

    mountpoint: str
    device: str
    type: str
    source: str
    id: int
    parent: int


def resolve(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of ``path`` without links, also if a dead mount lies there."""
    return os.path.realpath(path)


def find_mount(mountpoint: str) -> MountInfo | None:
    """Return the uppermost mount on exactly the path ``mountpoint``, if there is one."""
    found = None
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            if _text(line.split(b" ", 5)[4]) == mountpoint:
                found = line
    return None if found is None else _parse(found)


def list_mounts() -> list[MountInfo]:
    """Return all mounts that this process sees, in the order in which they were made."""
    with open("/proc/self/mountinfo", "rb") as table:
        return [_parse(line) for line in table]


def mountpoints_in(namespaces: Iterable[int]) -> dict[int, set[str]]:
    """Return the mount points in each of these mount name spaces (inodes) that still exists.

    Needs root for other processes' name spaces.
    """
    wanted = set(namespaces)
    found: dict[int, set[str]] = {}
    for process in ("self", *filter(str.isdigit, os.listdir("/proc"))):
        if len(found) == len(wanted):
            break
        try:
            namespace = os.stat(f"/proc/{process}/ns/mnt").st_ino
            if namespace in wanted and namespace not in found:
                with open(f"/proc/{process}/mountinfo", "rb") as table:
                    found[namespace] = {_parse(line).mountpoint for line in table}
        except OSError:
            continue  # it has ended meanwhile
    return found


def _parse(line: bytes) -> MountInfo:
    left, _, right = line.partition(b" - ")
    fields, more = left.split(b" "), right.split(b" ")
    return MountInfo(
        _text(fields[4]),
        _text(fields[2]),
        _text(more[0]),
        _text(more[1]),
        int(fields[0]),
        int(fields[1]),
    )


def _text(field: bytes) -> str:
    """Undo the kernel's escapes of blanks, newlines and backslashes."""
    if b"\\" not in field:
        return os.fsdecode(field)
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))
