"""A channel whose packages are broken or hostile, each in one way that its name says."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.channel.conda import Channel, write_repodata
from tests.channel.content import GENERIC, PURE, write
from tests.channel.packing import PLACEHOLDER, About, Package, pack

OUTSIDE = "envstore-tests-escaped"
"""The name of the file that hostile packages try to write outside of the prefix."""


def build_broken(directory: Path, scratch: Path) -> Channel:
    """Make the channel; its repodata is written by hand, as an indexer would refuse some of it.

    Besides the hostile ones there is ``sound``, so that a failure can be told from a habit.
    """
    packages = []
    for name, make in _KINDS.items():
        tree = scratch / name
        write(tree, f"share/{name}/file.txt", f"the file of {name}\n")
        packages.append(make(directory, tree, name))
    return write_repodata(directory, packages)


def _make(
    directory: Path,
    tree: Path,
    about: About,
    *extra: tarfile.TarInfo,
    lie: dict[str, Any] | None = None,
) -> Package:
    path = pack(directory / about.subdir, tree, about, extra=extra)
    return dataclasses.replace(Package.of(about, path), **(lie or {}))


def _about(name: str, **said: Any) -> About:
    return About(name, **{**GENERIC, **said})


def _sound(directory: Path, tree: Path, name: str) -> Package:
    return _make(directory, tree, _about(name))


def _said(**lie: Any) -> Callable[[Path, Path, str], Package]:
    """Return what makes a package of which the repodata says something else."""
    return lambda directory, tree, name: _make(directory, tree, _about(name), lie=lie)


def _paths(entry: dict[str, Any] | None, path: str = "") -> Callable[[Path, Path, str], Package]:
    """Return what makes a package of whose file paths.json says something else."""

    def make(directory: Path, tree: Path, name: str) -> Package:
        paths = {path or f"share/{name}/file.txt": entry}
        return _make(directory, tree, _about(name, paths=paths))

    return make


def _member(
    path: str, kind: bytes = tarfile.REGTYPE, target: str = ""
) -> Callable[[Path, Path, str], Package]:
    """Return what makes a package with an odd member, which paths.json lists too."""

    def make(directory: Path, tree: Path, name: str) -> Package:
        member = tarfile.TarInfo(path)
        member.type, member.linkname = kind, target
        member.devmajor, member.devminor = 1, 3
        member.size = 4 if kind == tarfile.REGTYPE else 0
        said = {path: {"path_type": "softlink" if kind == tarfile.SYMTYPE else "hardlink"}}
        return _make(directory, tree, _about(name, paths=said), member)

    return make


def _through_symlink(directory: Path, tree: Path, name: str) -> Package:
    link, inside = tarfile.TarInfo("share/way-out"), tarfile.TarInfo(f"share/way-out/{OUTSIDE}")
    link.type, link.linkname, inside.size = tarfile.SYMTYPE, "../../..", 4
    said = {link.name: {"path_type": "softlink"}, inside.name: {}}
    return _make(directory, tree, _about(name, paths=said), link, inside)


def _twice(directory: Path, tree: Path, name: str) -> Package:
    again = tarfile.TarInfo(f"share/{name}/file.txt")
    again.size = 4
    return _make(directory, tree, _about(name), again)


def _cut(directory: Path, tree: Path, name: str) -> Package:
    package = _make(directory, tree, _about(name))
    data = package.path.read_bytes()
    package.path.write_bytes(data[: len(data) * 2 // 3])
    return Package.of(package.about, package.path)


def _garbage(directory: Path, tree: Path, name: str) -> Package:
    package = _make(directory, tree, _about(name))
    package.path.write_bytes(b"this is no archive\n" * 100)
    return Package.of(package.about, package.path)


def _vanished(directory: Path, tree: Path, name: str) -> Package:
    package = _make(directory, tree, _about(name))
    package.path.unlink()
    return package


def _info(**files: bytes) -> Callable[[Path, Path, str], Package]:
    """Return what makes a package whose ``info/<name>.json`` is something else."""
    info = {f"{name}.json": data for name, data in files.items()}
    return lambda directory, tree, name: _make(directory, tree, _about(name, info=info))


def _entry_point(said: str) -> Callable[[Path, Path, str], Package]:
    def make(directory: Path, tree: Path, name: str) -> Package:
        return _make(directory, tree, About(name, entry_points=(said,), **PURE))

    return make


_KINDS: dict[str, Callable[[Path, Path, str], Package]] = {
    "sound": _sound,
    # what the repodata says
    "wrong-sha256": _said(sha256="0" * 64),
    "wrong-size": _said(size=12345),
    "vanished": _vanished,
    # the archive
    "truncated": _cut,
    "garbage": _garbage,
    "twice": _twice,
    # members
    "escaping": _member(f"../{OUTSIDE}"),
    "escaping-inside": _member(f"share/../../{OUTSIDE}"),
    "absolute": _member(f"/tmp/{OUTSIDE}"),
    "through-symlink": _through_symlink,
    "hardlink-outside": _member("share/passwd", tarfile.LNKTYPE, "/etc/passwd"),
    "device": _member("share/null", tarfile.CHRTYPE),
    "fifo": _member("share/fifo", tarfile.FIFOTYPE),
    # info/
    "paths-wrong-sha256": _paths({"sha256": "1" * 64}),
    "paths-wrong-size": _paths({"size_in_bytes": 1}),
    "paths-unlisted": _paths(None),
    "paths-missing": _paths({"sha256": "2" * 64, "size_in_bytes": 5}, "share/not/there"),
    "paths-escaping": _paths({"sha256": "3" * 64, "size_in_bytes": 5}, f"../{OUTSIDE}"),
    "paths-no-placeholder": _paths({"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}),
    "paths-bad-mode": _paths({"prefix_placeholder": PLACEHOLDER, "file_mode": "odd"}),
    "paths-garbage": _info(paths=b'{"paths": ['),
    "index-garbage": _info(index=b"[1, 2"),
    "index-other-name": _info(index=b'{"name": "x", "version": "9", "build": "0", "depends": []}'),
    "entry-point-escaping": _entry_point(f"../../{OUTSIDE} = os:getcwd"),
    "entry-point-code": _entry_point("evil = os:system('id')"),
}

NAMES = tuple(_KINDS)
"""What packages there are."""
