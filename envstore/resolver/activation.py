"""Activation: what must be set, and which scripts run, before an environment is used.

What ``conda activate`` does, in its order: the prefix's ``bin`` comes first in PATH, ``CONDA_*``
variables say what is active, then come the variables of ``etc/conda/env_vars.d/*.json`` and of
``conda-meta/state``, then the scripts of ``etc/conda/activate.d``. A prefix without
``conda-meta`` gets what of this has a meaning there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.errors import CorruptError, EnvstoreError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ODD = re.compile(r"[^A-Za-z0-9._/:@+-]")
"""What a shell may take for more than a letter in a prompt."""
_MAX_FILE = 1 << 20
_STALE = (
    *("VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONHOME"),
    *("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_PROMPT_MODIFIER"),
)
"""What is no longer true once another Python comes first."""
_UNSET = "***unset***"
"""What conda writes for a variable that the user took out again."""
_OWN = ("_", "SHLVL", "PWD", "OLDPWD")
"""What a shell sets by itself, for itself."""

# Scripts may print, so what they leave behind goes elsewhere than where they print to. The name
# of each is said before, because a script can end the shell that it is read by.
_SOURCE = """
exec 3>&1 1>&2
for script do
    printf '%s\\0' "$script" >&3
    . "$script" || :
done
printf '\\0' >&3
exec /usr/bin/env -0 >&3
"""


@dataclass(frozen=True, slots=True)
class Activation:
    """What activating the environment at ``prefix`` changes, in this order.

    ``unset`` variables would no longer be true. ``programs`` is the directory to put first in
    PATH, empty if there is none. ``variables`` are set, then the scripts in ``enter`` are read;
    those in ``leave`` before everything is put back. ``suffix`` is for scripts: they exist for
    each kind of shell. ``name`` is shown in prompts.
    """

    prefix: str
    name: str
    programs: str = ""
    unset: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    enter: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What comes before a shell's own prompt."""
        return _prompt(self.name)


def read_activation(
    prefix: Path, name: str, base: Mapping[str, str], *, suffix: str = ".sh"
) -> Activation:
    """Return what activating ``prefix`` over the environment variables ``base`` means.

    ``name`` is what a user calls it, ``suffix`` that of the scripts (``.sh`` or ``.fish``).
    Raises ``CorruptError`` for variables that are none.
    """
    conda = (prefix / "conda-meta").is_dir()
    venv = (prefix / "pyvenv.cfg").is_file()
    variables = {"ENVSTORE_PREFIX": str(prefix)}
    unset: tuple[str, ...] = ()
    if any(os.path.lexists(prefix / "bin" / python) for python in ("python", "python3")):
        unset = _STALE
    if venv:
        variables.update(VIRTUAL_ENV=str(prefix), VIRTUAL_ENV_PROMPT=name)
    if conda:
        variables.update(_conda_variables(str(prefix), name, _prompt(name), base))
    variables.update(_own_variables(prefix))
    return Activation(
        str(prefix),
        name,
        str(prefix / "bin") if (prefix / "bin").is_dir() else "",
        tuple(item for item in unset if item not in variables),
        variables,
        tuple(_scripts(prefix / "etc/conda/activate.d", suffix)),
        tuple(_scripts(prefix / "etc/conda/deactivate.d", suffix))[::-1],
    )


def activated(activation: Activation, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables ``base`` as a command finds them in the environment.

    A shell is started only if there are scripts. What they print goes to stderr. Raises
    ``EnvstoreError`` if one of them ends the shell.
    """
    found = {name: value for name, value in base.items() if name not in activation.unset}
    if activation.programs:
        found["PATH"] = f"{activation.programs}:{base.get('PATH') or os.defpath}"
    found.update(activation.variables)
    return _sourced(activation.enter, found, base) if activation.enter else found


def _sourced(
    scripts: tuple[str, ...], environment: dict[str, str], base: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables after ``scripts``, read by the user's own bash or any sh."""
    path = base.get("PATH") or os.defpath
    # Written for what users have: many scripts use bash's own words.
    shell = shutil.which("bash", path=path) or shutil.which("sh", path=path)
    if shell is None:
        raise EnvstoreError("there is no sh on PATH for the environment's activation scripts")
    # Not a pipe, whose end would come only with that of what a script starts and leaves running.
    with open(os.memfd_create("activation"), "w+b") as told:
        done = subprocess.run(
            [shell, "-c", _SOURCE, "activation", *scripts],
            env={name: value for name, value in environment.items() if name != "BASH_ENV"},
            stdin=subprocess.DEVNULL,
            stdout=told,
            check=False,
        )
        told.seek(0)
        begun, whole, left = told.read().partition(b"\0\0")
    if done.returncode or not whole:
        last = os.fsdecode(begun.rstrip(b"\0").rpartition(b"\0")[2])
        raise EnvstoreError(
            f"the activation script {last} ended its shell with status {done.returncode}",
            hint="it must not exit",
        )
    found = {name: environment[name] for name in (*_OWN, "BASH_ENV") if name in environment}
    for item in left.split(b"\0"):
        name, assigned, value = os.fsdecode(item).partition("=")
        if assigned and name not in _OWN:
            found[name] = value
    return found


def _prompt(name: str) -> str:
    return f"({_ODD.sub('_', name)}) "


def _conda_variables(
    prefix: str, name: str, prompt: str, base: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables by which conda knows what is active, and what was before."""
    said = base.get("CONDA_SHLVL", "")
    level = int(said) if said.isascii() and said.isdigit() and len(said) < 4 else 0
    found = {
        "CONDA_PREFIX": prefix,
        "CONDA_DEFAULT_ENV": name,
        "CONDA_SHLVL": str(level + 1),
        "CONDA_PROMPT_MODIFIER": prompt,
    }
    if level and base.get("CONDA_PREFIX"):
        found[f"CONDA_PREFIX_{level}"] = base["CONDA_PREFIX"]
    return found


def _own_variables(prefix: Path) -> dict[str, str]:
    """Return the variables that packages ask for, then those that the environment does."""
    found: dict[str, str] = {}
    folder = prefix / "etc/conda/env_vars.d"
    for path in (*_listed(folder, ".json"), prefix / "conda-meta/state"):
        said = _load(path)
        if path.name == "state" and path.parent.name == "conda-meta":
            said = said.get("env_vars", {})
        if not isinstance(said, dict):
            raise _malformed(path, "its variables are no object")
        for name, value in said.items():
            if not _NAME.fullmatch(name) or not isinstance(value, str) or "\0" in value:
                raise _malformed(path, f"{name!r} is no variable with a text")
            if value == _UNSET:
                found.pop(name, None)
            else:
                found[name] = value
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if len(data) > _MAX_FILE:
        raise _malformed(path, f"it is larger than {_MAX_FILE} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _malformed(path, "it is no object")
    return found


def _malformed(path: Path, why: str) -> CorruptError:
    return CorruptError(f"the environment's {path} cannot be used: {why}")


def _scripts(folder: Path, suffix: str) -> Iterator[str]:
    for path in _listed(folder, suffix):
        if path.is_file():
            yield str(path)


def _listed(folder: Path, suffix: str) -> list[Path]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names) if name.endswith(suffix)]
