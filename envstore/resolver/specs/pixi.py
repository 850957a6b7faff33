"""Reads pixi's manifests, ``pixi.toml`` and ``[tool.pixi]`` of ``pyproject.toml``, into a request.

One of the manifest's environments is read, for one platform: the features it is made of, and of
each the tables that are for the platform (https://pixi.sh/latest/reference/pixi_manifest/).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envstore.resolver.request import CondaRequest, PypiRequest, Request
from envstore.resolver.specs.context import Context
from envstore.resolver.specs.environment_yml import channel_names, checked_spec, variables
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
from envstore.resolver.specs.pyproject import (
    extra_lines,
    group_lines,
    main_lines,
    requirement_lines,
    source_url,
)
from envstore.resolver.specs.requirements import check_versions
from envstore.resolver.specs.selectors import true_names
from envstore.resolver.specs.times import exclude_newer

_CONDA = ("dependencies", "host-dependencies", "build-dependencies")
_SPEC_KEYS = frozenset({"version", "build", "build-number", "file-name", "channel", "subdir"}) | {
    "md5",
    "sha256",
    "url",
    "license",
}
_SPELLED = {"build-number": "build_number", "file-name": "fn"}
_VIRTUAL = {"linux": "__linux", "cuda": "__cuda", "libc": "__glibc", "archspec": "__archspec"}
_PRIORITIES = ("strict", "disabled")


def read_pixi(path: Path, context: Context) -> Request:
    """Read a ``pixi.toml``; raises ``UsageError``."""
    content = parse_toml(path, read_text(path, context))
    if (path.parent / "pixi.lock").is_file():
        lock = path.parent / "pixi.lock"
        context.warn(f"{path} is resolved anew: name {lock} to take what that holds")
    return request_of({"tool": {"pixi": content}}, path, context)


def request_of(content: dict[str, Any], path: Path, context: Context) -> Request:
    """Return what an environment of a ``pyproject.toml`` with ``[tool.pixi]`` asks for."""
    manifest = table(content["tool"]["pixi"], path, "tool.pixi")
    workspace = table(manifest.get("workspace", manifest.get("project")), path, "workspace")
    project = table(content.get("project"), path, "project")
    features = _features(manifest, content, path, context)
    found = _Found(path, context)
    for feature in features:
        found.add(feature)
    lines = found.pypi
    python = ""
    if project:
        lines += requirement_lines(main_lines(project, path), path)
        asked = string(project.get("requires-python"), path, "requires-python")
        if asked:
            python = check_versions(asked, str(path))
            found.specs.append(checked_spec(f"python {python}", path))
    channels = found.channels + _channels(workspace.get("channels"), path)
    priority = found.priority or string(workspace.get("channel-priority"), path, "priority")
    if priority not in ("", *_PRIORITIES):
        raise wrong(path, f"{priority!r} is no channel priority", hint=", ".join(_PRIORITIES))
    options = [table(workspace.get("pypi-options"), path, "pypi-options"), *found.options]
    return Request(
        name=string(workspace.get("name", project.get("name")), path, "name"),
        conda=CondaRequest(
            specs=tuple(dict.fromkeys(found.specs)),
            channels=channel_names(channels, path) or context.default_channels,
            priority=priority or "strict",
        ),
        pypi=_pypi_request(lines, options, path, context),
        python=python,
        variables=found.variables,
        platforms=tuple(found.platforms or _platform_names(workspace.get("platforms"), path)),
        virtual=found.virtual,
        exclude_newer=exclude_newer(workspace.get("exclude-newer"), path, context),
    )


def _features(
    manifest: dict[str, Any], content: dict[str, Any], path: Path, context: Context
) -> list[dict[str, Any]]:
    """Return the tables an environment is made of, the default one last, as pixi orders them."""
    environments = table(manifest.get("environments"), path, "environments")
    name = context.environment or "default"
    if name not in environments and name != "default":
        hint = f"it has {', '.join(sorted({'default', *environments}))}"
        raise wrong(path, f"has no environment {name!r}", hint=hint)
    chosen = environments.get(name, [])
    plain = True
    if isinstance(chosen, dict):
        plain = chosen.get("no-default-feature") is not True
        chosen = chosen.get("features")
    wanted = [*strings(chosen, path, f"environment {name}"), *context.extras, *context.groups]
    known = table(manifest.get("feature"), path, "feature")
    found = []
    for feature in dict.fromkeys(wanted):
        tables = table(known.get(feature), path, f"feature {feature}")
        lines = _project_lines(content, feature, path)
        if feature not in known and lines is None:
            raise wrong(path, f"has no feature {feature!r}")
        found.append({**tables, "": lines or []})
    return [*found, manifest] if plain else found


def _project_lines(content: dict[str, Any], feature: str, path: Path) -> list[str] | None:
    """Return the lines of a project's extra or group, which pixi has as features of their name."""
    project = table(content.get("project"), path, "project")
    groups = table(content.get("dependency-groups"), path, "dependency-groups")
    extras = table(project.get("optional-dependencies"), path, "optional-dependencies")
    lines = extra_lines(project, feature, path) if feature in extras else []
    lines += group_lines(groups, feature, path) if feature in groups else []
    return lines if feature in extras or feature in groups else None


