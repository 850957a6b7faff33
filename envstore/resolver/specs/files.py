"""Reads specification files, which anybody may have written: bounded, one line on error."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import quote

from envstore.errors import NotFoundError, UsageError
from envstore.resolver.request import SourceFile
from envstore.resolver.secrets import secret_in
from envstore.resolver.specs.context import Context
from envstore.store.source import access_error

MOST_BYTES = 64 << 20
_MOST_YAML_BYTES = 4 << 20
_MOST_ALIASES = 1000
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BROKEN_INLINE = ("Invalid initial character for a key part", "Unclosed inline table")
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def at(path: Path | str, line: int = 0, column: int = 0) -> str:
    """Return a place in a file as compilers write it; lines and columns count from 1."""
    return ":".join([str(path), *(str(number) for number in (line, column) if number)])


def wrong(
    path: Path | str, text: str, *, line: int = 0, column: int = 0, hint: str | None = None
) -> UsageError:
    """Return the error for something wrong at a place in a file."""
    return UsageError(f"{at(path, line, column)}: {text}", hint=hint)


def read_bytes(path: Path, context: Context | None = None) -> bytes:
    """Return a file's content, which is added to the context's sources.

    Raises ``NotFoundError``, ``AccessDeniedError``, or ``UsageError`` if it is not a regular file
    or holds more than ``MOST_BYTES``.
    """
    try:
        # A FIFO would keep an ordinary open() waiting for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise wrong(path, "is not a regular file")
            data = file.read(MOST_BYTES + 1)
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not a path") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFoundError(f"there is no {path}") from error
        if error.errno == errno.EISDIR:
            raise wrong(path, "is a directory, not a file") from error
        raise access_error(error, os.fsencode(path)) from error
    if len(data) > MOST_BYTES:
        raise wrong(path, f"holds more than {MOST_BYTES >> 20} MiB, too much for a specification")
    if context is not None:
        source = SourceFile(str(path), hashlib.sha256(data).hexdigest())
        if source not in context.sources:
            context.sources.append(source)
    return data


def text_of(path: Path, data: bytes) -> str:
    """Decode a file: UTF-8, or what its byte order mark says. Raises ``UsageError``."""
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise wrong(path, f"is not {encoding} text", line=line) from error
    if "\0" in text:
        raise wrong(path, "is not text", line=text.count("\n", 0, text.index("\0")) + 1)
    return text


def read_text(path: Path, context: Context | None = None) -> str:
    """Return a file's text; raises what ``read_bytes`` and ``text_of`` raise."""
    return text_of(path, read_bytes(path, context))


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Parse TOML; raises ``UsageError`` with the place."""
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = _TOML_PLACE.search(message)
        line, column = (int(place[1]), int(place[2])) if place and place[1] else (0, 0)
        if place and not line:
            line = text.count("\n") + 1
        what = _TOML_PLACE.sub("", message)
        # TOML 1.1, which few read yet, has them over several.
        hint = "inline tables are of one line" if what.startswith(_BROKEN_INLINE) else None
        raise wrong(path, f"not TOML: {what}", line=line, column=column, hint=hint) from error
    except RecursionError as error:
        raise wrong(path, "not TOML anybody would write: nested too deeply") from error


def parse_json(path: Path, text: str) -> Any:
    """Parse JSON; raises ``UsageError`` with the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg}"
        raise wrong(path, what, line=error.lineno, column=error.colno) from error
    except RecursionError as error:
        raise wrong(path, "not JSON anybody would write: nested too deeply") from error


def parse_yaml(path: Path, text: str) -> Any:
    """Parse one YAML document of plain values; raises ``UsageError`` with the place.

    Refused are tags that make objects, keys given twice, and more aliases than a person writes.
    """
    import yaml

    if len(text) > _MOST_YAML_BYTES:
        raise wrong(path, f"holds more than {_MOST_YAML_BYTES >> 20} MiB of YAML")
    try:
        loader = _yaml_loader()(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise wrong(path, f"not YAML: {what}", line=line, column=column) from error
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        what = getattr(error, "reason", None) or "it cannot be read"
        raise wrong(path, f"not YAML: {what}", line=line) from error
    except ValueError as error:
        # A date or number that looks like one and is none, 2024-99-99.
        raise wrong(path, f"not YAML: {error}") from error
    except RecursionError as error:
        raise wrong(path, "not YAML anybody would write: nested too deeply") from error


def _yaml_loader() -> type[Any]:
    """Return the loader class; made here because PyYAML is only imported where it is used."""
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                self.aliases += 1
                if self.aliases > _MOST_ALIASES:
                    event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                    raise yaml.MarkedYAMLError(
                        problem="too many aliases", problem_mark=event.start_mark
                    )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen and isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                    )
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def refuse_secrets(text: str, where: str) -> str:
    """Return ``text`` unless a URL in it holds credentials; raises ``UsageError``."""
    secret = secret_in(text)
    if secret:
        raise UsageError(
            f"{where}: a URL holds {secret}, which would end up in the lock",
            hint="give it in ~/.netrc, UV_INDEX_<NAME>_USERNAME and _PASSWORD, or the file that"
            " RATTLER_AUTH_FILE names",
        )
    return text


def file_url(path: Path) -> str:
    """Return the ``file`` URL of a path, made absolute against the working directory."""
    return "file://" + quote(os.path.abspath(path))


def located(base: Path, name: str) -> Path:
    """Return the path a specification in ``base`` means by ``name``, absolute.

    Relative to the specification, so that it means the same from everywhere; relative to the
    working directory if there is nothing, as pip has it.
    """
    path = Path(os.path.abspath(base / name))
    if not os.path.lexists(path) and os.path.lexists(name):
        return Path(os.path.abspath(name))
    return path


def table(value: Any, path: Path, what: str) -> dict[str, Any]:
    """Return ``value`` if it is a mapping with string keys; raises ``UsageError``."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise wrong(path, f"{what} is not a table")
    return value


def strings(value: Any, path: Path, what: str) -> list[str]:
    """Return ``value`` if it is a list of strings; raises ``UsageError``."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(path, f"{what} is not a list of strings")
    return value


def string(value: Any, path: Path, what: str) -> str:
    """Return ``value`` if it is a string, an empty one for ``None``; raises ``UsageError``."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong(path, f"{what} is not a string")
    return value
