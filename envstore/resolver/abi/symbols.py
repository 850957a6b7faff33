"""Which symbols a file wants that nothing it is loaded with has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from envstore.resolver.abi.facts import symbol_hash
from envstore.resolver.abi.machine import MachineLibraries
from envstore.resolver.abi.names import GCC, glibc_symbols, is_driver, is_drivers, is_run_time
from envstore.resolver.abi.search import Scope, Search, Tree


class Symbols:
    """Looks for symbols as the loader does, then farther, to say who could have helped."""

    def __init__(
        self,
        tree: Tree,
        search: Search,
        scopes: Mapping[str, Scope],
        by_name: Mapping[str, Sequence[str]],
        machine: MachineLibraries | None,
    ) -> None:
        self._tree, self._search, self._scopes = tree, search, scopes
        self._by_name, self._machine = by_name, machine
        self._offers: dict[str, frozenset[int]] = {}
        self._programs = [path for path in tree.files if tree.facts(path).program]
        self._has_python = bool(search.process.files)

    def unresolved(self, path: str, roots: Sequence[str], *, python: bool) -> dict[str, str]:
        """Return the symbols that ``path`` wants in vain, with a file that has each, or nothing.

        ``roots`` are the files that load it. Symbols of Python itself count if ``python``, and if
        there is one in the environment. Where a library is not known the answer is none: the
        symbols may be in that one.
        """
        wanted = {
            symbol_hash(name.encode("utf-8", "surrogateescape")): name
            for name in self._tree.facts(path).undefined
        }
        self._strike(wanted, [path], self._search.process.files)
        if wanted and not self._strike_in_scope(wanted, path):
            return {}
        python = python and self._has_python
        wanted = {key: name for key, name in wanted.items() if not self._is_outside(name, python)}
        for root in roots:
            if wanted and root != path and not self._strike_in_scope(wanted, root):
                return {}
        if wanted:
            self._strike(wanted, self._programs)
        found = {}
        for key, name in wanted.items():
            found[name] = next((file for file in self._scopes if key in self._of(file)), "")
        return dict(sorted(found.items()))

    def _of(self, path: str) -> frozenset[int]:
        if path not in self._offers:
            self._offers[path] = self._tree.facts(path).offers()
        return self._offers[path]

    def _strike(
        self, wanted: dict[int, str], *groups: Sequence[str] | Mapping[str, object]
    ) -> None:
        for group in groups:
            for path in group:
                for key in wanted.keys() & self._of(path):
                    del wanted[key]
                if not wanted:
                    return

    def _strike_in_scope(self, wanted: dict[int, str], root: str) -> bool:
        """Strike what is loaded with ``root``; false if something unknown is loaded with it."""
        scope = self._scopes[root]
        self._strike(wanted, scope.files)
        for _, name in scope.missing:
            if not wanted:
                break
            if name in GCC or (is_driver(name) and self._machine is None):
                continue
            others = list(self._loaded_elsewhere(name))
            if others:
                self._strike(wanted, others)
                continue
            facts = self._machine.find(name) if self._machine else None
            if facts is None:
                return False
            for key in wanted.keys() & facts.offers():
                del wanted[key]
        return True

    def _loaded_elsewhere(self, name: str) -> Iterator[str]:
        """Yield a library that lies off the path, and what is loaded with it."""
        for path in self._by_name.get(name, ()):
            yield from self._scopes[path].files

    @staticmethod
    def _is_outside(name: str, python: bool) -> bool:
        """Whether a symbol is one that the process has anyway, or that cannot be judged."""
        if name.startswith(("Py", "_Py")) and not python:
            return True
        return is_run_time(name) or is_drivers(name) or name in glibc_symbols()
