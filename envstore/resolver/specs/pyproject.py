"""Reads ``pyproject.toml``: dependencies (PEP 621), extras and dependency groups (PEP 735)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from envstore.resolver.lock import Lock
from envstore.resolver.request import PypiRequest, Request
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import (
    file_url,
    located,
    parse_toml,
    read_text,
    refuse_secrets,
    string,
    strings,
    table,
    wrong,
)
from envstore.resolver.specs.requirement_lines import LineError, requirement
from envstore.resolver.specs.requirements import check_versions
from envstore.resolver.specs.times import exclude_newer

_MOST_NESTED = 32
_STRATEGIES = ("first-index", "unsafe-first-match", "unsafe-best-match")


def read_pyproject(path: Path, context: Context) -> Request | Lock:
    """Read a project: as pixi's if it is one, by ``uv.lock`` if that is beside it, or by itself.

    The project itself is not part of the environment. Raises ``UsageError``.
    """
    text = read_text(path, context)
    content = parse_toml(path, text)
    if "pixi" in table(content.get("tool"), path, "tool"):
        from envstore.resolver.specs.pixi import request_of

        return request_of(content, path, context)
    lock = path.parent / "uv.lock"
    if lock.is_file():
        from envstore.resolver.specs.uv_lock import read_locked_project

        return read_locked_project(content, path, lock, context)
    return request_of_project(content, path, context)


def request_of_project(content: dict[str, Any], path: Path, context: Context) -> Request:
    """Return what a project asks for, with the context's extras and groups."""
    project = table(content.get("project"), path, "project")
    groups = table(content.get("dependency-groups"), path, "dependency-groups")
    if not project and not groups:
        tool = table(content.get("tool"), path, "tool")
        hint = "export what poetry locked: poetry export" if "poetry" in tool else None
        raise wrong(path, "lists no dependencies: it has no [project] table", hint=hint)
    name = string(project.get("name"), path, "project.name")
    lines = main_lines(project, path)
    for extra in context.extras:
        lines += extra_lines(project, extra, path)
    for group in context.groups:
        lines += group_lines(groups, group, path)
    context.left_out(path, [name] if name else [])
    python = string(project.get("requires-python"), path, "project.requires-python")
    return Request(
        name=name,
        pypi=_settings(content, lines, path, context),
        python=check_versions(python, str(path)) if python else "",
        exclude_newer=exclude_newer(_uv(content, path).get("exclude-newer"), path, context),
    )


def main_lines(project: dict[str, Any], path: Path) -> list[str]:
    """Return a project's own dependencies; raises ``UsageError`` if only its backend knows them."""
    if "dependencies" in strings(project.get("dynamic"), path, "project.dynamic"):
        raise wrong(
            path,
            "its dependencies are dynamic, known only to its build backend",
            hint="build a wheel and name that in a requirements.txt",
        )
    return strings(project.get("dependencies"), path, "project.dependencies")


