"""The files of an environment that belong to no package: what makes it one for other tools.

``conda-meta`` has a record for each conda package, as conda and rattler read it, the history with
what was asked for, the variables of activation, and the mark that nothing may be installed into it
(CEP 22). ``EXTERNALLY-MANAGED`` says the same to pip and uv (PEP 668). ``REQUESTED`` and
``direct_url.json`` say where wheels are from. The same lock gives the same bytes: they hold no
time, and paths only where nothing is.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urldefrag

from envstore.resolver.lock import CondaPackage, Lock, PypiPackage, PythonFacts, python_of

_MESSAGE = (
    "This environment is a snapshot that envstore keeps; it never changes. "
    "To add packages, change what it was made from and push it again: envstore push REF SPEC..."
)
_SOURCES = "/envstore/packages"
_COPIED = 3
_TIME = "1980-01-02 00:00:00"
_SPEC = re.compile(r"(?:.*::)?\s*([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_COMMIT = re.compile(r"@([0-9a-f]{40}|[0-9a-f]{64})(?![0-9a-f])")
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tar")


@dataclass(frozen=True, slots=True)
class GeneratedFile:
    """A file by its path in the environment. ``relocation`` is encoded, empty for none."""

    path: bytes
    data: bytes
    executable: bool = False
    relocation: bytes = b""


def generate(lock: Lock, facts: Sequence[Mapping[str, Any]]) -> list[GeneratedFile]:
    """Return the files for ``lock``, whose packages have ``facts``, in its order.

    An environment without conda packages gets no ``conda-meta``, which would make it a conda
    environment to others.
    """
    files = []
    for package, known in zip(lock.packages, facts, strict=True):
        if isinstance(package, CondaPackage):
            name = f"{package.name}-{package.version}-{package.build}"
            files.append(_json(f"conda-meta/{name}.json", _record(lock, package, known)))
        elif isinstance(package, PypiPackage):
            files += _origin(package, known["dist_info"])
    if lock.conda():
        files.append(GeneratedFile(b"conda-meta/history", _history(lock).encode()))
        files.append(_json("conda-meta/frozen", {"message": _MESSAGE}))
        if lock.variables:
            state = {"version": 1, "env_vars": lock.variables}
            files.append(_json("conda-meta/state", state))
    python = python_of(lock)
    if python is not None:
        path = f"{stdlib(python)}/EXTERNALLY-MANAGED"
        text = f"[externally-managed]\nError={_MESSAGE}\n"
        files.append(GeneratedFile(path.encode(), text.encode()))
    return files


def stdlib(python: PythonFacts) -> str:
    """Return where the standard library lies, ``lib/python3.11`` or ``lib/python3.13t``."""
    parent = posixpath.dirname(python.site_packages)
    name = posixpath.basename(parent)
    return f"lib/{name}" if name.startswith("python3.") else f"lib/python{python.minor}"


def _json(path: str, value: Mapping[str, Any]) -> GeneratedFile:
    text = json.dumps(value, indent=2, sort_keys=True)
    return GeneratedFile(path.encode(), f"{text}\n".encode())


def _record(lock: Lock, package: CondaPackage, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``conda-meta`` says of a package: repodata's word before that of the archive."""
    stem = f"{package.name}-{package.version}-{package.build}"
    source = f"{_SOURCES}/{stem}"
    record = {**facts["index"], **package.extra}
    record |= {
        "name": package.name,
        "version": package.version,
        "build": package.build,
        "subdir": package.subdir,
        "url": package.url,
        "fn": package.filename,
        "channel": package.channel or package.url.rsplit("/", 2)[0],
    }
    optional = {
        "build_number": package.build_number,
        "depends": list(package.depends),
        "constrains": list(package.constrains),
        "noarch": package.noarch,
        "sha256": package.sha256,
        "md5": package.md5,
        "size": package.size,
        "python_site_packages_path": package.python_site_packages_path,
    }
    record |= {key: value for key, value in optional.items() if value}
    record.setdefault("build_number", 0)
    specs = [spec for spec in lock.request.conda.specs if _is_for(spec, package.name)]
    if specs:
        record["requested_spec"] = specs[0]
    return record | {
        "requested_specs": specs,
        "extracted_package_dir": source,
        "link": {"source": source, "type": _COPIED},
        "files": [path["_path"] for path in facts["paths"]],
        "paths_data": {"paths_version": 1, "paths": facts["paths"]},
    }


def _is_for(spec: str, name: str) -> bool:
    match = _SPEC.match(spec)
    return match is not None and match[1].lower() == name.lower()


def _history(lock: Lock) -> str:
    """Return one transaction that installs everything, as conda writes it."""
    lines = [f"==> {_TIME} <==", "# cmd: envstore push"]
    for package in lock.conda():
        channel = package.channel or package.url.rsplit("/", 2)[0]
        name = f"{package.name}-{package.version}-{package.build}"
        lines.append(f"+{channel.rstrip('/')}/{package.subdir}::{name}")
    if lock.request.conda.specs:
        lines.append(f"# update specs: {list(lock.request.conda.specs)!r}")
    return "\n".join(lines) + "\n"


def _origin(package: PypiPackage, dist_info: str) -> Iterator[GeneratedFile]:
    if package.requested:
        yield GeneratedFile(f"{dist_info}/REQUESTED".encode(), b"")
    direct = _direct_url(package) if package.direct else None
    if direct is not None:
        yield _json(f"{dist_info}/direct_url.json", direct)


def _direct_url(package: PypiPackage) -> dict[str, Any] | None:
    """Return where a wheel is from that was asked for by its URL (PEP 610).

    That must name the commit of a repository; where none is known, ``None``.
    """
    whole, fragment = urldefrag(package.direct)
    found: dict[str, Any] = {"url": whole}
    subdirectory = parse_qs(fragment).get("subdirectory")
    if subdirectory:
        found["subdirectory"] = subdirectory[0]
    vcs, plus, address = whole.partition("+")
    if plus and vcs in ("git", "hg", "svn", "bzr"):
        commit = _COMMIT.search(f"{package.build.source if package.build else ''} {whole}")
        if commit is None:
            return None
        scheme, _, rest = address.partition("://")
        host, _, path = rest.partition("/")
        path, _, revision = path.partition("@")
        info = {"vcs": vcs, "commit_id": commit[1]}
        if revision:
            info["requested_revision"] = revision
        return found | {"url": f"{scheme}://{host}/{path}", "vcs_info": info}
    if whole.startswith("file:") and not whole.endswith(_ARCHIVES):
        return found | {"dir_info": {}}
    sha256 = package.build.sha256 if package.build else package.sha256
    return found | {"archive_info": {"hash": f"sha256={sha256}", "hashes": {"sha256": sha256}}}
