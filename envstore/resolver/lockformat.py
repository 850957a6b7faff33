"""What a lock file may hold: its fields in their order, and which values each of them takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from envstore.resolver.lock import (
    Build,
    CondaPackage,
    LocalPython,
    Lock,
    Package,
    PypiPackage,
)
from envstore.resolver.lockfields import (
    Boolean,
    FieldError,
    Free,
    Integer,
    ListOf,
    MapOf,
    Record,
    Text,
    matching,
)
from envstore.resolver.request import CondaRequest, PypiRequest, Request, SourceFile

MAX_ARCHIVE = 1 << 40
"""Bytes of one package's archive."""

_SCHEMES = ("https://", "http://", "file://", "s3://")
_SHA256 = matching("[0-9a-f]{64}", "must be 64 lower-case hex digits")
_ARCHIVES = (".conda", ".tar.bz2")


def _url(text: str) -> str:
    if not text.startswith(_SCHEMES) or re.search(r"[\s\\]", text):
        return "must be a URL of https, http, file or s3"
    return ""


def _source_url(text: str) -> str:
    if not re.match(r"[a-z][a-z0-9+.-]*://[^\s]+$", text):
        return "must be a URL"
    return ""


def _filename(text: str) -> str:
    plain = unquote(text)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.!+~=%-]*", text) or (
        re.search(r"[/\\]|\.\.", plain)
    ):
        return "is not the name of a file that can be kept under it"
    return "" if len(text) <= 250 else "is too long"


def _archive_url(text: str) -> str:
    name = text.partition("#")[0].rpartition("/")[2]
    problem = _url(text) or _filename(name)
    if not problem and not name.endswith(_ARCHIVES):
        return "must end with .conda or .tar.bz2"
    return problem


def _relative(text: str) -> str:
    parts = text.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "must be a path below the prefix"
    return ""


def _name(text: str) -> str:
    if len(text) > 200 or ".." in text or not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", text, re.A):
        return "must be of letters, digits and _ . + - and not begin with one of the last three"
    return ""


def _optional(check: Callable[[str], str]) -> Text:
    return Text(lambda text: check(text) if text else "")


_VERSION = matching(r"[A-Za-z0-9_.!+~*-]{1,200}", "is not a version")
_TEXTS = ListOf(Text())
_SOURCE = Record(SourceFile, {"name": Text(), "sha256": Text(_SHA256)})
_VARIABLES = MapOf(
    Text(matching("[A-Za-z_][A-Za-z0-9_]*", "is not the name of a variable")), Text(lines=True)
)
_VIRTUAL = MapOf(
    Text(matching("__[a-z0-9_]+", "is not the name of a virtual package, such as __glibc")),
    Text(),
)
_CONDA_REQUEST = Record(
    CondaRequest,
    {
        "specs": _TEXTS,
        "channels": _TEXTS,
        "priority": Text(matching("strict|disabled", "must be strict or disabled")),
    },
)
_PYPI_REQUEST = Record(
    PypiRequest,
    {
        "requirements": _TEXTS,
        "constraints": _TEXTS,
        "overrides": _TEXTS,
        "default_index": Text(),
        "indexes": _TEXTS,
        "find_links": _TEXTS,
        "no_index": Boolean(),
        "index_strategy": Text(),
        "prerelease": Text(),
        "only_binary": _TEXTS,
        "no_binary": _TEXTS,
        "require_hashes": Boolean(),
        "hashes": MapOf(Text(), _TEXTS),
    },
)
_REQUEST = Record(
    Request,
    {
        "name": Text(),
        "conda": _CONDA_REQUEST,
        "pypi": _PYPI_REQUEST,
        "python": Text(),
        "variables": _VARIABLES,
        "platforms": _TEXTS,
        "virtual": _VIRTUAL,
        "exclude_newer": Text(),
        "sources": ListOf(_SOURCE),
    },
)
_CONDA = Record(
    CondaPackage,
    {
        "name": Text(_name),
        "version": Text(_VERSION),
        "build": Text(matching(r"[A-Za-z0-9_.!+=~-]{1,200}", "is not a build string")),
        "build_number": Integer(1 << 53),
        "subdir": Text(matching("[a-z0-9]+(-[a-z0-9_]+)?", "is not a platform")),
        "noarch": Text(matching("|python|generic", "must be python or generic")),
        "channel": Text(),
        "url": Text(_archive_url),
        "sha256": Text(_SHA256),
        "md5": _optional(matching("[0-9a-f]{32}", "must be 32 lower-case hex digits")),
        "size": Integer(MAX_ARCHIVE),
        "depends": _TEXTS,
        "constrains": _TEXTS,
        "python_site_packages_path": _optional(_relative),
        "extra": MapOf(Text(), Free()),
    },
)
_BUILD = Record(
    Build,
    {
        "source": Text(_source_url),
        "sha256": _optional(_SHA256),
        "backend": Text(),
        "tools": _TEXTS,
    },
)
_PYPI = Record(
    PypiPackage,
    {
        "name": Text(matching("[a-z0-9]+(-[a-z0-9]+)*", "is not a normalised name (PEP 503)")),
        "version": Text(_VERSION),
        "filename": Text(_filename),
        "url": _optional(_url),
        "sha256": Text(_SHA256),
        "size": Integer(MAX_ARCHIVE),
        "requested": Boolean(),
        "extras": _TEXTS,
        "direct": _optional(_source_url),
        "requires": _TEXTS,
        "requires_python": Text(),
        "build": _BUILD,
    },
)
_LOCAL = Record(
    LocalPython,
    {
        "version": Text(_VERSION),
        "sha256": Text(_SHA256),
        "site_packages": Text(_relative),
        "implementation": Text(matching("[a-z]{1,20}", "is not an implementation of Python")),
    },
    always=("implementation",),
)
_KINDS = {"conda": _CONDA, "pypi": _PYPI, "python": _LOCAL}


class _AnyPackage:
    """A package; its ``kind`` says which of the three it is."""

    def read(self, value: Any, where: str) -> Package:
        if not isinstance(value, dict):
            raise FieldError(where, "must be an object")
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise FieldError(f"{where}.kind", f"must be one of {', '.join(_KINDS)}")
        body = {name: item for name, item in value.items() if name != "kind"}
        package: Package = _KINDS[kind].read(body, where)
        return package

    def write(self, value: Package) -> dict[str, Any]:
        kinds = {CondaPackage: "conda", PypiPackage: "pypi", LocalPython: "python"}
        kind = kinds[type(value)]
        return {"kind": kind, **_KINDS[kind].write(value)}


LOCK = Record(
    Lock,
    {
        "platform": Text(matching("[a-z0-9]+-[a-z0-9_]+", "is not a platform, such as linux-64")),
        "virtual": _VIRTUAL,
        "tools": MapOf(Text(), Text()),
        "sources": ListOf(_SOURCE),
        "request": _REQUEST,
        "variables": _VARIABLES,
        "packages": ListOf(_AnyPackage()),
    },
    always=("virtual", "tools", "sources", "request"),
)
