"""What conda provides, told to uv: for each distribution a wheel with a name, a version, no more.

uv then takes the version that conda installed, asks no index for it, and reports what does not
fit with it. The version carries ``+conda``, so that it can be no other wheel's.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from envstore.errors import UsageError
from envstore.resolver.lock import CondaPackage

_MAX_MAPPING = 64 << 20
_PYTHON = frozenset({"python", "python_abi", "cpython"})
_RENAMED = {
    "antlr-python-runtime": "antlr4-python3-runtime",
    "brotli-python": "brotli",
    "dask-core": "dask",
    "imbalanced-learn-base": "imbalanced-learn",
    "jupyter_client-base": "jupyter-client",
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "nbconvert-core": "nbconvert",
    "py-lief": "lief",
    "py-opencv": "opencv-python",
    "py-xgboost": "xgboost",
    "py-xgboost-cpu": "xgboost",
    "py-xgboost-gpu": "xgboost",
    "pyarrow-core": "pyarrow",
    "pyside6": "pyside6",
    "pytables": "tables",
    "python-duckdb": "duckdb",
    "python-fastjsonschema": "fastjsonschema",
    "python-flatbuffers": "flatbuffers",
    "python-graphviz": "graphviz",
    "python-kaleido": "kaleido",
    "python-tzdata": "tzdata",
    "python-xxhash": "xxhash",
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "seaborn-base": "seaborn",
    "tensorflow-base": "tensorflow",
    "uvicorn-standard": "uvicorn",
}
"""Distributions whose conda package has another name, of those that people use most."""

_log = logging.getLogger(__name__)

NameMap = Mapping[str, tuple[str, ...]]
"""PyPI names by conda name; an empty tuple for what is no distribution."""


@dataclass(frozen=True, slots=True)
class Provided:
    """A Python distribution that a conda package brings. ``name`` is normalised (PEP 503)."""

    name: str
    version: str
    package: str


def python_names(
    packages: Sequence[CondaPackage],
    known: Mapping[str, Sequence[tuple[str, str]]],
    renamed: NameMap | None = None,
) -> list[Provided]:
    """Return the distributions in ``packages``, by name.

    The first of these that says something decides: ``renamed`` (see ``read_names``); ``known``,
    the names and versions in the ``*.dist-info`` of packages by SHA-256; the ``purls`` of the
    repodata; and else, for packages that depend on Python, their own name, or PyPI's for what is
    well known under another one. A version that PyPI has no form for is left out.
    """
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    found: dict[str, Provided] = {}
    for package in packages:
        for name, text, sure in _names(package, known, renamed or {}):
            try:
                version = str(Version(text))
            except InvalidVersion:
                _log.debug("conda package %s has version %s, which PyPI cannot", name, text)
                continue
            canonical = canonicalize_name(name)
            if canonical not in found or sure:
                found[canonical] = Provided(canonical, version, package.name)
    return [found[name] for name in sorted(found)]


def _names(
    package: CondaPackage, known: Mapping[str, Sequence[tuple[str, str]]], renamed: NameMap
) -> list[tuple[str, str, bool]]:
    """Return names and versions, and whether they are certain rather than guessed."""
    if package.name in renamed:
        return [(name, package.version, True) for name in renamed[package.name]]
    if package.sha256 in known:
        return [(name, version, True) for name, version in known[package.sha256]]
    purls = package.extra.get("purls")
    if isinstance(purls, list):
        return [
            (name, version or package.version, True)
            for name, version in map(_of_purl, purls)
            if name
        ]
    needs = {text.split()[0].rpartition("::")[2] for text in package.depends if text.split()}
    if package.noarch != "python" and not needs & _PYTHON:
        return []
    name = _RENAMED.get(package.name, package.name)
    return [(name, package.version, name == package.name)]


def _of_purl(purl: object) -> tuple[str, str]:
    """Return name and version of ``pkg:pypi/name@version?...``, empty for another kind."""
    if not isinstance(purl, str) or not purl.startswith("pkg:pypi/"):
        return "", ""
    plain = purl.removeprefix("pkg:pypi/").partition("?")[0].partition("#")[0]
    name, _, version = plain.partition("@")
    return unquote(name), unquote(version)


def read_names(path: Path) -> NameMap:
    """Return what a mapping file says: a JSON object of conda names to PyPI names.

    A value is a name, a list of names, or null for what is no distribution. Raises ``UsageError``.
    """
    try:
        data = path.read_bytes()
        if len(data) > _MAX_MAPPING:
            raise UsageError(f"{path} is too large to be a mapping of names")
        value = json.loads(data)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{path}: {place}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold an object of conda names to PyPI names")
    return {name: _listed(path, name, names) for name, names in value.items()}


def _listed(path: Path, name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in names):
        raise UsageError(f"{path}: {name!r} must have a name, a list of names or null")
    return tuple(names)


def write_stubs(provided: Sequence[Provided], directory: Path) -> list[str]:
    """Write a wheel for each of ``provided`` into ``directory``; return constraints on them."""
    directory.mkdir(parents=True, exist_ok=True)
    constraints = []
    for item in provided:
        version = item.version if "+" in item.version else f"{item.version}+conda"
        stem = f"{item.name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as archive:
            info = f"{stem}.dist-info"
            metadata = f"Metadata-Version: 2.1\nName: {item.name}\nVersion: {version}\n"
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: envstore\nRoot-Is-Purelib: true\n"
                "Tag: py3-none-any\n",
            )
            archive.writestr(f"{info}/RECORD", "")
        constraints.append(f"{item.name}=={version}")
    return constraints
