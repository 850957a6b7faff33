"""Compares what the ELF files of an environment want with what they would find.

Says in the loader's words what would fail, but before anybody mounts it. Errors are only what is
sure to fail: a file that is loaded when something is imported, wanting what nobody can provide.
What may come from the machine, or is loaded by Python code in ways that no ELF file tells, is
a warning.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from envstore.resolver.abi.doubles import cuda_runtimes, duplicates
from envstore.resolver.abi.facts import ElfFacts
from envstore.resolver.abi.findings import (
    ERROR,
    WARNING,
    Finding,
    is_side_show,
    is_vital,
    merged,
    python_tag,
    variants,
)
from envstore.resolver.abi.host import (
    AbiTarget,
    gcc_promised,
    glibc_of,
    machine_name,
    numbers,
)
from envstore.resolver.abi.machine import MachineLibraries
from envstore.resolver.abi.names import (
    ALLOWED,
    GCC,
    GLIBC,
    is_driver,
    of_machine,
    providers,
    stem_of,
)
from envstore.resolver.abi.search import Scope, Search, Tree
from envstore.resolver.abi.symbols import Symbols

_SYSROOT = re.compile(r"(^|/)(sysroot|stubs)/")
_PROGRAM = re.compile(r"bin/python(3\.(?P<minor>\d+)t?)?")
_LIBRARY = re.compile(r"lib/python3\.(?P<minor>\d+)t?/")


def check(
    tree: Tree,
    target: AbiTarget,
    packages: Mapping[str, str] | None = None,
    machine: MachineLibraries | None = None,
) -> list[Finding]:
    """Return what does not fit in ``tree`` on ``target``, errors first.

    ``packages`` are the versions of the environment's packages by name, as far as they are known.
    With ``machine`` libraries that come from outside are looked at there, else they are only
    known by name and the answer is the same everywhere.
    """
    return merged(_Check(tree, target, packages or {}, machine).findings())


def glibc_floor(tree: Tree) -> str:
    """Return the glibc that the files of an environment need, empty if they need none."""
    found = [
        version
        for _, facts in tree.files.values()
        for library, name, weak in facts.verneed
        if library in GLIBC and not weak and (version := glibc_of(name)) is not None
    ]
    return ".".join(map(str, max(found))) if found else ""


def find_interpreter(tree: Tree) -> str | None:
    """Return the real path of the environment's Python."""
    candidates = sorted((path for path in tree.files if _PROGRAM.fullmatch(path)), reverse=True)
    for name in ("bin/python", "bin/python3", *candidates):
        path = tree.real(name)
        if path is not None and path in tree.files and tree.facts(path).program:
            return path
    return None


