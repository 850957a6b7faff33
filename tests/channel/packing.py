"""Conda packages written by hand: every fact of them, right or wrong, is the test's own choice."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import os
import platform
import stat
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conda_package_streaming.create import conda_builder

SUBDIR = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}[platform.machine()]
PLACEHOLDER = ("/opt/envstore-tests/build_" + "placehold_" * 40)[:255]
SHORT_PLACEHOLDER = ("/opt/short_" + "placehold_" * 40)[:80]
JANUARY = 1_735_689_600_000  # 2025-01-01 in milliseconds, the unit of conda's timestamps
MONTH = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class About:
    """What a package says of itself. ``timestamp`` is in milliseconds; ``build`` names the file.

    ``paths`` overrides what paths.json says of a path (``None`` leaves it out), ``info`` adds or
    replaces whole files below ``info/``, ``index`` keys of index.json.
    """

    name: str
    version: str = "1.0"
    build: str = "0"
    build_number: int = 0
    subdir: str = SUBDIR
    depends: tuple[str, ...] = ()
    constrains: tuple[str, ...] = ()
    noarch: str = ""
    entry_points: tuple[str, ...] = ()
    timestamp: int = JANUARY
    placeholder: str = PLACEHOLDER
    legacy: bool = False
    index: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)
    info: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.version}-{self.build}"

    @property
    def filename(self) -> str:
        """The archive's name: ``.conda``, or the older ``.tar.bz2`` if ``legacy``."""
        return self.stem + (".tar.bz2" if self.legacy else ".conda")


@dataclass(frozen=True, slots=True)
class Package:
    """A packed archive and what a channel's repodata has to say of it."""

    about: About
    path: Path
    sha256: str
    md5: str
    size: int

    @property
    def record(self) -> dict[str, Any]:
        """Its entry in repodata.json."""
        return {
            **index_json(self.about),
            "sha256": self.sha256,
            "md5": self.md5,
            "size": self.size,
        }

    @classmethod
    def of(cls, about: About, path: Path) -> Package:
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(about, path, sha256, hashlib.md5(data).hexdigest(), len(data))


def pack(folder: Path, tree: Path, about: About, *, extra: Sequence[tarfile.TarInfo] = ()) -> Path:
    """Pack everything below ``tree`` as ``about`` into ``folder``; returns the archive's path.

    ``extra`` members go into the archive as they are, and are not in paths.json unless
    ``about.paths`` says so. The same tree gives the same bytes. Times are those of the files.
    """
    files = _files(tree)
    info = {
        "index.json": _json(index_json(about)),
        "paths.json": _json(_paths_json(files, about)),
        "files": "".join(f"{name}\n" for name in files).encode(),
        "about.json": _json({"summary": f"{about.name} of the tests"}),
    }
    if about.noarch == "python":
        link = {"type": "python", "entry_points": list(about.entry_points)}
        info["link.json"] = _json({"noarch": link, "package_metadata_version": 1})
    info.update(about.info)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / about.filename
    partial = folder / f".{os.getpid()}-{about.stem}.conda"
    if about.legacy:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            _fill(tar, info, files, extra, about)
        partial.write_bytes(bz2.compress(buffer.getvalue()))
    else:
        with conda_builder(partial.stem, folder, compression_level=3) as tar:
            _fill(tar, info, files, extra, about)
        _settle(partial, about)
    partial.rename(target)
    return target


def index_json(about: About) -> dict[str, Any]:
    """Return what ``info/index.json`` says."""
    found: dict[str, Any] = {
        "name": about.name,
        "version": about.version,
        "build": about.build,
        "build_number": about.build_number,
        "depends": list(about.depends),
        "constrains": list(about.constrains),
        "subdir": about.subdir,
        "timestamp": about.timestamp,
        "license": "MIT",
    }
    if about.noarch:
        found["noarch"] = about.noarch
    else:
        found.update(arch=platform.machine(), platform="linux")
    return {**found, **about.index}


def _files(tree: Path) -> dict[str, Path]:
    found = {}
    for folder, folders, names in os.walk(tree):
        for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
            path = Path(folder, name)
            found[path.relative_to(tree).as_posix()] = path
    return dict(sorted(found.items()))


def _paths_json(files: Mapping[str, Path], about: About) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        entry: dict[str, Any] = {"_path": name, "path_type": "hardlink"}
        if path.is_symlink():
            entry["path_type"] = "softlink"
        if path.is_file():
            data = path.read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size_in_bytes=len(data))
            # Bytecode is no C string: it cannot be relocated, so conda-build says nothing of it.
            bytecode = name.endswith(".pyc")
            if about.placeholder.encode() in data and not path.is_symlink() and not bytecode:
                mode = "binary" if b"\0" in data else "text"
                entry.update(prefix_placeholder=about.placeholder, file_mode=mode)
        found[name] = entry
    for name, said in about.paths.items():
        if said is None:
            del found[name]
        else:
            found[name] = {**found.get(name, {"_path": name, "path_type": "hardlink"}), **said}
    return {"paths": list(found.values()), "paths_version": 1}


def _fill(
    tar: tarfile.TarFile,
    info: Mapping[str, bytes],
    files: Mapping[str, Path],
    extra: Sequence[tarfile.TarInfo],
    about: About,
) -> None:
    for name, data in info.items():
        member = tarfile.TarInfo(f"info/{name}")
        member.size, member.mtime = len(data), about.timestamp // 1000
        tar.addfile(member, io.BytesIO(data))
    for name, path in files.items():
        st = path.lstat()
        member = tarfile.TarInfo(name)
        member.mode, member.mtime = stat.S_IMODE(st.st_mode), int(st.st_mtime)
        if path.is_symlink():
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
            tar.addfile(member)
        else:
            member.size = st.st_size
            with open(path, "rb") as file:
                tar.addfile(member, file)
    for member in extra:
        tar.addfile(member, io.BytesIO(bytes(member.size)))


def _settle(path: Path, about: About) -> None:
    """Write the archive anew without the time of day, and with the parts' right names."""
    with zipfile.ZipFile(path) as archive:
        parts = [(item.filename, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts:
            name = name.replace(path.stem, about.stem)
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()
