"""Why a package is in an environment: the ways from what was asked for to the package.

Works on the lock alone. A conda package needs what its ``depends`` name (MatchSpecs), a wheel what
its ``requires`` name (PEP 508, as far as the markers hold on the target) and an interpreter.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from envstore.errors import NotFoundError
from envstore.resolver.lock import CondaPackage, LocalPython, Lock, Package, PypiPackage, python_of

_MATCH_SPEC = re.compile(r"(?:[^\s\[]*::)?\s*([A-Za-z0-9_.+-]+)")


@dataclass(frozen=True, slots=True)
class Item:
    """Something in an environment: a ``conda`` or ``pypi`` package, a local ``python``, or what
    the target is to have (``virtual``).
    """

    kind: str
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Need:
    """``item`` asks for something by ``constraint``, in the words of its metadata."""

    item: Item
    constraint: str


@dataclass(frozen=True, slots=True)
class Chain:
    """One way to a package: ``asked`` for, then needs, each of which asks for the next.

    The constraint of the last is on the package itself; without needs ``asked`` is.
    """

    asked: str
    needs: tuple[Need, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why ``item`` is there: what asks for it itself, and a shortest chain from each request.

    ``chains`` are in order of their length. Neither has anything where nobody needs it.
    """

    item: Item
    needed_by: tuple[Need, ...]
    chains: tuple[Chain, ...]


def explain(lock: Lock, name: str) -> tuple[Explanation, ...]:
    """Say of everything called ``name`` why it is in ``lock``.

    There may be a conda package and a wheel of one name. Raises ``NotFoundError``.
    """
    graph = _Graph(lock)
    targets = graph.called(name)
    if not targets:
        names = sorted({item.name for item in graph.items if item.kind != "virtual"})
        raise NotFoundError(f"{name} is not in this environment", hint=_similar(name, names))
    return tuple(graph.explain(target) for target in targets)


class _Graph:
    """Items by number, and the needs between them."""

    def __init__(self, lock: Lock) -> None:
        self.items: list[Item] = []
        self._by_name: dict[tuple[str, str], int] = {}
        self._needs: list[list[tuple[int, str]]] = []
        self._needed_by: list[list[tuple[int, str]]] = []
        self._lock = lock
        self._python = python_of(lock)
        for package in lock.packages:
            self._add(_item(package))
        for name, version in lock.virtual.items():
            self._add(Item("virtual", name, version))
        self._provided = self._provided_by_conda()
        self._markers = self._marker_environment()
        for number, package in enumerate(lock.packages):
            for target, constraint in self._wants(package):
                if target != number:
                    self._needs[number].append((target, constraint))
                    self._needed_by[target].append((number, constraint))

    def called(self, name: str) -> list[int]:
        wanted = {name.lower(), _normal(name)}
        return [
            number
            for number, item in enumerate(self.items)
            if item.name.lower() in wanted or (item.kind == "pypi" and item.name == _normal(name))
        ]

    def explain(self, target: int) -> Explanation:
        towards = self._towards(target)
        chains = []
        for asked, start in self._roots():
            if start not in towards:
                continue
            needs, at = [], start
            while at != target:
                following, constraint = towards[at]
                needs.append(Need(self.items[at], constraint))
                at = following
            chains.append(Chain(asked, tuple(needs)))
        unique = dict.fromkeys(sorted(chains, key=lambda chain: len(chain.needs)))
        needed_by = dict.fromkeys(
            Need(self.items[number], constraint) for number, constraint in self._needed_by[target]
        )
        return Explanation(self.items[target], tuple(needed_by), tuple(unique))

    def _add(self, item: Item) -> None:
        self._by_name.setdefault((item.kind, item.name), len(self.items))
        self.items.append(item)
        self._needs.append([])
        self._needed_by.append([])

    def _towards(self, target: int) -> dict[int, tuple[int, str]]:
        """Return for all that lead to ``target`` the next step of a shortest way, and its words."""
        found = {target: (target, "")}
        waiting = deque([target])
        while waiting:
            at = waiting.popleft()
            for number, constraint in self._needed_by[at]:
                if number not in found:
                    found[number] = (at, constraint)
                    waiting.append(number)
        return found

    def _roots(self) -> Iterator[tuple[str, int]]:
        """Yield what was asked for with the item that answers it."""
        request = self._lock.request
        for spec in request.conda.specs:
            number = self._by_name.get(("conda", _conda_name(spec)))
            if number is not None:
                yield spec, number
        asked = set()
        for line in request.pypi.requirements:
            number = self._distribution(_requirement_name(line))
            if number is not None:
                asked.add(number)
                yield line, number
        for number, package in enumerate(self._lock.packages):
            if isinstance(package, PypiPackage) and package.requested and number not in asked:
                yield package.name, number
        interpreter = self._interpreter()
        if interpreter is not None and request.python:
            yield f"python {request.python}", interpreter

    def _wants(self, package: Package) -> Iterator[tuple[int, str]]:
        """Yield the items that a package needs, with the words it says so in."""
        if isinstance(package, CondaPackage):
            for spec in package.depends:
                name = _conda_name(spec)
                kind = "virtual" if name.startswith("__") else "conda"
                number = self._by_name.get((kind, name))
                if number is not None:
                    yield number, spec
        elif isinstance(package, PypiPackage):
            for line in self._holding(package):
                number = self._distribution(_requirement_name(line))
                if number is not None:
                    yield number, line
            interpreter = self._interpreter()
            if interpreter is not None:
                yield interpreter, f"python{package.requires_python}"

    def _holding(self, package: PypiPackage) -> Iterator[str]:
        """Yield the requirements whose markers hold, for the extras that are asked for."""
        from packaging.requirements import InvalidRequirement, Requirement

        for line in package.requires:
            try:
                parsed = Requirement(line)
            except InvalidRequirement:
                # What no tool can read nothing was resolved for.
                continue
            extras = ("", *package.extras)
            marker = parsed.marker
            if marker is None or any(
                marker.evaluate({**self._markers, "extra": extra}) for extra in extras
            ):
                parsed.marker = None
                yield str(parsed)

    def _distribution(self, name: str) -> int | None:
        """Return the wheel of that name, else the conda package that provides it."""
        number = self._by_name.get(("pypi", name))
        return self._provided.get(name) if number is None else number

    def _interpreter(self) -> int | None:
        number = self._by_name.get(("python", "python"))
        return self._by_name.get(("conda", "python")) if number is None else number

    def _provided_by_conda(self) -> dict[str, int]:
        """Return conda packages by the Python distributions they are, as far as a lock says."""
        from envstore.resolver.stubs import python_names

        return {
            provided.name: self._by_name["conda", provided.package]
            for provided in python_names(self._lock.conda(), {})
        }

    def _marker_environment(self) -> dict[str, str]:
        from envstore.resolver.target import MACHINES, Target

        if self._python is None or self._lock.platform not in MACHINES:
            return {}
        return Target(self._lock.platform, self._lock.virtual).markers(self._python.version)


def _item(package: Package) -> Item:
    if isinstance(package, LocalPython):
        return Item("python", "python", package.version)
    kind = "conda" if isinstance(package, CondaPackage) else "pypi"
    return Item(kind, package.name, package.version)


def _conda_name(spec: str) -> str:
    match = _MATCH_SPEC.match(spec)
    return match[1].lower() if match else ""


def _requirement_name(line: str) -> str:
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return _normal(match[1]) if match else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _similar(name: str, names: Iterable[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(name.lower(), list(names), 3)
    return f"there is {', '.join(close)}" if close else None
