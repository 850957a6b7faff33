"""Says whether a ``uv.lock`` is of its project as that is now, without resolving it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from envstore.resolver.specs.files import string, strings, table, wrong
from envstore.resolver.specs.pyproject import extra_lines, group_lines, main_lines

_DIRECT = frozenset({"git", "url", "path", "directory", "editable", "virtual"})
_Key = tuple[str, tuple[str, ...], str, str]


def check_current(content: dict[str, Any], path: Path, lock: dict[str, Any], where: Path) -> None:
    """Refuse a lock whose project asked for something else when it was locked.

    Compared are names, extras and versions, not markers, which uv writes in its own way.
    """
    from packaging.utils import canonicalize_name

    project = table(content.get("project"), path, "project")
    name = string(project.get("name"), path, "project.name")
    packages = lock.get("package") or []
    own = next(
        (
            item
            for item in packages
            if isinstance(item, dict)
            and canonicalize_name(str(item.get("name"))) == canonicalize_name(name)
            and isinstance(item.get("source"), dict)
            and "." in item["source"].values()
        ),
        None,
    )
    if own is None:
        if name:
            raise wrong(where, f"locks no project {name}", hint="run: uv lock")
        return
    if "dependencies" in (project.get("dynamic") or []):
        return
    metadata = table(own.get("metadata"), where, "metadata")
    then = table(metadata.get("requires-dev"), where, "requires-dev")
    now = _groups(content, path)
    pairs = [(now.get(group, []), then.get(group) or []) for group in sorted({*now, *then})]
    locked = _flattened(metadata.get("requires-dist") or [], name, where)
    for asked, was in [(_asked(project, path), locked), *pairs]:
        changed = _changed(asked, was, path)
        if changed:
            raise wrong(
                where,
                f"is out of date: {path.name} asks for {changed} otherwise",
                hint="run: uv lock",
            )


def _asked(project: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    """Return a project's requirements, each with the extra it is in."""
    from packaging.utils import canonicalize_name

    found = [(line, "") for line in main_lines(project, path)]
    for extra in table(project.get("optional-dependencies"), path, "optional-dependencies"):
        lines = extra_lines(project, extra, path)
        found += [(line, canonicalize_name(extra)) for line in lines]
    return found


def _groups(content: dict[str, Any], path: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the requirements of a project's dependency groups by their normalised names."""
    from packaging.utils import canonicalize_name

    groups = table(content.get("dependency-groups"), path, "dependency-groups")
    found: dict[str, list[tuple[str, str]]] = {}
    for group in groups:
        lines = group_lines(groups, group, path)
        found[str(canonicalize_name(group))] = [(line, "") for line in lines]
    tool = table(content.get("tool"), path, "tool")
    # uv's own table of before there were groups.
    old = table(tool.get("uv"), path, "tool.uv").get("dev-dependencies")
    lines = strings(old, path, "tool.uv.dev-dependencies")
    found["dev"] = [*found.get("dev", []), *((line, "") for line in lines)]
    return found


def _flattened(locked: list[Any], own: str, path: Path) -> list[Any]:
    """Return metadata in which extras no longer name each other, as not every uv writes it."""
    from packaging.utils import canonicalize_name

    plain, names = list[dict[str, Any]](), list[tuple[str, str]]()
    for item in locked:
        entry = table(item, path, "requires-dist")
        if canonicalize_name(str(entry.get("name"))) != canonicalize_name(own):
            plain.append(entry)
            continue
        names += [(_extra(entry), str(other)) for other in entry.get("extras") or ()]
    for _ in names:
        for extra, other in names:
            for entry in [entry for entry in plain if _extra(entry) == other]:
                copy = {**entry, "marker": f"extra == '{extra}'"}
                plain += [copy] if copy not in plain else []
    return plain


def _extra(entry: dict[str, Any]) -> str:
    found = re.search(r"extra == '([^']*)'", str(entry.get("marker", "")))
    return found[1] if found else ""


def _changed(asked: list[tuple[str, str]], locked: list[Any], path: Path) -> str:
    """Return a name that differs between a project's lines and the lock's metadata, or nothing."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    free, then = set[str](), set[_Key]()
    for item in locked:
        entry = table(item, path, "requires-dist")
        name = canonicalize_name(str(entry.get("name")))
        if _DIRECT & entry.keys():
            free.add(name)
        extras = tuple(sorted(map(str, entry.get("extras") or ())))
        key = (name, extras, _versions(str(entry.get("specifier", ""))), _extra(entry))
        then.add(key)
    now = set[_Key]()
    for line, extra_name in asked:
        try:
            parsed = Requirement(line)
        except InvalidRequirement as error:
            raise wrong(path, f"{line!r} is not a requirement: {error}") from error
        extras = tuple(sorted(canonicalize_name(item) for item in parsed.extras))
        name = canonicalize_name(parsed.name)
        now.add((name, extras, _versions(str(parsed.specifier)), extra_name))
    if free:
        now = {(k[0], k[1], "" if k[0] in free else k[2], k[3]) for k in now}
        then = {(k[0], k[1], "" if k[0] in free else k[2], k[3]) for k in then}
    return min((key[0] for key in now ^ then), default="")


def _versions(text: str) -> str:
    """Return a specifier set in the one spelling that equal ones share, 2025.04 as 2025.4."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.utils import canonicalize_version

    try:
        parts = SpecifierSet(text)
    except InvalidSpecifier:
        return text
    plain = (canonicalize_version(part.version, strip_trailing_zero=False) for part in parts)
    return ",".join(
        sorted(f"{part.operator}{version}" for part, version in zip(parts, plain, strict=True))
    )
