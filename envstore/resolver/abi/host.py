"""What the machine promises that an environment is for. Nothing here looks at this machine.

A glibc of some version comes with a ``libstdc++`` and ``libgcc_s`` that are at least those of
the oldest distribution which has that glibc, or a newer one that keeps old promises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from envstore.errors import UsageError

# e_machine, class and byte order by conda's names for platforms.
_ARCHITECTURES = {
    "linux-64": (62, 64, False),
    "linux-aarch64": (183, 64, False),
    "linux-ppc64le": (21, 64, False),
    "linux-s390x": (22, 64, True),
    "linux-riscv64": (243, 64, False),
    "linux-32": (3, 32, False),
    "linux-armv7l": (40, 32, False),
    "linux-armv6l": (40, 32, False),
}
_MACHINES = {
    2: "SPARC",
    3: "x86",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC 64",
    22: "s390",
    40: "ARM",
    43: "SPARC 64",
    62: "x86-64",
    183: "AArch64",
    190: "CUDA device",
    224: "AMD GPU",
    243: "RISC-V",
    247: "BPF",
    258: "LoongArch",
}

# glibc -> the newest GLIBCXX_3.4.x, CXXABI_1.3.x and GCC_x.0.0 of the first distributions with it.
_GCC = (
    ((2, 12), 13, 3, 4),  # RHEL 6, GCC 4.4
    ((2, 17), 19, 7, 4),  # RHEL 7, GCC 4.8
    ((2, 24), 22, 10, 4),  # Debian 9, GCC 6
    ((2, 26), 24, 11, 7),  # Amazon Linux 2, GCC 7
    ((2, 28), 25, 11, 7),  # RHEL 8, Debian 10: GCC 8
    ((2, 31), 28, 12, 7),  # Debian 11, Ubuntu 20.04: GCC 10
    ((2, 34), 29, 13, 7),  # RHEL 9, GCC 11
    ((2, 35), 30, 13, 12),  # Ubuntu 22.04, Debian 12: GCC 12
    ((2, 39), 33, 15, 14),  # Ubuntu 24.04, RHEL 10: GCC 14
)
_NUMBERED = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_(\d+(?:\.\d+)*)")
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")
# Versions that stand for a feature, and the release that has it.
_FEATURES = {"GLIBC_ABI_DT_RELR": (2, 36), "GLIBC_ABI_GNU_TLS": (2, 42)}


@dataclass(frozen=True, slots=True)
class AbiTarget:
    """Where an environment shall run.

    ``platform`` is a conda subdir. ``glibc`` is the version at least there, ``cuda`` the newest
    CUDA that its driver runs; empty if nothing is known, and then nothing is compared with it.
    """

    platform: str = "linux-64"
    glibc: str = ""
    cuda: str = ""

    def __post_init__(self) -> None:
        if self.platform not in _ARCHITECTURES:
            raise UsageError(
                f"ELF files of {self.platform!r} cannot be checked",
                hint=f"one of {', '.join(_ARCHITECTURES)}",
            )
        for what, version in (("glibc", self.glibc), ("CUDA", self.cuda)):
            if version and not _VERSION.fullmatch(version):
                raise UsageError(f"{version!r} is no version of {what}", hint="such as 2.28")

    @property
    def architecture(self) -> tuple[int, int, bool]:
        """``e_machine``, class in bits, and whether the first byte is the highest."""
        return _ARCHITECTURES[self.platform]


def platform_of(machine: int, bits: int, big_endian: bool) -> str | None:
    """Return the conda subdir whose files look like this, ``None`` if there is none."""
    for platform, architecture in _ARCHITECTURES.items():
        if architecture == (machine, bits, big_endian):
            return platform
    return None


def machine_name(machine: int, bits: int) -> str:
    """Return what people call an architecture."""
    return f"{_MACHINES.get(machine, f'machine {machine}')} ({bits} bits)"


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a dotted version, for comparing."""
    return tuple(int(part) for part in version.split("."))


def glibc_of(version: str) -> tuple[int, ...] | None:
    """Return the glibc that a symbol version needs, ``None`` if it says nothing of that."""
    if version in _FEATURES:
        return _FEATURES[version]
    match = _NUMBERED.fullmatch(version)
    return numbers(match[2]) if match and match[1] == "GLIBC" else None


def gcc_promised(version: str, glibc: str) -> bool:
    """Whether a machine with ``glibc`` has this version in its libstdc++ or libgcc_s.

    Versions that are not numbered pass: no more is known of them.
    """
    match = _NUMBERED.fullmatch(version)
    if not match or not glibc:
        return True
    rows = [row for row in _GCC if row[0] <= numbers(glibc)[:2]] or [_GCC[0]]
    _, glibcxx, cxxabi, gcc = rows[-1]
    limits = {"GLIBCXX": (3, 4, glibcxx), "CXXABI": (1, 3, cxxabi), "GCC": (gcc, 99, 99)}
    return match[1] not in limits or numbers(match[2]) <= limits[match[1]]
