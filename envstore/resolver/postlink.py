"""Post-link scripts: run once, at push, in a scratch copy of the environment (CEP 34).

What they change is stored as one more package, named by the lock: pushing the same lock again
uses it instead of running anything. Text that holds the scratch copy's path is stored so that it
can be relocated; what else a script makes of its surroundings (dates, host names) stays in it, so
the promise that a lock gives the same bytes anywhere ends here, and the push warns.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from envstore.errors import EnvstoreError
from envstore.resolver.layout import layout_order
from envstore.resolver.lock import CondaPackage
from envstore.store.entries import sort_key
from envstore.store.relocation import PLACEHOLDER, Mode, link_relocation, plan
from envstore.store.source import WINDOW, DirectorySource, Kind, SourceEntry

PATIENCE = 600
"""Seconds that one script may take."""

_LAST_LINES = 5
_MOST_TEXT = 64 << 20
_MESSAGES = b".messages.txt"


class ScriptError(EnvstoreError):
    """A post-link script failed; its package cannot be used."""


def run_scripts(prefix: Path, scripts: Sequence[tuple[CondaPackage, str]]) -> list[str]:
    """Run ``scripts`` (package, path below ``prefix``) in order; returns what they tell the user.

    As conda does: by bash, with ``PREFIX``, ``PKG_NAME``, ``PKG_VERSION`` and ``PKG_BUILDNUM``
    set; text for the user goes to ``PREFIX/.messages.txt``. Raises ``ScriptError``.
    """
    told = []
    for package, script in scripts:
        environment = {
            "PATH": f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(prefix),
            "LANG": "C.UTF-8",
            "ROOT_PREFIX": str(prefix),
            "PREFIX": str(prefix),
            "CONDA_PREFIX": str(prefix),
            "PKG_NAME": package.name,
            "PKG_VERSION": package.version,
            "PKG_BUILDNUM": str(package.build_number),
        }
        what = f"the post-link script of {package.name}-{package.version}"
        try:
            done = subprocess.run(
                ["bash", str(prefix / script)],
                cwd=prefix,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ScriptError(f"{what} did not end within {PATIENCE} s") from None
        except FileNotFoundError:
            raise ScriptError(f"{what} needs bash", hint="install it") from None
        messages = prefix / os.fsdecode(_MESSAGES)
        left = messages.read_text(errors="replace") if messages.is_file() else ""
        if done.returncode:
            lines = (left + done.stdout.decode(errors="replace")).strip().splitlines()
            said = "; ".join(lines[-_LAST_LINES:]) or "it said nothing"
            raise ScriptError(
                f"{what} failed with status {done.returncode}: {said}",
                hint="leave the package out, or push with --no-scripts",
            )
        told += [f"{package.name}: {line}" for line in left.strip().splitlines()]
        messages.unlink(missing_ok=True)
    return told


class ChangesSource:
    """What became different below ``prefix`` since ``before`` was seen, as a source.

    ``removed`` are the paths that are gone.
    """

    kind = "env"
    identity = ""

    def __init__(self, prefix: Path, before: Sequence[SourceEntry]) -> None:
        self._tree = DirectorySource(prefix, kind="env", normalise=True)
        self.root = self._tree.root
        self.warnings: list[str] = []
        self.removed: list[bytes] = []
        self._before = {entry.path: entry for entry in before}
        self._texts: dict[bytes, bytes] = {}

    def scan(self) -> list[SourceEntry]:
        """See ``Source.scan``: the directories above what changed are among the entries.

        Nothing else may have written below the prefix.
        """
        now = sorted(self._tree.scan(), key=lambda entry: sort_key(entry.path))
        there = {entry.path for entry in now}
        self.removed = sorted(path for path in self._before if path not in there)
        found = []
        above: list[SourceEntry] = []
        listed: set[bytes] = set()
        for entry in now:
            while above and not entry.path.startswith(above[-1].path + b"/"):
                above.pop()
            if entry.kind is Kind.DIRECTORY:
                above.append(entry)
            old = self._before.get(entry.path)
            if b"__pycache__" in entry.path.split(b"/"):
                continue  # of the scripts' own running: it would never be valid
            if old is None or not _as_before(old, entry):
                found += [item for item in above if item.path not in listed]
                listed.update(item.path for item in above)
                if entry.kind is not Kind.DIRECTORY:
                    found.append(self._portable(entry))
        return found

    def order(self, entry: SourceEntry) -> tuple[int, bytes]:
        """See ``Source.order``."""
        return layout_order(entry.path)

    def expect(self, entries: Sequence[SourceEntry]) -> None:
        """See ``Source.expect``."""

    def read(self, entry: SourceEntry) -> Iterator[bytes]:
        """See ``Source.read``."""
        data = self._texts.get(entry.path)
        if data is None:
            return self._tree.read(entry)
        return (data[at : at + WINDOW] for at in range(0, len(data), WINDOW))

    def attributes(self) -> dict[str, str]:
        """See ``Source.attributes``: none."""
        return {}

    def root_attributes(self) -> tuple[int, int]:
        """See ``Source.root_attributes``."""
        return 0, 0

    def close(self) -> None:
        """See ``Source.close``."""

    def _portable(self, entry: SourceEntry) -> SourceEntry:
        """Return ``entry`` as it is to be stored: a placeholder for the scratch copy's path."""
        own = os.fsencode(self.root)
        if entry.kind is Kind.SYMLINK:
            if not link_relocation(entry.target, own):
                return entry
            target = PLACEHOLDER + entry.target.removeprefix(own)
            return replace(entry, target=target, relocation=link_relocation(target, PLACEHOLDER))
        if entry.size > _MOST_TEXT:
            return entry
        data = b"".join(self._tree.read(entry))
        if own not in data:
            return entry
        name = os.fsdecode(entry.path)
        if b"\0" in data:
            self.warnings.append(f"{name}: a post-link script wrote its own path into a program")
            return entry
        data = data.replace(own, PLACEHOLDER)
        relocation = plan(data, PLACEHOLDER, Mode.TEXT)
        assert relocation is not None  # noqa: S101 - it was just put there
        self._texts[entry.path] = data
        return replace(entry, size=len(data), relocation=relocation.encode())


def _as_before(old: SourceEntry, new: SourceEntry) -> bool:
    if old.kind is not new.kind or old.mode != new.mode or old.target != new.target:
        return False
    return old.kind is not Kind.FILE or old.signature == new.signature
