"""Reads requirements files, and the ``pip:`` section of environment files, into a request."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from envstore.errors import UsageError
from envstore.resolver.request import PypiRequest, Request
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import at, file_url, located, read_text, refuse_secrets, wrong
from envstore.resolver.specs.requirement_lines import (
    Line,
    LineError,
    checked_hash,
    expand,
    logical_lines,
    parse_line,
    requirement,
)

_MOST_FILES = 64
_IGNORED = {
    "--trusted-host": "set it for uv, by UV_INSECURE_HOST",
    "--prefer-binary": "what must come as a wheel is said by --only-binary",
    "--use-feature": "it concerns pip alone",
}


def read_requirements(path: Path, context: Context) -> Request:
    """Read a requirements file and all it includes; raises ``UsageError``, ``NotFoundError``."""
    reader = Reader(context)
    reader.file(path, constraint=False)
    return Request(pypi=reader.result())


@dataclass(slots=True)
class Reader:
    """Collects lines of requirements; options concern everything, as they do in pip."""

    context: Context
    requirements: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    indexes: list[str] = field(default_factory=list)
    find_links: list[str] = field(default_factory=list)
    only_binary: list[str] = field(default_factory=list)
    no_binary: list[str] = field(default_factory=list)
    hashes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    default_index: str = ""
    prerelease: str = ""
    no_index: bool = False
    require_hashes: bool = False
    _files: set[tuple[str, bool]] = field(default_factory=set)

    def result(self) -> PypiRequest:
        """Return what was read."""
        return PypiRequest(
            requirements=_unique(self.requirements),
            constraints=_unique(self.constraints),
            default_index=self.default_index,
            indexes=_unique(self.indexes),
            find_links=_unique(self.find_links),
            no_index=self.no_index,
            prerelease=self.prerelease,
            only_binary=_unique(self.only_binary),
            no_binary=_unique(self.no_binary),
            require_hashes=self.require_hashes or bool(self.hashes),
            hashes=self.hashes,
        )

    def file(self, path: Path, *, constraint: bool) -> None:
        """Read a file; each counts once, so files may include each other."""
        key = (os.path.realpath(path), constraint)
        if key in self._files:
            return
        self._files.add(key)
        if len(self._files) > _MOST_FILES:
            raise wrong(path, f"is one of more than {_MOST_FILES} files that include each other")
        text = read_text(path, self.context)
        for number, line in logical_lines(text):
            self.line(line, path, number, constraint=constraint)

    def line(self, text: str, path: Path, number: int = 0, *, constraint: bool = False) -> None:
        """Read one logical line, which stands in ``path``. Raises ``UsageError``."""
        try:
            expanded = refuse_secrets(expand(text), at(path, number))
            parsed = parse_line(expanded)
            self._requirement(parsed, path, constraint)
            for name, value in parsed.options:
                self._option(name, value, path, number, constraint)
        except LineError as error:
            raise wrong(path, str(error), line=number, hint=error.hint) from error

    def _requirement(self, line: Line, path: Path, constraint: bool) -> None:
        hashes = [checked_hash(value) for name, value in line.options if name == "--hash"]
        if not line.requirement:
            if hashes:
                raise LineError("--hash belongs behind a requirement")
            return
        text = requirement(line.requirement, path.parent)
        (self.constraints if constraint else self.requirements).append(text)
        if hashes:
            self.hashes[text] = _unique([*self.hashes.get(text, ()), *hashes])

    def _option(self, name: str, value: str, path: Path, number: int, constraint: bool) -> None:
        if name in ("--requirement", "--constraint"):
            self._include(value, path, constraint or name == "--constraint")
        elif name == "--editable":
            raise LineError(
                f"{value} is to be installed editable, which a snapshot cannot be",
                "write the path without -e, or name a wheel of it",
            )
        elif name in ("--global-option", "--config-settings"):
            raise LineError(
                f"{name} is not supported", "build a wheel with it, and name that instead"
            )
        elif name in _IGNORED:
            self.context.warn(f"{at(path, number)}: {name} is ignored: {_IGNORED[name]}")
        else:
            self._index_option(name, value, path)

    def _index_option(self, name: str, value: str, path: Path) -> None:
        match name:
            case "--index-url":
                if self.default_index not in ("", value):
                    raise LineError(f"--index-url is given twice, before as {self.default_index}")
                self.default_index = value
            case "--extra-index-url":
                self.indexes.append(value)
            case "--find-links":
                self.find_links.append(_links(value, path.parent))
            case "--no-index":
                self.no_index = True
            case "--pre":
                self.prerelease = "allow"
            case "--require-hashes":
                self.require_hashes = True
            case "--only-binary":
                _change(self.only_binary, self.no_binary, value)
            case "--no-binary":
                _change(self.no_binary, self.only_binary, value)

    def _include(self, value: str, path: Path, constraint: bool) -> None:
        if "://" in value and not value.startswith("file://"):
            raise LineError(f"{value} is not on this machine", "download it first")
        included = _included(value, path)
        if not included.exists():
            raise LineError(f"there is no {included}")
        self.file(included, constraint=constraint)


def _included(value: str, path: Path) -> Path:
    """Return an included file's path, relative where the including one's is."""
    return Path(os.path.normpath(path.parent / value.removeprefix("file://")))


def _links(value: str, base: Path) -> str:
    if "://" in value:
        return value
    path = located(base, value)
    if not path.exists():
        raise LineError(f"there is no {path}")
    return file_url(path)


def _change(names: list[str], others: list[str], value: str) -> None:
    """Add to ``names``; as in pip, ``:none:`` empties, and the last word on a name counts."""
    from packaging.utils import canonicalize_name

    for part in filter(None, (part.strip() for part in value.split(","))):
        if part == ":none:":
            names.clear()
            continue
        name = part if part == ":all:" else canonicalize_name(part)
        if name == ":all:":
            names.clear()
            others.clear()
        elif name in others:
            others.remove(name)
        names.append(name)


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def check_versions(text: str, where: str) -> str:
    """Return a PEP 440 specifier set in its usual spelling; raises ``UsageError``."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return str(SpecifierSet(text))
    except InvalidSpecifier as error:
        raise UsageError(f"{where}: {error}") from error