@dataclass(slots=True)
class _Found:
    """What the features of one environment ask for together."""

    path: Path
    context: Context
    specs: list[str] = field(default_factory=list)
    pypi: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    platforms: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    virtual: dict[str, str] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)
    priority: str = ""

    def add(self, feature: dict[str, Any]) -> None:
        path = self.path
        for kind in _CONDA:
            self.specs += self._conda(feature, kind)
        self.pypi += self._pypi(feature)
        self.pypi += requirement_lines(feature.get("", []), path)
        self.channels += _channels(feature.get("channels"), path)
        self.options.append(table(feature.get("pypi-options"), path, "pypi-options"))
        self.priority = self.priority or string(feature.get("channel-priority"), path, "priority")
        limits = _platform_names(feature.get("platforms"), path)
        if limits:
            kept = [item for item in self.platforms if item in limits]
            self.platforms = kept if self.platforms else limits
        for name, value in _virtual(feature.get("system-requirements"), path).items():
            self.virtual[name] = max(value, self.virtual.get(name, "0"), key=_numbers)
        for part in self._parts(feature):
            activation = table(part.get("activation"), path, "activation")
            for name, value in variables(activation.get("env"), path).items():
                self.variables.setdefault(name, value)
            if activation.get("scripts"):
                self.context.warn(f"{path}: activation scripts are not part of the environment")
        if feature.get("constraints"):
            self.context.warn(f"{path}: constraints of conda packages are not followed")

    def _parts(self, feature: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the tables of a feature that count on the platform, the most specific first."""
        targets = table(feature.get("target"), self.path, "target")
        names = true_names(self.context.platform)
        platform = self.context.platform
        for name in (platform, platform.partition("-")[0], "unix"):
            if name in targets and name in names:
                yield table(targets[name], self.path, f"target {name}")
        yield feature

    def _merged(self, feature: dict[str, Any], kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in self._parts(feature):
            for name, value in table(part.get(kind), self.path, kind).items():
                found.setdefault(name, value)
        return found

    def _conda(self, feature: dict[str, Any], kind: str) -> list[str]:
        return [
            _conda_spec(name, value, self.path)
            for name, value in self._merged(feature, kind).items()
            if not self._left_out(name, value)
        ]

    def _pypi(self, feature: dict[str, Any]) -> list[str]:
        lines = []
        for name, value in self._merged(feature, "pypi-dependencies").items():
            if self._left_out(name, value):
                continue
            lines.append(_pypi_line(name, value, self.path))
            if isinstance(value, dict) and isinstance(value.get("index"), str):
                self.options.append({"extra-index-urls": [value["index"]]})
        return requirement_lines(lines, self.path)

    def _left_out(self, name: str, value: Any) -> bool:
        if not _is_itself(value, self.path):
            return False
        self.context.left_out(self.path, [name])
        return True


def _conda_spec(name: str, value: Any, path: Path) -> str:
    if isinstance(value, str):
        value = {"version": value}
    spec = table(value, path, f"the dependency {name}")
    if "path" in spec or "git" in spec:
        raise wrong(
            path,
            f"{name} is built from source",
            hint="build a conda package of it, and name the channel it is in",
        )
    if "url" in spec:
        return checked_spec(string(spec["url"], path, f"url of {name}"), path)
    unknown = sorted(spec.keys() - _SPEC_KEYS)
    if unknown:
        raise wrong(path, f"{unknown[0]!r} of the dependency {name} is not known")
    fields = []
    for key, content in spec.items():
        text = (
            str(content) if isinstance(content, int) else string(content, path, f"{key} of {name}")
        )
        if not text or (key == "version" and text == "*"):
            continue
        if '"' in text or "]" in text:
            raise wrong(path, f"{key} of the dependency {name} is not written like that: {text}")
        fields.append(f'{_SPELLED.get(key, key)}="{text}"')
    return checked_spec(f"{name}[{','.join(fields)}]" if fields else name, path)


def _is_itself(value: Any, path: Path) -> bool:
    there = value.get("path") if isinstance(value, dict) else None
    if not isinstance(there, str):
        return False
    return os.path.realpath(path.parent / there) == os.path.realpath(path.parent)


def _pypi_line(name: str, value: Any, path: Path) -> str:
    if isinstance(value, str):
        value = {"version": value}
    spec = table(value, path, f"the dependency {name}")
    extras = ",".join(strings(spec.get("extras"), path, f"extras of {name}"))
    head = f"{name}[{extras}]" if extras else name
    marker = string(spec.get("env-markers"), path, f"env-markers of {name}")
    tail = f" ; {marker}" if marker else ""
    url = source_url(spec, name, path)
    if url:
        return f"{head} @ {url}{tail}"
    version = string(spec.get("version"), path, f"version of {name}")
    checked = (
        check_versions(version, f"{path}: version of {name} is not one") if version != "*" else ""
    )
    return f"{head}{checked}{tail}"


def _channels(value: Any, path: Path) -> list[str]:
    """Return channels, those of higher priority first."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(path, "channels is not a list")
    found = []
    for item in value:
        if isinstance(item, dict):
            name = string(item.get("channel"), path, "a channel")
            weight = item.get("priority", 0)
            if not isinstance(weight, int):
                raise wrong(path, f"the priority of the channel {name} is not a whole number")
        else:
            name, weight = string(item, path, "a channel"), 0
        found.append((name, weight))
    return [name for name, _ in sorted(found, key=lambda pair: -pair[1])]


def _platform_names(value: Any, path: Path) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(path, "platforms is not a list")
    # Newer manifests name variants of a platform by tables with their requirements.
    names = [
        item.get("platform", item.get("name")) if isinstance(item, dict) else item for item in value
    ]
    return strings(names, path, "platforms")


def _virtual(value: Any, path: Path) -> dict[str, str]:
    found = {}
    for name, content in table(value, path, "system-requirements").items():
        if name == "libc" and isinstance(content, dict):
            if content.get("family", "glibc") != "glibc":
                raise wrong(path, f"the C library {content['family']} is not supported")
            content = content.get("version")
        if name in _VIRTUAL and content is not None:
            text = str(content) if isinstance(content, int | float) else content
            found[_VIRTUAL[name]] = string(text, path, f"system-requirements.{name}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _pypi_request(
    lines: list[str], options: list[dict[str, Any]], path: Path, context: Context
) -> PypiRequest:
    indexes, links, default, strategy = list[str](), list[str](), "", ""
    only, never = list[str](), list[str]()
    overrides: dict[str, Any] = {}
    for table_ in options:
        default = default or string(table_.get("index-url"), path, "index-url")
        indexes += strings(table_.get("extra-index-urls"), path, "extra-index-urls")
        strategy = strategy or string(table_.get("index-strategy"), path, "index-strategy")
        for item in table_.get("find-links") or []:
            link = table(item, path, "find-links")
            where = string(link.get("url"), path, "a link")
            local = string(link.get("path"), path, "a link")
            links.append(where or file_url(located(path.parent, local)))
        only += _names(table_.get("no-build"), path, "no-build")
        never += _names(table_.get("no-binary"), path, "no-binary")
        overrides.update(table(table_.get("dependency-overrides"), path, "dependency-overrides"))
        if table_.get("no-build-isolation"):
            context.warn(f"{path}: packages are built in isolation all the same")
    for url in (default, *indexes, *links):
        refuse_secrets(url, str(path))
    changed = [_pypi_line(name, value, path) for name, value in overrides.items()]
    return PypiRequest(
        requirements=tuple(dict.fromkeys(lines)),
        overrides=tuple(requirement_lines(changed, path)),
        default_index=default,
        indexes=tuple(dict.fromkeys(indexes)),
        find_links=tuple(dict.fromkeys(links)),
        index_strategy=strategy or "first-index",
        only_binary=tuple(dict.fromkeys(only)),
        no_binary=tuple(dict.fromkeys(never)),
    )


def _names(value: Any, path: Path, what: str) -> list[str]:
    if isinstance(value, bool):
        return [":all:"] if value else []
    return strings(value, path, what)
