"""Where this process may write, by Landlock (Linux 5.13); reading is not restricted."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from envstore.confinement.kernel import prctl, system

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_SET_NO_NEW_PRIVS = 38

# Bits of access to files: 1 is writing, 4 to 12 removing and making of each kind.
_WRITE_FILE, _MAKE_CHARACTER, _MAKE_BLOCK = 1 << 1, 1 << 6, 1 << 11
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_DEVICES = _MAKE_CHARACTER | _MAKE_BLOCK
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2

_RULESET = struct.Struct("=QQQ")
_RULE = struct.Struct("=Qi")


def version() -> int:
    """Return the version of Landlock here, 0 if there is none."""
    try:
        return system(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def write_only_below(places: Iterable[str | os.PathLike[str]]) -> bool:
    """Let this process write, make and remove files only below ``places``, for good.

    Nothing is granted for a place that is not there. From version 6 (Linux 6.12) on it also sends
    no signals to, and reaches no abstract sockets of, processes that are not restricted with it.
    Open files are not affected. For a process of one thread. Returns whether that is possible
    here. Sets no_new_privs. Raises ``OSError``.
    """
    found = version()
    if not found:
        return False
    handled = _WRITE_FILE | _REMOVE_AND_MAKE
    handled |= (_REFER if found >= 2 else 0) | (_TRUNCATE if found >= 3 else 0)
    scoped = _ABSTRACT_SOCKETS | _SIGNALS if found >= 6 else 0
    ruleset = system(_CREATE_RULESET, *_sized(_RULESET.pack(handled, 0, scoped), found), 0)
    try:
        for place in places:
            _allow(ruleset, place, handled & ~_DEVICES)
        prctl(_SET_NO_NEW_PRIVS, 1)
        system(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _sized(attributes: bytes, found: int) -> tuple[bytes, int]:
    """Return what a kernel of this version knows of the attributes."""
    size = 8 if found < 4 else 16 if found < 6 else 24
    return attributes[:size], size


def _allow(ruleset: int, place: str | os.PathLike[str], access: int) -> None:
    try:
        fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # it is not there, or out of reach anyway
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _WRITE_FILE | _TRUNCATE
        rule = ctypes.create_string_buffer(_RULE.pack(access, fd))
        system(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
