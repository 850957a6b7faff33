"""Locks: everything that decides what an environment holds, and nothing that does not.

The values here are what ``lockfile`` reads and writes, resolvers produce and pushes consume. A
lock is of one platform. Its packages are in installation order: what comes later wins a path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from envstore.resolver.request import Request, SourceFile


@dataclass(frozen=True, slots=True)
class CondaPackage:
    """One conda package. ``url`` holds no credentials; digests are hex; ``size`` is bytes.

    ``sha256`` and ``size`` may be missing (empty, zero) only in what was read from another tool's
    lock. ``noarch`` is empty, ``python`` or ``generic``. ``extra`` holds what else the channel's
    repodata says of it (license, timestamp, track_features, ...), as JSON values.
    """

    name: str
    version: str
    build: str
    subdir: str
    url: str
    sha256: str
    size: int = 0
    md5: str = ""
    channel: str = ""
    build_number: int = 0
    noarch: str = ""
    depends: tuple[str, ...] = ()
    constrains: tuple[str, ...] = ()
    python_site_packages_path: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def filename(self) -> str:
        """The archive's name, ``name-version-build.conda`` or ``.tar.bz2``."""
        return self.url.partition("#")[0].rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Build:
    """How a wheel was built from a source distribution: what a reproduction needs.

    ``source`` is its URL, ``sha256`` its digest in hex, ``tools`` the packages it was built with.
    """

    source: str
    sha256: str
    backend: str = ""
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PypiPackage:
    """One wheel. ``name`` is normalised (PEP 503); ``url`` is empty if it was built locally.

    ``direct`` is the URL of a requirement that names one (PEP 610), else empty. ``requested``
    says that the user asked for it by name. ``extras`` are those asked of it.
    """

    name: str
    version: str
    filename: str
    url: str
    sha256: str
    size: int = 0
    requires: tuple[str, ...] = ()
    requires_python: str = ""
    direct: str = ""
    extras: tuple[str, ...] = ()
    requested: bool = False
    build: Build | None = None


@dataclass(frozen=True, slots=True)
class LocalPython:
    """An interpreter taken from a machine instead of a channel.

    ``sha256`` is that of its canonical tree (see ``packages.interpreter``). ``site_packages`` is
    where it looks for packages, relative to the prefix.
    """

    version: str
    sha256: str
    site_packages: str
    implementation: str = "cpython"


Package = CondaPackage | PypiPackage | LocalPython


@dataclass(frozen=True, slots=True)
class Lock:
    """A resolved environment for ``platform`` (a conda subdir, ``linux-64``).

    ``virtual`` are the virtual packages it was solved for (``__glibc`` -> ``2.28``), which the
    target must have at least. ``tools`` are the versions of what resolved it. ``request`` is what
    was asked for, so that it can be resolved again.
    """

    platform: str
    packages: tuple[Package, ...]
    virtual: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    request: Request = field(default_factory=Request)
    tools: dict[str, str] = field(default_factory=dict)
    sources: tuple[SourceFile, ...] = ()

    def conda(self) -> tuple[CondaPackage, ...]:
        """Return the conda packages, in installation order."""
        return tuple(item for item in self.packages if isinstance(item, CondaPackage))

    def pypi(self) -> tuple[PypiPackage, ...]:
        """Return the wheels, in installation order."""
        return tuple(item for item in self.packages if isinstance(item, PypiPackage))

    def local_python(self) -> LocalPython | None:
        """Return the interpreter that does not come from a channel, if there is one."""
        return next((item for item in self.packages if isinstance(item, LocalPython)), None)


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """What packages must know of the environment's interpreter to be laid out.

    ``version`` is exact (``3.11.7``). ``site_packages`` is relative to the prefix.
    """

    version: str
    site_packages: str

    @property
    def minor(self) -> str:
        """``3.11`` of ``3.11.7``."""
        return ".".join(self.version.split(".")[:2])


def python_of(lock: Lock) -> PythonFacts | None:
    """Return what a lock's interpreter is, ``None`` if it has none."""
    local = lock.local_python()
    if local is not None:
        return PythonFacts(local.version, local.site_packages)
    for package in lock.conda():
        if package.name == "python":
            minor = ".".join(package.version.split(".")[:2])
            where = package.python_site_packages_path or f"lib/python{minor}/site-packages"
            return PythonFacts(package.version, where)
    return None
