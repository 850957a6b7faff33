"""Reads ``uv.lock`` by having uv export it as ``pylock.toml``, without network or interpreter.

uv wants a project beside a lock, and reads nothing of it but names when told not to lock again.
So that a lock can be read by itself, and workspaces without their members' files, it is given one
made from what the lock says of its projects.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from envstore.errors import EnvstoreError
from envstore.resolver.lock import Lock
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import parse_toml, read_text, string, table, wrong
from envstore.resolver.specs.pylock import lock_of
from envstore.resolver.specs.uv_current import check_current

_DIRECTORY = re.compile(r"(?!\.\.?(?:/|$))[^/\0\\]+(?:/(?!\.\.?(?:/|$))[^/\0\\]+)*")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


def read_uv_lock(path: Path, context: Context) -> Lock:
    """Read a ``uv.lock``; the context's extras and groups are those of its projects.

    Without groups there are none, not even uv's usual ``dev``. Raises ``UsageError``.
    """
    text = read_text(path, context)
    return _lock(text, parse_toml(path, text), path, context)


def read_locked_project(project: dict[str, Any], path: Path, lock: Path, context: Context) -> Lock:
    """Read the lock beside a project; raises ``UsageError`` if it was made for another one."""
    text = read_text(lock, context)
    content = parse_toml(lock, text)
    check_current(project, path, content, lock)
    return _lock(text, content, lock, context)


def _lock(text: str, content: dict[str, Any], path: Path, context: Context) -> Lock:
    members = _members(content, path)
    root = next((place for place in members if place == "."), None)
    arguments = ["export", "--frozen", "--offline", "--format", "pylock.toml", "--no-header"]
    arguments += ["--no-emit-workspace", "--no-default-groups", "--no-config"]
    arguments += [] if root is not None and "project" in members[root] else ["--all-packages"]
    arguments += [word for name in context.extras for word in ("--extra", name)]
    arguments += [word for name in context.groups for word in ("--group", name)]
    exported = parse_toml(path, _export(text, members, arguments, path))
    names = [member["project"]["name"] for member in members.values() if "project" in member]
    context.left_out(path, names)
    # The export holds only what the extras and groups ask for, without saying which that were.
    return lock_of(exported, path, replace(context, extras=(), groups=()))


def _export(text: str, members: dict[str, dict[str, Any]], arguments: list[str], path: Path) -> str:
    from envstore.resolver.uvtool import run_uv

    with tempfile.TemporaryDirectory(prefix="envstore-uv-") as name:
        directory = Path(name)
        for place, content in members.items():
            (directory / place).mkdir(parents=True, exist_ok=True)
            (directory / place / "pyproject.toml").write_text(_toml(content), encoding="utf-8")
        (directory / "uv.lock").write_text(text, encoding="utf-8")
        quiet = {"UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never"}
        try:
            run_uv([*arguments, "-o", "pylock.toml"], directory, directory, environment=quiet)
        except EnvstoreError as error:
            message = error.message.replace(f"{directory}/", "").replace(str(directory), "")
            raise wrong(path, f"uv cannot export it: {message}") from error
        return read_text(directory / "pylock.toml")


def _members(content: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return for every project of the lock, by directory, a ``pyproject.toml`` that names it."""
    python = string(content.get("requires-python"), path, "requires-python")
    named = table(content.get("manifest"), path, "manifest").get("members")
    packages = content.get("package") or []
    if not isinstance(packages, list):
        raise wrong(path, "not a uv.lock: package is not a list")
    members: dict[str, dict[str, Any]] = {}
    for item in packages:
        package = table(item, path, "a package")
        source = table(package.get("source"), path, "a source")
        place = source.get("editable") or source.get("virtual") or source.get("directory")
        if not isinstance(place, str):
            continue
        name = string(package.get("name"), path, "a package's name")
        if place != "." and (not isinstance(named, list) or name not in named):
            continue
        if not _NAME.fullmatch(name) or (place != "." and not _DIRECTORY.fullmatch(place)):
            raise wrong(path, f"not a uv.lock: {name!r} lies at {place!r}")
        members[place] = _project(package, name, python, path)
    below = [place for place in members if place != "."]
    if not members:
        raise wrong(path, "locks no project", hint="is it a uv.lock?")
    if below or "." not in members:
        root = members.setdefault(".", {})
        root["tool"] = {"uv": {"workspace": {"members": below}}}
    return members


def _project(package: dict[str, Any], name: str, python: str, path: Path) -> dict[str, Any]:
    metadata = table(package.get("metadata"), path, "metadata")
    extras = table(package.get("optional-dependencies"), path, "optional-dependencies")
    groups = table(package.get("dev-dependencies"), path, "dev-dependencies")
    provided = metadata.get("provides-extras") or []
    wanted = table(metadata.get("requires-dev"), path, "requires-dev")
    project: dict[str, Any] = {"name": name, "version": "0"}
    if python:
        project["requires-python"] = python
    names = sorted({*extras, *map(str, provided)})
    project["optional-dependencies"] = {extra: list[str]() for extra in names}
    found = {group: list[str]() for group in sorted({*groups, *wanted})}
    return {"project": project, "dependency-groups": found}


def _toml(content: dict[str, Any], prefix: str = "") -> str:
    """Write tables of strings and lists of strings as TOML."""
    lines, below = list[str](), list[str]()
    for key, value in content.items():
        name = json.dumps(key, ensure_ascii=False)
        if isinstance(value, dict):
            below.append(f"\n[{prefix}{name}]\n{_toml(value, f'{prefix}{name}.')}")
        else:
            # JSON's strings and lists are TOML's, but for the one control character it leaves.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}\n")
    return "".join(lines + below)
