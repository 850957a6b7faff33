"""Reads conda's environment files (CEP 24) into a request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from envstore.resolver.request import CondaRequest, Request
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.files import (
    at,
    file_url,
    located,
    parse_yaml,
    read_text,
    refuse_secrets,
    string,
    strings,
    table,
    wrong,
)
from envstore.resolver.specs.requirement_lines import logical_lines
from envstore.resolver.specs.requirements import Reader
from envstore.resolver.specs.selectors import evaluate, select

_KEYS = frozenset({"name", "channels", "dependencies", "variables", "platforms"})
_IGNORED = frozenset({"prefix", "category"})
_SELECTOR = re.compile(r"sel\((.*)\)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_NESTED = 8


def read_environment_yml(path: Path, context: Context) -> Request:
    """Read an environment file for the context's platform; raises ``UsageError``."""
    unknown = list[tuple[int, str]]()
    text = select(read_text(path, context), context.platform, unknown)
    for line, what in unknown:
        context.warn(f"{at(path, line)}: {what}")
    content = table(parse_yaml(path, text), path, "the file")
    for key in sorted(set(content) - _KEYS - _IGNORED):
        context.warn(f"{path}: {key!r} has no meaning in an environment file")
    if "dependencies" not in content:
        raise wrong(path, "has no dependencies", hint="an environment file lists them")
    specs, pip = list[str](), Reader(context)
    _dependencies(content["dependencies"], path, context, specs, pip)
    channels = channel_names(strings(content.get("channels"), path, "channels"), path)
    return Request(
        name=string(content.get("name"), path, "name"),
        conda=CondaRequest(
            specs=tuple(dict.fromkeys(specs)), channels=channels or context.default_channels
        ),
        pypi=pip.result(),
        variables=variables(content.get("variables"), path),
        platforms=tuple(strings(content.get("platforms"), path, "platforms")),
    )


def channel_names(channels: list[str], path: Path) -> tuple[str, ...]:
    """Return channels without repetitions, paths as URLs; raises ``UsageError``."""
    found = []
    for channel in channels:
        channel = refuse_secrets(channel.strip(), str(path))
        if not channel:
            raise wrong(path, "a channel has no name")
        if channel.startswith((".", "/", "~")):
            channel = file_url(located(path.parent, str(Path(channel).expanduser())))
        if channel != "nodefaults":
            found.append(channel)
    return tuple(dict.fromkeys(found))


def variables(value: Any, path: Path) -> dict[str, str]:
    """Return environment variables by name, as strings; raises ``UsageError``."""
    found = {}
    for name, content in table(value, path, "variables").items():
        if not _VARIABLE.fullmatch(name):
            raise wrong(path, f"{name!r} is no name for a variable")
        if not isinstance(content, str | int | float):
            raise wrong(path, f"the variable {name} is neither a string nor a number")
        if "\0" in str(content):
            raise wrong(path, f"the variable {name} holds a NUL")
        found[name] = refuse_secrets(str(content), f"{path}, variable {name}")
    return found


def checked_spec(text: str, path: Path) -> str:
    """Return a conda MatchSpec in rattler's spelling; raises ``UsageError``."""
    from rattler import MatchSpec
    from rattler.exceptions import InvalidMatchSpecError, InvalidPackageNameError

    refuse_secrets(text, str(path))
    try:
        return str(MatchSpec(text, strict=False))
    except (InvalidMatchSpecError, InvalidPackageNameError) as error:
        reason = " ".join(str(error).split())
        what = f"{text!r} is not a conda package specification: {reason}"
        raise wrong(path, what) from error


def _dependencies(
    value: Any, path: Path, context: Context, specs: list[str], pip: Reader, depth: int = 0
) -> None:
    if depth > _MOST_NESTED:
        raise wrong(path, "selectors are nested too deeply")
    if value is None:
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            if item.strip():
                specs.append(checked_spec(item.strip(), path))
            continue
        if not isinstance(item, dict) or len(item) != 1:
            raise wrong(path, f"a dependency is neither a string nor one section: {str(item)[:80]}")
        key, below = next(iter(item.items()))
        holds = _holds(key, path, context.platform)
        if holds is not None:
            if holds:
                _dependencies(below, path, context, specs, pip, depth + 1)
        elif key == "pip":
            _pip(below, path, context, pip)
        else:
            raise wrong(path, f"unknown section {str(key)!r}", hint="known: pip, sel(PLATFORM)")


def _pip(value: Any, path: Path, context: Context, pip: Reader) -> None:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and len(item) == 1:
            key, below = next(iter(item.items()))
            holds = _holds(key, path, context.platform)
            if holds:
                _pip(below, path, context, pip)
            if holds is not None:
                continue
        if item is not None and not isinstance(item, str):
            raise wrong(path, f"a line below pip is not a string: {str(item)[:80]}")
        for _, line in logical_lines(item or ""):
            pip.line(line, path)


def _holds(key: object, path: Path, platform: str) -> bool | None:
    """Return whether ``sel(...)`` holds, ``None`` for a key that is something else."""
    selector = _SELECTOR.fullmatch(key) if isinstance(key, str) else None
    if selector is None:
        return None
    try:
        return evaluate(selector[1], platform)
    except ValueError as error:
        raise wrong(path, f"{key!r} is no selector: {error}") from error
