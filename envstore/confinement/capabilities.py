"""The capabilities of this process: all but a few can be given up, for itself and all it starts."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Collection

from envstore.confinement.kernel import prctl

CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER = 0, 1, 2, 3
SETPCAP, NET_BIND_SERVICE, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN = 8, 10, 18, 19, 21

NAMES = {
    CHOWN: "chown", DAC_OVERRIDE: "dac_override", DAC_READ_SEARCH: "dac_read_search",
    FOWNER: "fowner", SETPCAP: "setpcap", NET_BIND_SERVICE: "net_bind_service",
    SYS_CHROOT: "sys_chroot", SYS_PTRACE: "sys_ptrace", SYS_ADMIN: "sys_admin",
}  # fmt: skip
"""What those that some process of ours keeps are called."""

_CAPBSET_READ, _CAPBSET_DROP, _CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 23, 24, 47, 4
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=6I")
_VERSION = 0x20080522
_MOST = 64


def keep_only(kept: Collection[int]) -> None:
    """Give up every capability but those of ``kept`` that this process has, in all five sets.

    The bounding set is left alone where it cannot be reduced, by who has no capability anyway.
    For a process of one thread. Raises ``OSError``.
    """
    effective, permitted, _ = _get()
    wanted = permitted & sum(1 << one for one in set(kept))
    if effective >> SETPCAP & 1:
        for one in range(_MOST):
            if not wanted >> one & 1 and _bounded(one):
                prctl(_CAPBSET_DROP, one)
    prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _set(wanted)
    if _get() != (wanted, wanted, 0):
        raise OSError(errno.EPERM, "capabilities were not given up")


def _bounded(one: int) -> bool:
    try:
        return bool(prctl(_CAPBSET_READ, one))
    except OSError:  # beyond the last that this kernel knows
        return False


def _get() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable set."""
    header, sets = _HEADER.pack(_VERSION, 0), ctypes.create_string_buffer(_SETS.size)
    _call("capget", header, sets)
    low = _SETS.unpack(sets.raw)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def _set(both: int) -> None:
    low, high = both & 0xFFFFFFFF, both >> 32
    sets = _SETS.pack(low, low, 0, high, high, 0)
    _call("capset", _HEADER.pack(_VERSION, 0), sets)


def _call(name: str, header: bytes, sets: object) -> None:
    if ctypes.CDLL(None, use_errno=True)[name](header, sets):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
