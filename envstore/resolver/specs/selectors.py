"""Platform selectors of environment files: ``# [linux64]`` behind a line and ``sel(linux)`` as key.

The language is names, ``and``, ``or``, ``not`` and parentheses (CEP 24).
"""

from __future__ import annotations

import re

_ARCHITECTURES = {
    "64": ("x86_64",),
    "32": ("x86",),
    "aarch64": ("aarch64",),
    "arm64": ("arm64",),
    "ppc64le": ("ppc64le",),
    "s390x": ("s390x",),
    "armv6l": ("armv6l",),
    "armv7l": ("armv7l",),
    "riscv64": ("riscv64",),
}
_SYSTEMS = ("linux", "osx", "win")
_WORDS = re.compile(r"\s*([A-Za-z_][\w-]*|[()])")
_COMMENT = re.compile(r"^(.*?)(?:^|\s)#\s*\[([^\[\]]*)\]\s*$")
_NEWLINE = re.compile(r"\r\n|\r|\n")
_LONGEST = 200


def true_names(platform: str) -> frozenset[str]:
    """Return the names that are true on a conda subdir such as ``linux-64``."""
    system, _, architecture = platform.partition("-")
    names = {platform, system, *_ARCHITECTURES.get(architecture, ())}
    if system in ("linux", "osx"):
        names.add("unix")
    if architecture in ("64", "32"):
        names.add(system + architecture)
    return frozenset(names)


def _known_names() -> frozenset[str]:
    subdirs = (f"{system}-{part}" for system in _SYSTEMS for part in _ARCHITECTURES)
    return frozenset().union(*map(true_names, subdirs))


KNOWN = _known_names()
"""Every name that is true somewhere."""


def evaluate(selector: str, platform: str) -> bool:
    """Return whether a selector holds on ``platform``; raises ``ValueError`` if it is none."""
    if len(selector) > _LONGEST:
        raise ValueError("it is too long")
    words, at = list[str](), 0
    while selector[at:].strip():
        match = _WORDS.match(selector, at)
        if match is None:
            raise ValueError(f"{selector[at:].strip()[0]!r} has no meaning in it")
        words.append(match[1])
        at = match.end()
    parser = _Parser(words, true_names(platform))
    value = parser.alternatives()
    if parser.words:
        raise ValueError(f"{parser.words[0]!r} comes unexpected")
    return value


class _Parser:
    """Takes words from the front; every method returns the value of what it took."""

    def __init__(self, words: list[str], true: frozenset[str]) -> None:
        self.words = words
        self._true = true

    def alternatives(self) -> bool:
        value = self._all()
        while self._take("or"):
            value = self._all() or value
        return value

    def _all(self) -> bool:
        value = self._one()
        while self._take("and"):
            value = self._one() and value
        return value

    def _one(self) -> bool:
        if self._take("not"):
            return not self._one()
        if self._take("("):
            value = self.alternatives()
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        if not self.words:
            raise ValueError("it ends too early")
        word = self.words.pop(0)
        if word in (")", "and", "or"):
            raise ValueError(f"{word!r} comes unexpected")
        if word not in KNOWN:
            raise ValueError(f"{word!r} is no platform")
        return word in self._true

    def _take(self, word: str) -> bool:
        if self.words and self.words[0] == word:
            del self.words[0]
            return True
        return False


def select(text: str, platform: str, unknown: list[tuple[int, str]]) -> str:
    """Blank the lines of a YAML text whose selector does not hold, and all nested below them.

    The number of lines stays. What looks like a selector and is none is taken for the comment
    that it is to conda, and added to ``unknown`` with its line, counted from 1.
    """
    lines, dropped = list[str](), -1
    for number, line in enumerate(_NEWLINE.split(text), 1):
        indent = len(line) - len(line.lstrip())
        if dropped >= 0 and (not line.strip() or indent > dropped):
            lines.append("")
            continue
        dropped = -1
        match = _COMMENT.match(line)
        if match and match[1].strip() and not match[1].lstrip().startswith("#"):
            try:
                if not evaluate(match[2], platform):
                    dropped = indent
                    line = ""
            except ValueError as error:
                unknown.append((number, f"[{match[2]}] is not taken for a selector: {error}"))
        lines.append(line)
    return "\n".join(lines)
