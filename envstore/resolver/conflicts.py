"""What solvers say when there is no solution, shortened to what conflicts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from envstore.errors import EnvstoreError

_LONGEST = 600
_REASONS = 3
_INDENT = re.compile(r"^[\s│├└─]*")
_STATEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^No candidates were found for (.*?)\.?$"), r"no channel has \1"),
    (re.compile(r"^(.*), for which no candidates were found\.?$"), r"\1, which nothing provides"),
    (
        re.compile(r"^(.*?),? which conflicts with the versions reported above\.?$"),
        r"\1, which conflicts",
    ),
    (re.compile(r"^(.*?),? (?:which )?can(?:not)? be installed .*:$"), r"\1"),
    (re.compile(r"^(.*) would (?:require|constrain)$"), r"\1"),
    (
        re.compile(r"^(.*) is excluded because due to strict channel priority .* from: '(.*?)'$"),
        r"\1, which is in \2 behind a channel with other versions",
    ),
    (re.compile(r"^(.*) is excluded because (candidate not .*)$"), r"\1, \2"),
    (
        re.compile(r"^(.*) is excluded because the package is uploaded after (.*)$"),
        r"\1 is newer than \2",
    ),
    (re.compile(r"^the constraint (.*) cannot be fulfilled$"), r"the constraint \1"),
)
_UV_PHRASES = (
    ", we can conclude that your requirements are unsatisfiable",
    " we can conclude that your requirements are unsatisfiable",
)
_UV_TARGET = re.compile(r"\{[^{}]*(?:python_full_version|sys_platform|platform_)[^{}]*\}")
_PREAMBLE = "Cannot solve the request because of:"
_HEADING = "The following packages are incompatible"
_ANY = re.compile(r" \*(?=,|$| is| cannot)")


class UnsatisfiableError(EnvstoreError):
    """What is asked for cannot be had together; nothing was written."""


@dataclass(slots=True)
class _Node:
    text: str
    children: list[_Node] = field(default_factory=list)


def conda_conflict(report: str) -> UnsatisfiableError:
    """Return the error for a conda solver's ``report``, a tree of reasons in box characters."""
    chains = _unique(chain for root in _tree(report) for chain in _chains(root))
    shown = "; ".join(" -> ".join(chain) for chain in chains[:_REASONS])
    if len(chains) > _REASONS:
        shown += f"; and {len(chains) - _REASONS} more"
    hint = _hint(report)
    if not shown:
        shown = " ".join(report.split())
    return UnsatisfiableError(f"no set of conda packages fits: {clip(shown)}", hint=hint)


def uv_conflict(report: str) -> UnsatisfiableError:
    """Return the error for what uv says when there is no solution, a chain of sentences."""
    text, _, advice = report.rpartition("cause:")[2].partition("hint:")
    text = " ".join(text.split()).strip().rstrip(".")
    for phrase in _UV_PHRASES:
        text = text.replace(phrase, "")
    text = _UV_TARGET.sub("", text.replace(". And because ", "; "))
    text = text.replace(", we can conclude that ", ": ").removeprefix("Because ").strip(" ,;.")
    parts = text.split("; ")
    if len(parts) > _REASONS:
        text = "; ".join([*parts[:1], "...", *parts[-_REASONS + 1 :]])
    hint = clip(advice.partition("hint:")[0].strip().rstrip(".")) or "loosen or remove one of these"
    if "+conda" in text:
        hint = "+conda is what conda installs: ask conda for another version"
    return UnsatisfiableError(f"no set of Python packages fits: {clip(text)}", hint=hint)


def _hint(report: str) -> str:
    missing = re.search(r"(__[a-z0-9_]+)(?: [^,]*)?,? (?:for which no|which cannot)", report)
    if missing:
        name = missing[1]
        option = {"__cuda": "--cuda", "__glibc": "--glibc"}.get(name)
        if option:
            return f"{option} VERSION says what the target has"
        return f"the target has no such {name}"
    if "uploaded after the cutoff" in report:
        return "--exclude-newer leaves it out"
    if "strict channel priority" in report:
        return "name that channel first, or ask for a channel priority of disabled"
    if "No candidates were found for" in report:
        return "check its name and version, and the channels"
    return "loosen or remove one of these"


def _tree(report: str) -> list[_Node]:
    """Return the roots of the tree that ``report`` draws."""
    roots: list[_Node] = []
    open_nodes: list[tuple[int, _Node]] = []
    for line in report.replace(_PREAMBLE, "").splitlines():
        text = _INDENT.sub("", line).strip()
        if not text or text == _HEADING:
            open_nodes.clear()
            continue
        mark = _INDENT.match(line)
        depth = len(mark[0].rstrip(" ─")) if mark and set(mark[0]) & set("├└") else 0
        while open_nodes and open_nodes[-1][0] >= depth:
            open_nodes.pop()
        node = _Node(_statement(text))
        (open_nodes[-1][1].children if open_nodes else roots).append(node)
        open_nodes.append((depth, node))
    return roots


def _statement(text: str) -> str:
    for pattern, replacement in _STATEMENTS:
        if pattern.match(text):
            text = pattern.sub(replacement, text)
            break
    return _ANY.sub("", text)


def _chains(node: _Node) -> list[tuple[str, ...]]:
    """Return a path to every end of the tree, the first of equal ends only."""
    if not node.children:
        return [(node.text,)]
    found: dict[str, tuple[str, ...]] = {}
    for child in node.children:
        for chain in _chains(child):
            repeated = chain[0].startswith(f"{node.text} ")
            found.setdefault(chain[-1], chain if repeated else (node.text, *chain))
    return list(found.values())


def _unique(chains: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for chain in chains:
        found.setdefault(chain[-1], chain)
    return list(found.values())


def clip(text: str) -> str:
    """Return ``text`` on one line, cut at a word so that a terminal can show it."""
    text = " ".join(text.split())
    if len(text) <= _LONGEST:
        return text
    return text[:_LONGEST].rpartition(" ")[0] + " ..."
