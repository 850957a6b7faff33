"""A filter of system calls: those that a server has no use for are refused (EPERM) for good.

It is put together here and not by libseccomp: that is not everywhere, and its binding runs
ldconfig to find it, which takes longer than a server may take to take over. The filter is a plain
list of numbers; what is not on it is allowed, so that no version of the interpreter, of the C
library or of an extension module is in for a surprise.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from envstore.confinement.kernel import prctl, system

# Numbers on x86_64 and aarch64; None where there is no such call.
_EXECUTE = {"execve": (59, 221), "execveat": (322, 281)}
_REFUSED = {
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "tkill": (200, 130), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # Mounts and name spaces.
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428),
    "open_tree_attr": (467, 467), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268), "unshare": (272, 97),
    # Files past their paths' permissions, and devices.
    "open_by_handle_at": (304, 265), "mknod": (133, None), "mknodat": (259, 33),
    # Who this process is.
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "capset": (126, 91), "personality": (135, 92),
    # Parts of the kernel with a history of holes.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "modify_ldt": (154, None),
    # The machine.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "syslog": (103, 116), "vhangup": (153, 58),
}  # fmt: skip
_CLONE, _CLONE3, _SECCOMP = (56, 220), (435, 435), (317, 277)
_KILL, _TGKILL = (62, 129), (234, 131)

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NAME_SPACES = 0x7E020000  # flags of clone(2)
_OTHER_TABLE = 0x40000000  # the calls of x32, which are those of x86_64 by other numbers

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = _ERROR | 1, _ERROR | 38
_SET_FILTER, _AVAILABLE, _ALL_THREADS = 1, 2, 1
_SET_NO_NEW_PRIVS = 38


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def unavailable() -> str | None:
    """Return why there is no filter here, ``None`` if there can be."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return f"not known for {platform.machine()}"
    try:
        system(_SECCOMP[machine[0]], _AVAILABLE, 0, ctypes.byref(ctypes.c_uint32(_ERROR)))
    except OSError as error:
        return f"the kernel has none ({error.strerror})"
    return None


def refuse_calls(*, executing: bool) -> bool:
    """Refuse this process what it has no use for, for good; ``executing`` programs, too.

    Returns whether that is possible here. Sets no_new_privs. Raises ``OSError``.
    """
    if unavailable() is not None:
        return False
    column, architecture = _MACHINES[platform.machine()]
    code = filter_of(column, architecture, os.getpid(), executing=executing)
    prctl(_SET_NO_NEW_PRIVS, 1)
    program = _Program(len(code) // _INSTRUCTION.size, code)
    system(_SECCOMP[column], _SET_FILTER, _ALL_THREADS, ctypes.byref(program))
    return True


def filter_of(column: int, architecture: int, process: int, *, executing: bool) -> bytes:
    """Return the filter for a process, as the kernel takes it."""
    calls = {**_REFUSED, **(_EXECUTE if executing else {})}
    numbers = sorted(found for one in calls.values() if (found := one[column]) is not None)
    # Each with a name to jump to, and where to if it holds and if not; "" is the next one.
    steps: list[tuple[str, int, int, str, str]] = [
        ("", _LOAD, _ARCHITECTURE, "", ""),
        ("", _EQUAL, architecture, "", "refuse"),
        ("", _LOAD, _NUMBER, "", ""),
        ("", _AT_LEAST, _OTHER_TABLE, "refuse", ""),
        *(("", _EQUAL, number, "refuse", "") for number in numbers),
        # Its flags lie in memory, out of reach: the C library goes back to clone(2).
        ("", _EQUAL, _CLONE3[column], "unknown", ""),
        ("", _EQUAL, _KILL[column], "kill", ""),
        ("", _EQUAL, _TGKILL[column], "own", ""),
        ("", _EQUAL, _CLONE[column], "", "allow"),
        ("", _LOAD, _FIRST, "", ""),
        ("", _ANY_BIT, _NAME_SPACES, "refuse", "allow"),
        # With no signal it only asks whether a process is there.
        ("kill", _LOAD, _SECOND, "", ""),
        ("", _EQUAL, 0, "allow", ""),
        ("own", _LOAD, _FIRST, "", ""),
        ("", _EQUAL, process, "allow", "refuse"),
        ("allow", _RETURN, _ALLOW, "", ""),
        ("refuse", _RETURN, _EPERM, "", ""),
        ("unknown", _RETURN, _ENOSYS, "", ""),
    ]
    places = {name: at for at, (name, *_) in enumerate(steps) if name}

    def jump(at: int, to: str) -> int:
        return places[to] - at - 1 if to else 0

    return b"".join(
        _INSTRUCTION.pack(kind, jump(at, yes), jump(at, no), value)
        for at, (_, kind, value, yes, no) in enumerate(steps)
    )
