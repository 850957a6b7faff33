"""The grammar of requirements files: lines, their options, and what a requirement in one means.

Follows pip's documented format: https://pip.pypa.io/en/stable/reference/requirements-file-format/
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from envstore.resolver.specs.files import file_url, located, parse_toml, read_text

_NEWLINE = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"(^|\s+)#.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_HASH = re.compile(r"(sha256|sha384|sha512):([0-9a-f]+)", re.IGNORECASE)
_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}
_SHORT = {"-r": "--requirement", "-c": "--constraint", "-e": "--editable", "-i": "--index-url"} | {
    "-f": "--find-links",
    "-C": "--config-settings",
}
_FLAGS = frozenset({"--no-index", "--pre", "--prefer-binary", "--require-hashes"})
_VALUED = frozenset(
    {
        *_SHORT.values(),
        "--pypi-url",
        "--extra-index-url",
        "--no-binary",
        "--only-binary",
        "--trusted-host",
        "--use-feature",
        "--hash",
        "--global-option",
        "--config-setting",
    }
)
_SPELLINGS = {"--pypi-url": "--index-url", "--config-setting": "--config-settings"}
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?!\\)")
_PATH = re.compile(r"(?P<path>.+?)(?P<extras>\[[^\]]*\])?")
_NAMED = re.compile(r"\s*[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\])?\s*@")


class LineError(ValueError):
    """A line that means nothing, with what is wrong and how to mend it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Line:
    """One logical line: a requirement, or none, and options as (long name, value)."""

    requirement: str = ""
    options: tuple[tuple[str, str], ...] = ()


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first physical line, text without comments), none of them empty.

    A backslash at the end continues a line, but not a comment.
    """
    start, parts = 0, list[str]()
    for number, line in enumerate(_NEWLINE.split(text), 1):
        comment = line.lstrip().startswith("#")
        if comment and parts:
            # As in pip, a comment ends what is continued.
            line = ""
        start = start if parts else number
        if line.endswith("\\") and not comment:
            parts.append(line[:-1])
            continue
        whole = _COMMENT.sub("", "".join([*parts, line])).strip()
        parts.clear()
        if whole:
            yield start, whole
    whole = _COMMENT.sub("", "".join(parts)).strip()
    if whole:
        yield start, whole


def expand(line: str) -> str:
    """Replace ``${VARIABLE}`` by the environment; raises ``LineError`` if one is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise LineError(f"the environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(value, line)


def parse_line(line: str) -> Line:
    """Split a logical line; raises ``LineError`` for options that pip does not know either."""
    words = line.split(" ")
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    try:
        rest = shlex.split(" ".join(words[first:]))
    except ValueError as error:
        raise LineError(f"the options cannot be told apart: {error}") from error
    options, waiting = list[tuple[str, str]](), list(reversed(rest))
    while waiting:
        name, joined, value = _option(waiting.pop())
        if name in _FLAGS:
            if joined:
                raise LineError(f"{name} takes no value")
        elif name in _VALUED:
            if not joined:
                if not waiting:
                    raise LineError(f"{name} needs a value")
                value = waiting.pop()
        else:
            raise LineError(f"unknown option {name}")
        options.append((_SPELLINGS.get(name, name), value))
    return Line(" ".join(words[:first]).strip(), tuple(options))


def _option(word: str) -> tuple[str, bool, str]:
    """Return (long name, whether a value is joined to it, that value)."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return name, bool(equals), value
    if word[:2] in _SHORT:
        return _SHORT[word[:2]], len(word) > 2, word[2:].removeprefix("=")
    if word.startswith("-"):
        return word, False, ""
    raise LineError(f"{word!r} comes unexpected behind options")


def checked_hash(value: str) -> str:
    """Return a hash in lower case; raises ``LineError`` unless it is a strong one in full."""
    match = _HASH.fullmatch(value)
    if match is None or len(match[2]) != _DIGITS[match[1].lower()]:
        raise LineError(f"{value!r} is not a hash such as sha256:<64 hexadecimal digits>")
    return value.lower()


def requirement(text: str, base: Path) -> str:
    """Return a requirement as a PEP 508 line with an absolute URL where it has one.

    Paths are of ``base``. Besides PEP 508 these are taken: URLs and paths of archives, paths of
    directories with a ``pyproject.toml``, and ``git+https://...#egg=NAME``. Raises ``LineError``.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    body, marker = _split_marker(text)
    try:
        if _SCHEME.match(body) and not _NAMED.match(body):
            text = _of_url(body, base) + marker
        elif _is_path(body):
            text = _of_path(body, base) + marker
        parsed = Requirement(text)
        if parsed.url:
            parsed.url = _absolute(parsed.url, base)
    except LineError:
        raise
    except (InvalidRequirement, ValueError) as error:
        # A ValueError is what urllib has for an address in brackets that is none.
        raise LineError(f"{text!r} is not a requirement: {_first_line(error)}") from error
    return str(parsed)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _split_marker(text: str) -> tuple[str, str]:
    match = re.search(r"\s;|;\s", text)
    return (text[: match.start()], " ;" + text[match.end() :]) if match else (text, "")


def _is_path(text: str) -> bool:
    if _NAMED.match(text):
        return False
    bare = text.partition("[")[0].rstrip()
    return bare.startswith((".", "/", "~")) or "/" in bare or bare.lower().endswith(_ARCHIVES)


def _of_url(text: str, base: Path) -> str:
    body, extras = _split_extras(text)
    url, _, fragment = body.partition("#")
    fields = dict(parse_qsl(fragment))
    egg = re.match(r"[A-Za-z0-9._-]+", fields.pop("egg", ""))
    if url.startswith("file:") and not egg:
        return _of_path(str(_file_path(url, base)) + extras, base)
    keep = "&".join(f"{key}={value}" for key, value in fields.items())
    where = f"{url}#{keep}" if keep else url
    name = egg[0] if egg else _name_of_archive(urlsplit(url).path)
    if not name:
        raise LineError(f"{url} does not say what it is", "write it as NAME @ URL")
    return f"{name}{extras} @ {where}"


def _split_extras(text: str) -> tuple[str, str]:
    match = _PATH.fullmatch(text.strip())
    return (match["path"], match["extras"] or "") if match else (text, "")


def _of_path(text: str, base: Path) -> str:
    name, extras = _split_extras(text)
    path = located(base, os.path.expanduser(name))
    if not path.exists():
        raise LineError(f"there is no {path}")
    called = _name_of_directory(path) if path.is_dir() else _name_of_archive(path.name)
    if not called:
        raise LineError(f"{path} is neither a wheel nor a source distribution")
    return f"{called}{extras} @ {file_url(path)}"


def _file_path(url: str, base: Path) -> Path:
    # file:x and file:./x are not what RFC 8089 has, but what pip and uv take.
    return located(base, unquote(urlsplit(url).path))


def _absolute(url: str, base: Path) -> str:
    scheme = _SCHEME.match(url)
    if scheme and scheme[1] != "file":
        return url
    body, mark, fragment = url.partition("#")
    path = _file_path(body, base) if scheme else located(base, body)
    if not path.exists():
        raise LineError(f"there is no {path}")
    return file_url(path) + mark + fragment


def _name_of_archive(path: str) -> str:
    from packaging.utils import (
        InvalidSdistFilename,
        InvalidWheelFilename,
        parse_sdist_filename,
        parse_wheel_filename,
    )

    name = unquote(path.rpartition("/")[2])
    try:
        if name.endswith(".whl"):
            return parse_wheel_filename(name)[0]
        return parse_sdist_filename(name)[0]
    except (InvalidSdistFilename, InvalidWheelFilename):
        return ""


def _name_of_directory(path: Path) -> str:
    project = path / "pyproject.toml"
    name = None
    if project.is_file():
        content = parse_toml(project, read_text(project)).get("project")
        name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        hint = "write it as NAME @ PATH, or name a wheel of it"
        raise LineError(f"{path} does not say what it is called", hint)
    return name