def extra_lines(
    project: dict[str, Any], extra: str, path: Path, seen: tuple[str, ...] = ()
) -> list[str]:
    """Return the dependencies of an extra, with those of the project's extras that it names."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    extras = table(project.get("optional-dependencies"), path, "project.optional-dependencies")
    known = {canonicalize_name(name): name for name in extras}
    wanted = canonicalize_name(extra)
    if wanted not in known:
        hint = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise wrong(path, f"has no extra {extra!r}", hint=hint)
    if wanted in seen:
        return []
    lines = []
    own = canonicalize_name(string(project.get("name"), path, "project.name"))
    for line in strings(extras[known[wanted]], path, f"the extra {extra}"):
        try:
            parsed = Requirement(line)
        except InvalidRequirement:
            # What is wrong with it is said where all lines are read.
            lines.append(line)
            continue
        if canonicalize_name(parsed.name) != own:
            lines.append(line)
        for other in sorted(parsed.extras if canonicalize_name(parsed.name) == own else ()):
            lines += extra_lines(project, other, path, (*seen, wanted))
    return lines


def group_lines(
    groups: dict[str, Any], group: str, path: Path, seen: tuple[str, ...] = ()
) -> list[str]:
    """Return the dependencies of a group, with those of the groups that it includes."""
    from packaging.utils import canonicalize_name

    known = {canonicalize_name(name): name for name in groups}
    wanted = canonicalize_name(group)
    if wanted not in known:
        hint = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise wrong(path, f"has no dependency group {group!r}", hint=hint)
    if wanted in seen or len(seen) > _MOST_NESTED:
        raise wrong(path, f"the dependency group {group!r} includes itself")
    content, lines = groups[known[wanted]], list[str]()
    if not isinstance(content, list):
        raise wrong(path, f"the dependency group {group!r} is not a list")
    for item in content:
        if isinstance(item, str):
            lines.append(item)
        elif isinstance(item, dict) and list(item) == ["include-group"]:
            inner = string(item["include-group"], path, "include-group")
            lines += group_lines(groups, inner, path, (*seen, wanted))
        else:
            raise wrong(path, f"the dependency group {group!r} holds what is no requirement")
    return lines


def requirement_lines(lines: list[str], path: Path) -> list[str]:
    """Return requirements as PEP 508 lines with absolute URLs; raises ``UsageError``."""
    found = []
    for line in lines:
        try:
            found.append(requirement(refuse_secrets(line, str(path)), path.parent))
        except LineError as error:
            raise wrong(path, str(error), hint=error.hint) from error
    return found


def _settings(
    content: dict[str, Any], lines: list[str], path: Path, context: Context
) -> PypiRequest:
    """Return a request for ``lines``, from where and how the project's settings for uv say."""
    uv = _uv(content, path)
    sources = table(uv.get("sources"), path, "tool.uv.sources")
    indexes, default, named = list[str](), "", set[str]()
    for item in uv.get("index") or []:
        index = table(item, path, "an index")
        url = refuse_secrets(string(index.get("url"), path, "an index's url"), str(path))
        if not url:
            raise wrong(path, "an index has no url")
        if "://" not in url:
            url = file_url(located(path.parent, url))
        named.add(string(index.get("name"), path, "an index's name"))
        if index.get("default") is True:
            default = url
        else:
            indexes.append(url)
        if index.get("explicit") is True:
            context.warn(f"{path}: the index {url} is used for all packages, not just some")
    default = default or string(uv.get("index-url"), path, "tool.uv.index-url")
    indexes += strings(uv.get("extra-index-url"), path, "tool.uv.extra-index-url")
    links = strings(uv.get("find-links"), path, "tool.uv.find-links")
    strategy = string(uv.get("index-strategy"), path, "tool.uv.index-strategy")
    if strategy and strategy not in _STRATEGIES:
        raise wrong(path, f"{strategy!r} is no index strategy", hint=", ".join(_STRATEGIES))
    sourced = [_sourced(line, sources, path) for line in requirement_lines(lines, path)]
    constraints = strings(uv.get("constraint-dependencies"), path, "constraint-dependencies")
    overrides = strings(uv.get("override-dependencies"), path, "override-dependencies")
    for url in (default, *indexes, *links):
        refuse_secrets(url, str(path))
    return PypiRequest(
        requirements=tuple(dict.fromkeys(sourced)),
        constraints=tuple(requirement_lines(constraints, path)),
        overrides=tuple(requirement_lines(overrides, path)),
        default_index=default,
        indexes=tuple(dict.fromkeys(indexes)),
        find_links=tuple(
            link if "://" in link else file_url(located(path.parent, link)) for link in links
        ),
        no_index=uv.get("no-index") is True,
        index_strategy=strategy or "first-index",
        prerelease=string(uv.get("prerelease"), path, "tool.uv.prerelease"),
        no_binary=tuple(strings(uv.get("no-binary-package"), path, "no-binary-package")),
        only_binary=tuple(strings(uv.get("no-build-package"), path, "no-build-package")),
    )


def _uv(content: dict[str, Any], path: Path) -> dict[str, Any]:
    tool = table(content.get("tool"), path, "tool")
    return table(tool.get("uv"), path, "tool.uv")


def _sourced(line: str, sources: dict[str, Any], path: Path) -> str:
    """Return a requirement with the URL that uv's sources give it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    parsed = Requirement(line)
    by_name = {canonicalize_name(name): value for name, value in sources.items()}
    source = by_name.get(canonicalize_name(parsed.name))
    if source is None:
        return line
    if not isinstance(source, dict):
        raise wrong(path, f"{parsed.name} has several sources", hint="lock it with uv lock")
    url = source_url(source, parsed.name, path)
    if url:
        parsed.url = url
        parsed.specifier = type(parsed.specifier)()
    return str(parsed)


def source_url(source: dict[str, Any], name: str, path: Path) -> str:
    """Return the URL that a table of ``git``, ``url`` or ``path`` stands for, empty for an index.

    Raises ``UsageError`` for what is to be installed editable or is another project's.
    """
    if source.get("workspace") is True or source.get("editable") is True:
        raise wrong(
            path,
            f"{name} is a project that can change, which a snapshot cannot hold",
            hint="build a wheel of it, and name that",
        )
    if "git" in source:
        url = string(source["git"], path, f"git of {name}")
        revision = next(
            (str(source[key]) for key in ("rev", "tag", "branch") if source.get(key)), ""
        )
        url = url if url.startswith("git+") else f"git+{url}"
        url += f"@{revision}" if revision else ""
        below = string(source.get("subdirectory"), path, f"subdirectory of {name}")
        return refuse_secrets(url + (f"#subdirectory={below}" if below else ""), str(path))
    if "url" in source:
        return refuse_secrets(string(source["url"], path, f"url of {name}"), str(path))
    if "path" in source:
        there = located(path.parent, string(source["path"], path, f"path of {name}"))
        if not os.path.lexists(there):
            raise wrong(path, f"{name}: there is no {there}")
        return file_url(there)
    return ""
