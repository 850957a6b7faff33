"""From a request to a lock: conda first, then pip around what conda provides."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from envstore import __version__
from envstore.errors import AccessDeniedError, NotFoundError, UnavailableError, UsageError
from envstore.resolver.compiler import base_interpreter
from envstore.resolver.conda import cutoff_time
from envstore.resolver.conda import solve as solve_conda
from envstore.resolver.interpreters import allows, check_local, conda_python, described
from envstore.resolver.lock import (
    CondaPackage,
    LocalPython,
    Lock,
    Package,
    PypiPackage,
    python_of,
)
from envstore.resolver.request import Request
from envstore.resolver.target import Target

_FREE_THREADED = re.compile(r"python3\.\d+t(/|$)")

DEFAULT_CHANNELS = ("conda-forge",)
"""Where conda packages come from if nobody says."""

Progress = Callable[[str, int, int], None]
"""Told a phase (``resolve``, ``build``), how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a resolution needs besides its request: see ``resolve``."""

    target: Target
    cache: Path
    exclude_newer: str
    keep: tuple[Package, ...]
    warnings: list[str]


def resolve(
    request: Request,
    target: Target,
    *,
    cache: Path,
    python: Path | None = None,
    python_from: str = "auto",
    keep: Sequence[Package] = (),
    known: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    names: Path | None = None,
    warnings: list[str] | None = None,
    progress: Progress | None = None,
) -> Lock:
    """Return the lock of what ``request`` asks for on ``target``.

    A request with conda specs gets its interpreter from conda. Any other gets it as
    ``python_from`` says: ``conda``, from a channel; ``local``, the program ``python`` or the one
    behind this process; ``auto``, the program if one is given, else a channel if the request names
    channels and one of them can be reached, else the local one in ``keep`` if the request allows
    it, else this machine. Without channels nobody is asked for conda packages.

    ``keep`` are packages of an earlier lock that stay as they are if that is possible. ``known``
    are the distributions in conda packages by their SHA-256, ``names`` is a file that says so by
    conda name (see ``stubs``). What is downloaded and built is kept below ``cache``. What a user
    should know is added to ``warnings``.

    Raises ``UnsatisfiableError``, ``UsageError`` for requests that contradict themselves or the
    target, and whatever channels, indexes and builds raise.
    """
    target = target.wanting(request.virtual)
    if request.platforms and target.platform not in request.platforms:
        raise UsageError(
            f"the specification is for {', '.join(request.platforms)}, not {target.platform}",
            hint="--platform chooses one of them",
        )
    moment = cutoff_time(request.exclude_newer)
    newest = moment.isoformat().replace("+00:00", "Z") if moment is not None else ""
    around = Surroundings(
        target, cache, newest, tuple(keep), warnings if warnings is not None else []
    )

    def locked(packages: Sequence[Package]) -> Lock:
        return Lock(
            target.platform,
            tuple(packages),
            virtual=dict(target.virtual),
            variables=dict(request.variables),
            request=request,
            tools=_tools(packages),
            sources=request.sources,
        )

    def wheels(version: str, conda: Sequence[CondaPackage]) -> tuple[PypiPackage, ...]:
        if not request.pypi.requirements:
            return ()
        return _wheels(request, around, version, conda, python, known or {}, names, progress)

    conda = _conda_part(request, around, python, python_from)
    if conda is not None:
        facts = python_of(locked(conda))
        return locked([*conda, *wheels(facts.version if facts else "", conda)])
    kept = _kept_python(request, around) if python is None and python_from == "auto" else None
    if kept is not None:
        return locked([kept, *wheels(kept.version, ())])
    # Describing an interpreter may take as long as uv does, and the version is known before.
    program = python or base_interpreter()
    with ThreadPoolExecutor(1) as pool:
        describing = pool.submit(described, program, cache / "interpreters")
        version = describing.result().version if python else platform.python_version()
        check_local(program, version, request.python, target)
        found = wheels(version, ())
        local = describing.result()
    if found and _FREE_THREADED.search(local.site_packages):
        raise UsageError(
            f"wheels are chosen for the usual CPython, and {program} is free-threaded",
            hint="--python names another interpreter",
        )
    return locked([local, *found])


def _tools(packages: Sequence[Package]) -> dict[str, str]:
    """Return the versions of what resolved ``packages``, by name."""
    tools = {"envstore": __version__}
    for kind, name in ((CondaPackage, "py-rattler"), (PypiPackage, "uv")):
        if any(isinstance(package, kind) for package in packages):
            tools[name] = importlib.metadata.version(name)
    return tools


def _kept_python(request: Request, around: Surroundings) -> LocalPython | None:
    """Return the local interpreter of an earlier lock, which need not be on this machine."""
    for package in around.keep:
        if isinstance(package, LocalPython) and allows(request.python, package.version):
            return package
    return None


def _conda_part(
    request: Request, around: Surroundings, python: Path | None, python_from: str
) -> tuple[CondaPackage, ...] | None:
    """Return the conda packages, ``None`` if there are none and the interpreter is local."""
    specs = list(request.conda.specs)
    if specs and python is not None:
        raise UsageError(
            f"the interpreter comes from conda, as the conda packages do, not from {python}",
            hint="--python VERSION chooses which",
        )
    needs_python = bool(request.pypi.requirements or request.python)
    if not specs and not needs_python:
        raise UsageError("the specification asks for nothing", hint="list a package in it")
    if needs_python:
        specs.append(conda_python(request.python))
    if request.conda.specs or python_from == "conda":
        return _conda(request, around, specs)
    if python_from == "local" or python is not None or not request.conda.channels:
        return None
    try:
        return _conda(request, around, specs)
    except (UnavailableError, NotFoundError, AccessDeniedError) as error:
        around.warnings.append(f"the interpreter comes from this machine: {error.message}")
        return None


def _conda(
    request: Request, around: Surroundings, specs: Sequence[str]
) -> tuple[CondaPackage, ...]:
    return solve_conda(
        specs,
        request.conda.channels or DEFAULT_CHANNELS,
        around.target,
        cache=around.cache / "repodata",
        priority=request.conda.priority,
        exclude_newer=around.exclude_newer,
        keep=[item for item in around.keep if isinstance(item, CondaPackage)],
        warnings=around.warnings,
    )


def _wheels(
    request: Request,
    around: Surroundings,
    version: str,
    conda: Sequence[CondaPackage],
    python: Path | None,
    known: Mapping[str, Sequence[tuple[str, str]]],
    names: Path | None,
    progress: Progress | None,
) -> tuple[PypiPackage, ...]:
    """Return the wheels that pip brings to Python ``version``, built where there are none."""
    from envstore.resolver.pypi import solve as solve_pypi
    from envstore.resolver.sdists import DOWNLOADS, Builder, make_wheels
    from envstore.resolver.stubs import python_names, read_names

    _refuse_other_pythons(conda)
    if conda:
        from envstore.resolver.provided import names_at_hand

        downloads = around.cache / DOWNLOADS
        known = {**names_at_hand(conda, known, downloads), **known}
    found = solve_pypi(
        request.pypi,
        around.target,
        version,
        interpreter=python or Path(sys.executable),
        cache=around.cache,
        exclude_newer=around.exclude_newer,
        provided=python_names(conda, known, read_names(names) if names else None),
        keep=[item for item in around.keep if isinstance(item, PypiPackage)],
        warnings=around.warnings,
    )
    builder = Builder(
        version,
        around.target,
        around.cache,
        request.pypi,
        around.exclude_newer,
        python,
        tuple(conda),
    )
    return tuple(make_wheels(found, builder, progress)[0])


def _refuse_other_pythons(conda: Sequence[CondaPackage]) -> None:
    """Refuse interpreters that take other wheels than CPython's usual ones."""
    for package in conda:
        if package.name == "python" and re.search(r"_pypy$|_cp3\d+t$", package.build):
            raise UsageError(
                f"wheels are chosen for the usual CPython, not for python {package.build}",
                hint="ask for another build of python, or leave out the Python packages",
            )
