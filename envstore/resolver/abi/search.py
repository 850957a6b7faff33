"""Finds libraries in an environment where the dynamic loader would find them.

The order is that of ld.so(8): what is loaded already by that name; ``DT_RPATH`` of the file and
of those that loaded it, unless the file has ``DT_RUNPATH``; then ``DT_RUNPATH``, which counts
for the file alone. Directories outside the environment are never looked at.
"""

from __future__ import annotations

import posixpath
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from envstore.resolver.abi.facts import ElfFacts
from envstore.resolver.abi.names import GLIBC

_MAX_LINKS = 40
_BUILD_PREFIX = re.compile(r"/[^:]*_placehold[^/:]*|/envstore-prefix-[0-9a-f]{32}")
_ORIGIN = re.compile(r"\$ORIGIN\b|\$\{ORIGIN\}")


@dataclass(frozen=True, slots=True)
class Tree:
    """The ELF files of an environment by path, with the package each is of, and its links.

    Paths are relative to the prefix. ``links`` holds the target of every symbolic link, files'
    and directories'; an absolute one leads out, unless it begins with ``prefix`` or the prefix
    that a package was built for.
    """

    files: Mapping[str, tuple[str, ElfFacts]]
    links: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def real(self, path: str) -> str | None:
        """Return ``path`` without links, ``None`` if it leads out of the environment."""
        parts = deque(path.split("/"))
        done: list[str] = []
        followed = 0
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    return None
                done.pop()
                continue
            done.append(part)
            target = self.links.get("/".join(done))
            if target is None:
                continue
            followed += 1
            inside = self.inside(target)
            if followed > _MAX_LINKS or inside is None:
                return None
            if target.startswith("/"):
                done.clear()
            else:
                done.pop()
            parts.extendleft(reversed(inside.split("/")))
        return "/".join(done)

    def inside(self, path: str) -> str | None:
        """Return a path or link target relative to where it counts, ``None`` if that is outside."""
        if not path.startswith("/"):
            return path
        if self.prefix and (path + "/").startswith(self.prefix + "/"):
            return path[len(self.prefix) + 1 :] or "."
        build = _BUILD_PREFIX.match(path)
        return (path[build.end() + 1 :] or ".") if build else None

    def facts(self, path: str) -> ElfFacts:
        """Return the facts of a file."""
        return self.files[path][1]

    def package(self, path: str) -> str:
        """Return the label of the package that a file is of."""
        return self.files[path][0]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A file in memory: its real path, the directory it was found in, and who loaded it."""

    path: str
    origin: str
    facts: ElfFacts
    loader: Loaded | None = None


@dataclass(slots=True)
class Scope:
    """What is in memory once a file was loaded with all that it needs, in the order of loading.

    ``found`` maps (file, name needed) to the file found. ``missing`` are those not found in the
    environment, ``wrong`` those of which only files of another architecture were met.
    """

    files: dict[str, Loaded] = field(default_factory=dict)
    found: dict[tuple[str, str], str] = field(default_factory=dict)
    missing: dict[tuple[str, str], None] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class Search:
    """Loads files as the loader would, into a process of the environment's interpreter."""

    def __init__(self, tree: Tree, interpreter: str | None = None) -> None:
        """``interpreter`` is the real path of the program that libraries are loaded into."""
        self._tree = tree
        self._found: dict[str, str | None] = {}
        self.process = Scope()
        """What the interpreter itself loads."""
        self._main: Loaded | None = None
        if interpreter is not None:
            self._main = self._load(interpreter, self.process, None)

    def load(self, path: str) -> Scope:
        """Return what is in memory after ``path`` was started, or loaded by the interpreter."""
        if self._tree.facts(path).program:
            scope, main = Scope(), None
        else:
            scope, main = Scope(names=dict(self.process.names)), self._main
        self._load(path, scope, main)
        return scope

    def _load(self, path: str, scope: Scope, main: Loaded | None) -> Loaded:
        first = Loaded(path, posixpath.dirname(path), self._tree.facts(path))
        self._enter(first, posixpath.basename(path), scope)
        waiting = deque([first])
        while waiting:
            item = waiting.popleft()
            for name in item.facts.needed:
                if name in GLIBC or (item.path, name) in scope.found:
                    continue
                known = scope.names.get(name)
                if known is not None:
                    scope.found[item.path, name] = known
                    continue
                found = self._find(item, name, main or first, scope)
                if found is None:
                    scope.missing[item.path, name] = None
                    continue
                scope.found[item.path, name] = found.path
                fresh = found.path not in scope.files
                self._enter(found, name, scope)
                if fresh:
                    waiting.append(found)
        return first

    @staticmethod
    def _enter(item: Loaded, name: str, scope: Scope) -> None:
        scope.files.setdefault(item.path, item)
        scope.names.setdefault(name, item.path)
        if item.facts.soname:
            scope.names.setdefault(item.facts.soname, item.path)

    def _find(self, item: Loaded, name: str, main: Loaded, scope: Scope) -> Loaded | None:
        if "/" in name:
            return self._look(name, "", item, name, scope)
        chain = []
        if not item.facts.runpath:
            loader: Loaded | None = item
            while loader is not None:
                chain.append(loader)
                loader = loader.loader
            if main.path != chain[-1].path:
                chain.append(main)
        for who in chain:
            if not who.facts.runpath:
                for folder in who.facts.rpath:
                    found = self._look(folder, who.origin, item, name, scope)
                    if found is not None:
                        return found
        for folder in item.facts.runpath:
            found = self._look(folder, item.origin, item, name, scope)
            if found is not None:
                return found
        return None

    def _look(
        self, folder: str, origin: str, item: Loaded, name: str, scope: Scope
    ) -> Loaded | None:
        where = _ORIGIN.sub(lambda _: "/" + origin, folder)
        if where == folder:
            # Relative to the current directory, whatever that is, or somewhere on the machine.
            inside = self._tree.inside(folder) if folder.startswith("/") else None
        else:
            inside = None if "$" in where else where.lstrip("/")
        if inside is None:
            return None
        path = inside if folder == name else f"{inside}/{name}"
        if path not in self._found:
            self._found[path] = self._tree.real(path)
        real = self._found[path]
        if real is None or real not in self._tree.files:
            return None
        facts, wanted = self._tree.facts(real), item.facts
        if (facts.machine, facts.bits) != (wanted.machine, wanted.bits):
            # The loader passes by what it cannot run.
            scope.wrong[item.path, name] = real
            return None
        origin = posixpath.dirname(posixpath.normpath(path))
        return Loaded(real, origin, facts, item)
