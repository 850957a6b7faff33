"""What a checkpoint came from: code, environment, model, data, and how many ranks made it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from envstore.errors import UsageError
from envstore.store.repository import Repository

_GIT_SECONDS = 2.0
_MAX_TEXT = 1024
_PACKAGES = ("torch", "numpy")
RESERVED = frozenset({"code", "environment", "world_size", "host", "python", *_PACKAGES})
"""Names that are found out rather than given."""


def checked(given: Mapping[str, str] | None) -> dict[str, str]:
    """Return ``given`` if it is a mapping of names to texts. Raises ``UsageError``."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"lineage= is {given!r:.60}", hint='as in {"model": "team/base:v1"}')
    entries: list[tuple[object, object]] = list(given.items())
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, str):
            raise UsageError(f"lineage maps texts to texts, not {name!r:.60} to {value!r:.60}")
        if not name or len(name) > 64 or not value or len(value) > _MAX_TEXT:
            raise UsageError(f"lineage: {name!r:.60} or what it holds is empty or too long")
        if name in RESERVED - {"environment"}:
            raise UsageError(f"lineage: {name!r} is found out by itself", hint="leave it out")
    return dict(given)


def surroundings(world_size: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what this process can tell about itself; takes up to 2 s where git is slow.

    ``code`` is the git revision of the working directory, with ``-dirty`` if tracked files differ
    from it; absent without git. ``environment`` is the snapshot that ``envstore run`` has mounted
    for this process, as it says in ``ENVSTORE_SNAPSHOT``.
    """
    found = {
        "world_size": str(world_size),
        "host": socket.gethostname()[:_MAX_TEXT],
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    for name in _PACKAGES:
        # Only what the program has imported: looking is not worth an import of seconds.
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)[:_MAX_TEXT]
    code = revision(Path.cwd())
    if code is not None:
        found["code"] = code
    snapshot = environ.get("ENVSTORE_SNAPSHOT")
    if snapshot:
        found["environment"] = f"@{snapshot[:64]}"
    return found


def revision(directory: Path) -> str | None:
    """Return the git revision of ``directory``, ``-dirty`` if tracked files differ, or ``None``.

    ``None`` too if git does not answer within 2 s: a checkpoint does not wait for a network disk.
    """
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "-C", str(directory), "describe", "--always"]
    try:
        done = subprocess.run(
            [*command, "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=False,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", "replace").strip()
    return text[:_MAX_TEXT] if done.returncode == 0 and text else None


def resolve_refs(repository: Repository, given: Mapping[str, str]) -> dict[str, str]:
    """Return ``given`` with each ref of this store as ``ref@digest``, as it points now.

    A value that names nothing in the store stays as it is (a data set may lie elsewhere) - except
    ``model``, which must be in the store because its chunks are shared. Raises ``NotFoundError``.
    """
    from envstore.errors import NotFoundError

    resolved = {}
    entries: list[tuple[object, object]] = list(given.items())
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, str):
            raise UsageError(f"lineage maps texts to texts, not {name!r:.60} to {value!r:.60}")
        try:
            digest = repository.resolve(value).hex()
        except (UsageError, NotFoundError):
            if name == "model":
                raise
            resolved[name] = value
            continue
        resolved[name] = f"@{digest}" if value.startswith("@") else f"{value}@{digest}"
    return resolved


def base_of(resolved: Mapping[str, str]) -> tuple[str, ...]:
    """Return the digest of the resolved ``model``, as ``Orders.bases`` wants it."""
    model = resolved.get("model")
    return (f"@{model.rpartition('@')[2]}",) if model else ()