class _Check:
    def __init__(
        self,
        tree: Tree,
        target: AbiTarget,
        packages: Mapping[str, str],
        machine: MachineLibraries | None,
    ) -> None:
        self._tree, self._target = tree, target
        self._packages, self._machine = packages, machine
        self._interpreter = find_interpreter(tree)
        self._python = self._find_python()
        self._search = Search(tree, self._interpreter)
        self._foreign = {path for path, (_, facts) in tree.files.items() if not self._fits(facts)}
        self._scopes: dict[str, Scope] = {
            path: self._search.load(path)
            for path in sorted(tree.files)
            if path not in self._foreign and not _SYSROOT.search(path)
        }
        self._users: dict[str, list[str]] = defaultdict(list)
        self._found: dict[tuple[str, str], str] = {}
        for root, scope in self._scopes.items():
            for path in scope.files:
                self._users[path].append(root)
            for edge, provider in scope.found.items():
                if edge[0] == root:
                    self._found[edge] = provider
                else:
                    self._found.setdefault(edge, provider)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self._scopes):
            names = {posixpath.basename(path), tree.facts(path).soname}
            for name in names - {""}:
                self._by_name[name].append(path)
        self._variants = variants(tree)
        self._versionless: set[str] = set()
        self._vital = {
            path
            for path, roots in self._users.items()
            if any(is_vital(root) and self._is_ours(root) for root in roots)
        }

    def findings(self) -> Iterator[Finding]:
        """Yield all that was found, some of it once for each file."""
        yield from self._architectures()
        for path in self._scopes:
            yield from self._libraries(path)
            yield from self._versions(path)
        yield from self._symbols()
        yield from duplicates(self._tree, self._scopes, self._by_name)
        yield from cuda_runtimes(self._tree, self._scopes, self._target, self._packages)

    def _fits(self, facts: ElfFacts) -> bool:
        return (facts.machine, facts.bits, facts.big_endian) == self._target.architecture

    def _is_ours(self, path: str) -> bool:
        """Whether the environment's Python would load a file, going by the tag in its name."""
        tag = python_tag(path)
        return tag is None or tag == self._python

    def _find_python(self) -> str | None:
        """Return the interpreter's ``311``, by its name or by where its library is."""
        first = [self._interpreter] if self._interpreter else []
        for pattern in (_PROGRAM, _LIBRARY):
            for path in (*first, *self._tree.files):
                match = pattern.match(path)
                if match and match["minor"]:
                    return f"3{match['minor']}"
        return None

    def _finding(
        self,
        level: str,
        code: str,
        path: str,
        subject: str,
        message: str,
        *,
        provider: str = "",
        hint: str = "",
    ) -> Finding:
        package = self._tree.package(path)
        return Finding(level, code, path, package, subject, message, provider, hint)

    def _level(self, path: str) -> str:
        return ERROR if path in self._vital else WARNING

    def _architectures(self) -> Iterator[Finding]:
        machine, bits, _ = self._target.architecture
        for path in sorted(self._foreign):
            if _SYSROOT.search(path):
                continue
            facts = self._tree.facts(path)
            vital = is_vital(path) and self._is_ours(path)
            if facts.bits != bits:
                said = f"wrong ELF class: ELFCLASS{facts.bits}"
            else:
                said = "cannot open shared object file: No such file or directory"
            here, wanted = machine_name(facts.machine, facts.bits), machine_name(machine, bits)
            yield self._finding(
                ERROR if vital else WARNING,
                "ARCH_MISMATCH",
                path,
                here,
                f"{said} (it is for {here}, the environment for {wanted})",
                hint=f"take the package's build for {self._target.platform}",
            )

    def _libraries(self, path: str) -> Iterator[Finding]:
        for name in self._tree.facts(path).needed:
            if name not in GLIBC and (path, name) not in self._found:
                yield from self._not_found(path, name)

    def _not_found(self, path: str, name: str) -> Iterator[Finding]:
        """Say what it means that nobody loads ``name`` where ``path`` looks for it."""
        message = f"{name}: cannot open shared object file: No such file or directory"
        elsewhere = self._by_name.get(name, [])
        if self._machine is not None:
            if name in GCC | ALLOWED and self._machine.find(name) is not None:
                return
            if self._machine.find(name) is not None:
                yield self._of_machine(path, name, "comes from this machine")
                return
        elif name in GCC | ALLOWED:
            return
        elif is_driver(name):
            if not self._target.cuda:
                yield self._of_machine(path, name, "comes with the machine's NVIDIA driver")
            return
        if elsewhere:
            provider = f"{elsewhere[0]} of {self._tree.package(elsewhere[0])}"
            yield self._finding(
                WARNING,
                "NEEDED_NOT_ON_PATH",
                path,
                name,
                message,
                provider=provider,
                hint="works only if Python code loads that file first",
            )
        elif self._machine is None and self._may_be_there(name):
            yield self._of_machine(path, name, "is not in the environment")
        else:
            yield self._missing(path, name, message)

    def _may_be_there(self, name: str) -> bool:
        if name.startswith("libpython") and self._interpreter is None:
            return True
        return of_machine(name)

    def _of_machine(self, path: str, name: str, why: str) -> Finding:
        hint = "the machine must have it"
        known = "" if is_driver(name) else providers(name)
        if known:
            hint += f", or add {known}"
        message = f"{name} {why}"
        return self._finding(
            WARNING, "HOST_LIBRARY", path, name, message, provider="the machine", hint=hint
        )

    def _missing(self, path: str, name: str, message: str) -> Finding:
        known = providers(name)
        hint = f"add {known}" if known else "add the package that has it"
        others = sorted(
            other for other in self._by_name if stem_of(other) == stem_of(name) != other != name
        )
        if others:
            owner = self._tree.package(self._by_name[others[0]][0])
            hint += f"; the environment has {others[0]} ({owner})"
        wrong = next(
            (
                scope.wrong[path, name]
                for root in self._users[path]
                if (path, name) in (scope := self._scopes[root]).wrong
            ),
            None,
        )
        if wrong is not None:
            facts = self._tree.facts(wrong)
            if facts.bits != self._tree.facts(path).bits:
                message = f"{name}: wrong ELF class: ELFCLASS{facts.bits}"
            hint = f"{wrong} is for {machine_name(facts.machine, facts.bits)}; {hint}"
        level = WARNING if self._is_one_of_many(path, name) else self._level(path)
        return self._finding(
            level, "NEEDED_MISSING", path, name, message, provider=known, hint=hint
        )

    def _is_one_of_many(self, path: str, name: str) -> bool:
        """Whether files beside ``path`` differ from it in wanting another version of ``name``."""
        return any(
            other != path and needed != name and stem_of(needed) == stem_of(name)
            for other in self._variants.get(path, ())
            for needed in self._tree.facts(other).needed
        )

    def _versions(self, path: str) -> Iterator[Finding]:
        level = self._level(path) if path in self._variants else ERROR
        if is_side_show(path) or not self._is_ours(path):
            level = WARNING
        newest: tuple[tuple[int, ...], str, str] | None = None
        for library, version, weak in self._tree.facts(path).verneed:
            if weak:
                continue
            provider = self._found.get((path, library))
            if library in GLIBC:
                glibc = glibc_of(version)
                if glibc is not None and self._is_too_new(glibc):
                    newest = max(newest or (glibc, version, library), (glibc, version, library))
            elif not self._has_version(library, version, provider):
                self._versionless.add(path)
                yield self._version_missing(level, path, library, version, provider)
        if newest is not None:
            glibc, version, library = newest
            wanted = ".".join(map(str, glibc))
            yield self._finding(
                level,
                "GLIBC_TOO_NEW",
                path,
                version,
                f"{library}: version `{version}' not found (required by {path})",
                provider=f"glibc {wanted}",
                hint=f"the target has glibc {self._target.glibc}: take an older build of the "
                f"package, or say --glibc {wanted} if all machines have that",
            )

    def _is_too_new(self, glibc: tuple[int, ...]) -> bool:
        return bool(self._target.glibc) and glibc > numbers(self._target.glibc)

    def _has_version(self, library: str, version: str, provider: str | None) -> bool:
        if provider is not None:
            offered = self._tree.facts(provider).verdef
            # Of a library without versions the loader takes what there is, with a complaint.
            return not offered or version in offered
        if self._machine is not None:
            facts = self._machine.find(library)
            return facts is None or not facts.verdef or version in facts.verdef
        return library not in GCC or gcc_promised(version, self._target.glibc)

    def _version_missing(
        self, level: str, path: str, library: str, version: str, provider: str | None
    ) -> Finding:
        if provider is not None:
            who = f"{provider} of {self._tree.package(provider)}"
            hint = f"take a version of {self._tree.package(provider)} that has it, or of "
            hint += f"{self._tree.package(path)} that does not need it"
        else:
            who = "the machine"
            known = providers(library)
            hint = f"add {known} of a version that has it" if known else "add a newer one"
            if self._target.glibc and self._machine is None:
                hint = f"machines with glibc {self._target.glibc} may have an older one; {hint}"
        message = f"{library}: version `{version}' not found (required by {path})"
        return self._finding(
            level, "VERSION_MISSING", path, version, message, provider=who, hint=hint
        )

    def _symbols(self) -> Iterator[Finding]:
        symbols = Symbols(self._tree, self._search, self._scopes, self._by_name, self._machine)
        for path, roots in self._users.items():
            # The loader gets no farther where a version is missing.
            if path not in self._scopes or path in self._versionless or is_side_show(path):
                continue
            lost = symbols.unresolved(path, roots, python=self._is_ours(path))
            if not lost:
                continue
            name, provider = next(iter(sorted(lost.items(), key=lambda item: item[1] != "")))
            nobody = [symbol for symbol, owner in lost.items() if not owner]
            if nobody:
                name, provider = nobody[0], ""
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            if provider:
                hint = "works only if Python code loads that file first, for all to see"
                provider += f" of {self._tree.package(provider)}"
            else:
                hint = f"nothing that {self._tree.package(path)} loads has it: "
                hint += "take versions that belong together"
            yield self._finding(
                WARNING if provider else self._level(path),
                "UNDEFINED_SYMBOL",
                path,
                name,
                f"undefined symbol: {name}{more}",
                provider=provider,
                hint=hint,
            )
