"""Targets: the machines an environment is made for, as conda, PyPI and uv describe them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from envstore.errors import EnvstoreError, UsageError

if TYPE_CHECKING:
    from packaging.tags import Tag

MACHINES = {
    "linux-64": "x86_64",
    "linux-aarch64": "aarch64",
    "linux-ppc64le": "ppc64le",
    "linux-s390x": "s390x",
    "linux-riscv64": "riscv64",
}
"""Machine architecture (``uname -m``) by conda subdir: the platforms environments are made for."""

DEFAULT_GLIBC = "2.28"
"""Assumed of other machines: that of RHEL 8, which most wheels and conda packages ask at most."""

DEFAULT_LINUX = "4.18"
"""Kernel assumed of other machines: that of RHEL 8."""

_UV_GLIBC_MINORS = (17, 28, *range(31, 41))
_UV_MACHINES = frozenset({"x86_64", "aarch64"})
_LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_OLDEST_GLIBC_MINOR = {"x86_64": 5}
_VERSION = re.compile(r"\d+(\.\d+)*")
_OVERRIDES = {
    "__glibc": "CONDA_OVERRIDE_GLIBC",
    "__cuda": "CONDA_OVERRIDE_CUDA",
    "__linux": "CONDA_OVERRIDE_LINUX",
    "__archspec": "CONDA_OVERRIDE_ARCHSPEC",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to resolve for: its conda subdir and its virtual packages.

    ``virtual`` maps names to ``version`` or ``version=build`` (CEP 30): ``__glibc`` -> ``2.28``,
    ``__archspec`` -> ``1=x86_64``. ``chosen`` are those that a user asked for by name; a
    specification file's wishes do not replace them.
    """

    platform: str
    virtual: Mapping[str, str] = field(default_factory=dict)
    chosen: frozenset[str] = frozenset()

    @property
    def machine(self) -> str:
        """The architecture as ``uname -m`` and wheels name it."""
        return MACHINES[self.platform]

    @property
    def glibc(self) -> tuple[int, int]:
        """The C library's version; raises ``UsageError`` if it is not known."""
        text = self.virtual.get("__glibc", "")
        parts = text.split(".")
        if len(parts) < 2 or not all(part.isdigit() for part in parts[:2]):
            raise UsageError(
                "the target has no GNU C library, so no wheel with compiled code fits it",
                hint="--glibc VERSION says which it has",
            )
        return int(parts[0]), int(parts[1])

    @property
    def runs_here(self) -> bool:
        """Whether what is compiled on this machine runs on the target."""
        own = _own_glibc()
        if self.platform != own_platform() or own is None or "__glibc" not in self.virtual:
            return False
        return _numbers(own) <= self.glibc

    def wanting(self, virtual: Mapping[str, str]) -> Target:
        """Return the target with the virtual packages that a specification file asks for."""
        wanted = {
            name: _valid(name, version or "0")
            for name, version in virtual.items()
            if name not in self.chosen
        }
        return replace(self, virtual={**self.virtual, **wanted})

    def uv_platform(self) -> str | None:
        """Return the value of uv's ``--python-platform``, ``None`` to have uv look at this machine.

        uv knows some versions of glibc only: it is given the newest that is not above the
        target's. Raises ``UsageError`` if it cannot resolve for the target.
        """
        if self.machine not in _UV_MACHINES:
            if self.runs_here:
                return None
            raise UsageError(
                f"Python packages cannot be resolved for {self.platform} on another machine",
                hint="run this on one of that kind",
            )
        major, minor = self.glibc
        fitting = [known for known in _UV_GLIBC_MINORS if (2, known) <= (major, minor)]
        if not fitting:
            raise UsageError(f"glibc {major}.{minor} is too old", hint="2.17 is the oldest")
        return f"{self.machine}-manylinux_2_{fitting[-1]}"

    def wheel_tags(self, python: str) -> list[Tag]:
        """Return the wheel tags that fit CPython ``python`` (``3.11``) here, the best first."""
        from packaging.tags import compatible_tags, cpython_tags

        major, minor = (int(part) for part in python.split(".")[:2])
        platforms = list(self._wheel_platforms())
        tags = list(cpython_tags((major, minor), platforms=platforms))
        interpreter = f"cp{major}{minor}"
        tags.extend(compatible_tags((major, minor), interpreter, platforms=platforms))
        return tags

    def _wheel_platforms(self) -> Iterator[str]:
        oldest = _OLDEST_GLIBC_MINOR.get(self.machine, 17)
        for minor in range(self.glibc[1], oldest - 1, -1):
            yield f"manylinux_2_{minor}_{self.machine}"
            if minor in _LEGACY_TAGS:
                yield f"{_LEGACY_TAGS[minor]}_{self.machine}"
        yield f"linux_{self.machine}"

    def markers(self, python: str) -> dict[str, str]:
        """Return the environment for PEP 508 markers under CPython ``python`` (``3.11.7``)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": python,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": python,
            "python_version": ".".join(python.split(".")[:2]),
            "sys_platform": "linux",
        }


def make_target(
    platform: str | None = None, *, glibc: str | None = None, cuda: str | None = None
) -> Target:
    """Return the target: this machine, or ``platform`` (a conda subdir), as far as is not said.

    Of another machine a glibc of ``DEFAULT_GLIBC``, a kernel of ``DEFAULT_LINUX`` and no CUDA
    driver are assumed. The processor is always assumed to be a plain one of its kind, so that an
    environment runs on all of them. conda's ``CONDA_OVERRIDE_GLIBC``, ``_CUDA``, ``_LINUX`` and
    ``_ARCHSPEC`` count as said, unless an argument says otherwise. ``cuda`` of ``none`` (or an
    empty override) is a machine without. Raises ``UsageError``.
    """
    here = own_platform()
    name = platform or here
    if name not in MACHINES:
        raise UsageError(
            f"unsupported platform {name!r}", hint=f"one of {', '.join(sorted(MACHINES))}"
        )
    virtual: dict[str, str] = {"__unix": "0", "__linux": DEFAULT_LINUX, "__glibc": DEFAULT_GLIBC}
    if name == here:
        virtual.update(_own_virtual())
    virtual["__archspec"] = f"1={MACHINES[name]}"
    said = {key: os.environ[var] for key, var in _OVERRIDES.items() if var in os.environ}
    if "__archspec" in said:
        said["__archspec"] = f"1={said['__archspec']}" if said["__archspec"] else ""
    if glibc is not None:
        said["__glibc"] = glibc
    if cuda is not None:
        said["__cuda"] = "" if cuda == "none" else cuda
    for key, version in said.items():
        if version:
            virtual[key] = _valid(key, version)
        else:
            virtual.pop(key, None)
    return Target(name, virtual, frozenset(said))


def own_platform() -> str:
    """Return this machine's conda subdir; raises ``EnvstoreError`` if it has none of ours."""
    machine = os.uname().machine
    for platform, name in MACHINES.items():
        if name == machine:
            return platform
    raise EnvstoreError(
        f"no packages are made for this machine ({machine})",
        hint=f"--platform names another: {', '.join(sorted(MACHINES))}",
    )


def _own_virtual() -> dict[str, str]:
    found = {}
    kernel = _VERSION.match(os.uname().release)
    if kernel:
        found["__linux"] = kernel[0]
    glibc = _own_glibc()
    if glibc is not None:
        found["__glibc"] = glibc
    cuda = _own_cuda()
    if cuda is not None:
        found["__cuda"] = cuda
    return found


def _own_glibc() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):  # another C library does not know the name
        return None
    return version if name == "glibc" and _VERSION.fullmatch(version) else None


def _own_cuda() -> str | None:
    """Return the newest CUDA version that this machine's driver runs, ``None`` without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        ask = library.cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int(0)
    if ask(ctypes.byref(number)) != 0 or number.value <= 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _valid(name: str, version: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z._+!-]+(=[0-9A-Za-z._+-]+)?", version):
        raise UsageError(f"{version!r} is no version for {name}")
    if name in {"__glibc", "__cuda", "__linux"} and not _VERSION.fullmatch(version):
        raise UsageError(f"{version!r} is no version for {name}", hint="such as 2.28")
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
