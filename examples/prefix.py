"""Builds an environment in one prefix: a copy of the running interpreter, and wheels beside it.

No venv layer: a venv names its base interpreter by an absolute path, so its store entry would be
of use only on machines that have the same interpreter in the same place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

# What no program needs at run time, and what belongs to the machine rather than to Python.
_LEFT_OUT = shutil.ignore_patterns(
    "__pycache__",
    "site-packages",
    "dist-packages",
    "config-*",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "ensurepip",
    "EXTERNALLY-MANAGED",
    "sitecustomize.py",
)
_ORIGIN_LIB = b"$ORIGIN/../lib"
_ABOUT = """
import json, os, site, sys
with open("/proc/self/maps") as maps:
    libraries = sorted({line.split(None, 5)[5].strip() for line in maps if "/libpython" in line})
print(json.dumps({
    "prefix": sys.prefix, "base": sys.base_prefix, "libraries": libraries,
    "site": site.getsitepackages(),
}))
"""


class BuildError(Exception):
    """The environment could not be built; the message says why and what to do."""


def build_prefix(requirements: Path, work: Path, say: Callable[[str], None]) -> tuple[Path, bool]:
    """Return a prefix that holds ``requirements``, and whether it was there already.

    It is kept in ``work`` under a name that changes with the interpreter, the requirements and
    this module. Raises ``BuildError``.
    """
    base = Path(sys.executable).resolve()
    key = hashlib.sha256()
    for part in (str(base).encode(), sys.version.encode(), requirements.read_bytes()):
        key.update(hashlib.sha256(part).digest())
    key.update(Path(__file__).read_bytes())
    prefix = work / f"environment-{key.hexdigest()[:12]}"
    complete = prefix.with_suffix(".complete")
    if complete.exists():
        return prefix, True
    shutil.rmtree(prefix, ignore_errors=True)
    say(f"copying Python {sys.version.split()[0]} from {sys.base_prefix}")
    python = _copy_interpreter(base, prefix)
    say("downloading and unpacking wheels (about 130 MB the first time)")
    _install(python, requirements)
    complete.touch()
    return prefix, False


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would lead another Python astray."""
    redirects = {"PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in redirects and name != "VIRTUAL_ENV"
    }
    return {**kept, "PYTHONNOUSERSITE": "1"}


def _copy_interpreter(base: Path, prefix: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    if not library.is_relative_to(sys.base_prefix):
        raise BuildError(f"{library} is not inside {sys.base_prefix}: cannot copy this Python")
    python = prefix / "bin" / version
    python.parent.mkdir(parents=True)
    shutil.copy2(base, python)
    python.chmod(0o755)
    for name in ("python3", "python"):
        (python.parent / name).symlink_to(version)
    shutil.copytree(
        library,
        prefix / library.relative_to(sys.base_prefix),
        ignore=_LEFT_OUT,
        ignore_dangling_symlinks=True,
    )
    shared = _loaded_libpython()
    if shared is not None:
        (prefix / "lib").mkdir(exist_ok=True)
        shutil.copy2(shared, prefix / "lib" / shared.name)
        _look_in_own_lib(python, shared)
    _check(python, prefix, own_library=shared is not None)
    return python


def _loaded_libpython() -> Path | None:
    """Return the shared library that holds this interpreter, None if it is part of the program."""
    match = re.search(r"(/\S*/libpython3\.\d+\S*)$", Path("/proc/self/maps").read_text(), re.M)
    return Path(match[1]) if match else None


def _look_in_own_lib(python: Path, shared: Path) -> None:
    """Make the copied program look for its library beside itself.

    A build tells its program where the library is installed by an absolute path. The new one is
    shorter or the check that follows fails, so it fits into the old one's place.
    """
    data = python.read_bytes()
    for folder in {str(shared.parent), sysconfig.get_config_var("LIBDIR") or ""}:
        old = b"\0" + os.fsencode(folder) + b"\0"
        new = b"\0" + _ORIGIN_LIB.ljust(len(old) - 2, b"\0") + b"\0"
        if folder and len(new) == len(old):
            data = data.replace(old, new)
    python.write_bytes(data)


def _check(python: Path, prefix: Path, *, own_library: bool) -> None:
    about = json.loads(_run([python, "-I", "-c", _ABOUT], "the copied interpreter does not run"))
    inside = [about["prefix"], about["base"], *about["site"][:1], *about["libraries"]]
    strangers = [path for path in inside if not Path(path).resolve().is_relative_to(prefix)]
    if strangers or (own_library and not about["libraries"]):
        raise BuildError(
            f"the copied interpreter still uses {', '.join(strangers) or 'another library'}: "
            "use another Python, for example with make setup PYTHON=/usr/bin/python3"
        )


def _install(python: Path, requirements: Path) -> None:
    """Install wheels by the copied interpreter's own rules on where packages belong."""
    pip = [sys.executable, "-I", "-m", "pip", "--python", str(python)]
    options = [
        *("--disable-pip-version-check", "--quiet", "--progress-bar=off"),
        *("--ignore-installed", "--no-compile", "--no-deps", "--only-binary=:all:"),
        *("--root-user-action=ignore", "--no-warn-script-location"),
    ]
    _run([*pip, "install", *options, "-r", str(requirements)], "pip could not install the wheels")


def _run(command: list[str | Path], what: str) -> str:
    """Run ``command`` and return what it printed. Raises ``BuildError``."""
    done = subprocess.run(
        command,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BuildError(f"{what}:\n  " + "\n  ".join(lines[-6:]))
    return done.stdout
