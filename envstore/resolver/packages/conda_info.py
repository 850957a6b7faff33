"""What a conda package says of itself: the files below ``info/``, which may say anything.

Functions take these files by name and raise ``ValueError`` for what is not valid.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from envstore.resolver.packages.extract import Tree
from envstore.store import canonical
from envstore.store.source import Kind

INDEX, PATHS, LINK = b"info/index.json", b"info/paths.json", b"info/link.json"
FILES, HAS_PREFIX = b"info/files", b"info/has_prefix"

_OLD_PLACEHOLDER = "/opt/anaconda1anaconda2anaconda3"

KINDS = {"hardlink": Kind.FILE, "softlink": Kind.SYMLINK, "directory": Kind.DIRECTORY}
"""What a ``path_type`` is."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A path that the package lists: ``kind`` is its ``path_type``; empty is what is not said."""

    kind: str
    sha256: str = ""
    size: int = -1
    placeholder: str = ""
    mode: str = ""


def read_json(info: dict[bytes, bytes], path: bytes) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``."""
    name = path.decode()
    if path not in info:
        raise ValueError(f"it has no {name}")
    try:
        value = json.loads(info[path])
        canonical.check_text(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def listed_paths(info: dict[bytes, bytes], tree: Tree) -> dict[bytes, Listed]:
    """Return what is to be installed, by path."""
    if PATHS not in info:
        return _listed_before_paths_json(info, tree)
    entries = read_json(info, PATHS).get("paths")
    if not isinstance(entries, list):
        raise ValueError("info/paths.json has no paths")
    listed: dict[bytes, Listed] = {}
    for entry in entries:
        path, one = _entry(entry, tree)
        if path in listed:
            raise ValueError(f"info/paths.json lists {os.fsdecode(path)} twice")
        listed[path] = one
    return listed


def _entry(entry: Any, tree: Tree) -> tuple[bytes, Listed]:
    """Return the path and the meaning of one entry of paths.json."""
    if not isinstance(entry, dict):
        raise ValueError("info/paths.json has an entry that is not an object")
    names = ("_path", "path_type", "sha256", "prefix_placeholder", "file_mode")
    texts = [entry.get(name) or "" for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("info/paths.json has an entry that is not valid")
    name, kind, sha256, placeholder, mode = texts
    size = entry.get("size_in_bytes")
    size = -1 if size is None else size
    if kind not in KINDS or mode not in ("", "text", "binary") or not isinstance(size, int):
        raise ValueError(f"info/paths.json says nothing valid of {name}")
    return tree.path(name.encode()), Listed(kind, sha256, size, placeholder, mode)


def _listed_before_paths_json(info: dict[bytes, bytes], tree: Tree) -> dict[bytes, Listed]:
    """Return what old packages say in ``files`` and ``has_prefix``."""
    if FILES not in info:
        raise ValueError("it has neither info/paths.json nor info/files")
    prefixes = dict(_prefix_lines(info.get(HAS_PREFIX, b"").decode("utf-8", "replace")))
    listed = {}
    for line in info[FILES].decode("utf-8", "replace").replace("\r\n", "\n").split("\n"):
        if not line.strip():
            continue
        path = tree.path(line.encode())
        there = tree.found.get(path)
        kind = "softlink" if there and there.kind is Kind.SYMLINK else "hardlink"
        placeholder, mode = prefixes.get(line, ("", ""))
        listed[path] = Listed(kind, placeholder=placeholder, mode=mode)
    return listed


def _prefix_lines(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield path, placeholder and mode of each line of ``has_prefix``."""
    for line in text.split("\n"):
        try:
            fields = [field.strip("\"'") for field in shlex.split(line, posix=False)]
        except ValueError:
            raise ValueError(f"info/has_prefix has a line that is not valid: {line}") from None
        if len(fields) == 3 and fields[1] in ("text", "binary"):
            yield fields[2], (fields[0], fields[1])
        elif len(fields) == 1:
            yield fields[0], (_OLD_PLACEHOLDER, "text")
        elif fields:
            raise ValueError(f"info/has_prefix has a line that is not valid: {line}")


def entry_point_lines(info: dict[bytes, bytes]) -> list[str]:
    """Return the lines of ``link.json`` that say entry points."""
    if LINK not in info:
        return []
    noarch = read_json(info, LINK).get("noarch")
    lines = noarch.get("entry_points", []) if isinstance(noarch, dict) else []
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("info/link.json has entry points that are not valid")
    return lines
