"""Says what a file specifies by what is in it; its name decides only where that leaves a choice."""

from __future__ import annotations

import os
import re
from pathlib import Path

from envstore.errors import UsageError
from envstore.resolver.kinds import detect_kind
from envstore.resolver.specs.files import read_bytes, text_of
from envstore.resolver.specs.requirement_lines import LineError, logical_lines, parse_line

ENVIRONMENT = "prefix"
"""A directory that is an environment already: a conda prefix or a venv."""

LOCKS = frozenset(
    {"envstore-lock", "pixi.lock", "conda-lock.yml", "explicit", "pylock.toml", "uv.lock"}
)
"""The formats that leave nothing to resolve."""

REQUESTS = frozenset({"environment.yml", "requirements.txt", "pyproject.toml", "pixi.toml"})
"""The formats that say what is wanted."""

FOREIGN = {
    "poetry.lock": "export it: poetry export -f requirements.txt, or poetry lock to pylock.toml",
    "pdm.lock": "export it: pdm export -f pylock",
    "Pipfile.lock": "export it: pipenv requirements --hash",
    "package.json": "envstore knows Python and conda packages",
}
"""Formats that are recognised to say what to do instead."""

_CANDIDATES = (
    "envstore.lock",
    "pixi.lock",
    "pixi.toml",
    "conda-lock.yml",
    "pylock.toml",
    "pyproject.toml",
    "uv.lock",
    "environment.yml",
    "environment.yaml",
    "requirements.txt",
)
_NAMES = {name: name for name in _CANDIDATES[1:]} | {"environment.yaml": "environment.yml"}
_YAML_KEY = re.compile(r"^([A-Za-z_][\w-]*|\"[\w-]+\"|'[\w-]+')[ \t]*:(?=\s|$)", re.MULTILINE)
_TOML_KEY = re.compile(r"^([A-Za-z_][\w-]*)[ \t]*=[ \t]*(?=[\"'\[{0-9tf])", re.MULTILINE)
_TOML_TABLE = re.compile(
    r"^\[{1,2}[ \t]*([\w.\"' -]+?)[ \t]*\]{1,2}[ \t]*(?:#.*)?\r?$", re.MULTILINE
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\]\s*)?([(=<>!~;@].*)?$", re.DOTALL)
_ASKS = re.compile(r"[=<>~]=|[<>@;]|://|\[")
_REQUIREMENTS_NAME = re.compile(r".*(requirements|constraints).*\.(txt|in)", re.IGNORECASE)


def detect_format(path: Path) -> str:
    """Return the format of a specification, empty for what is none.

    One of ``LOCKS``, ``REQUESTS``, ``FOREIGN``, or ``ENVIRONMENT`` for a directory; a directory
    with a specification in it has that one's format (see ``specification_in``). Raises
    ``NotFoundError``, ``AccessDeniedError``, ``UsageError``.
    """
    if os.path.isdir(path):
        if detect_kind(path) == "env":
            return ENVIRONMENT
        inside = specification_in(path)
        return detect_format(inside) if inside else ""
    data = read_bytes(path)
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return ""
    try:
        text = text_of(path, data)
    except UsageError:
        return ""
    return format_of(text, path.name)


def lists_names(path: Path) -> bool:
    """Whether a file without a format may be meant for requirements: a list of bare names.

    Raises as ``detect_format``.
    """
    try:
        lines = [parse_line(line) for _, line in logical_lines(text_of(path, read_bytes(path)))]
    except (UsageError, LineError):
        return False
    return bool(lines) and all(_NAME.match(line.requirement) for line in lines)


def specification_in(directory: Path) -> Path | None:
    """Return the specification that speaks for a directory: a lock before what it locks."""
    for name in _CANDIDATES:
        path = directory / name
        if path.is_file() and detect_format(path):
            return path
    return None


def format_of(text: str, name: str) -> str:
    """Return the format of a text (see ``detect_format``)."""
    if text.lstrip().startswith("{"):
        return _of_json(text, name)
    lines = (line.strip() for line in text.splitlines())
    if any(line == "@EXPLICIT" for line in lines):
        return "explicit"
    # What comes first: a list continued over lines in TOML may look like YAML, and the reverse.
    tables = [found.replace('"', "") for found in _TOML_TABLE.findall(text)]
    toml = _TOML_KEY.findall(text)
    if tables or (toml and not _YAML_KEY.search(text)):
        found = _of_toml(text, tables, toml, name)
        if found:
            return found
    keys = {key.strip("\"'") for key in _YAML_KEY.findall(text)}
    found = _of_yaml(keys)
    if found:
        return found
    if _is_requirements(text, name):
        return "requirements.txt"
    # Too broken to be anything: what it is called says as what it is to be found broken.
    return _NAMES.get(name, "")


def _of_json(text: str, name: str) -> str:
    head = text[:65536]
    if re.search(r'"format"\s*:\s*"envstore-lock"', head):
        return "envstore-lock"
    if '"_meta"' in head and name == "Pipfile.lock":
        return name
    return "package.json" if name in ("package.json", "package-lock.json") else ""


def _of_toml(text: str, tables: list[str], keys: list[str], name: str) -> str:
    first = {table.partition(".")[0].strip() for table in tables}
    if "lock-version" in keys and ("packages" in first or "packages" in keys):
        return "pylock.toml"
    if "package" in first:
        if "metadata" in first and "content-hash" in keys:
            return "poetry.lock"
        if "metadata" in first and "strategy" in keys:
            return "pdm.lock"
        if "requires-python" in keys or "revision" in keys or name == "uv.lock":
            return "uv.lock"
    pixi = first & {"workspace", "feature", "environments"} or _has_channels(text, tables)
    foreign = any(table.startswith("tool.") for table in tables)
    if name.endswith("pixi.toml") or (pixi and not foreign):
        return "pixi.toml"
    if first & {"project", "build-system", "dependency-groups", "tool"}:
        return "pyproject.toml"
    return name if name in ("pixi.toml", "pyproject.toml", "uv.lock") else ""


def _has_channels(text: str, tables: list[str]) -> bool:
    """Return whether the project table is pixi's and not PEP 621's, which has no channels."""
    match = re.search(
        r"^\[(project|workspace)\]\s*$(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL
    )
    return bool(match and re.search(r"^channels\s*=", match[2], re.MULTILINE)) and bool(tables)


def _of_yaml(keys: set[str]) -> str:
    if {"version", "environments", "packages"} <= keys:
        return "pixi.lock"
    if {"version", "metadata", "package"} <= keys:
        return "conda-lock.yml"
    if "dependencies" in keys or ("channels" in keys and keys <= {"name", "channels", "prefix"}):
        return "environment.yml"
    return ""


def _is_requirements(text: str, name: str) -> bool:
    if _REQUIREMENTS_NAME.fullmatch(name):
        return True
    try:
        lines = [parse_line(line) for _, line in logical_lines(text)]
    except LineError:
        return False
    # A list of words is not taken for names to fetch from an index: that some line asks for more
    # than a name shows what it is meant for.
    if not any(line.options or _ASKS.search(line.requirement) for line in lines):
        return False
    return all(
        not line.requirement
        or _NAME.match(line.requirement)
        or "://" in line.requirement
        or line.requirement.startswith(("./", "../", "/"))
        for line in lines
    )
