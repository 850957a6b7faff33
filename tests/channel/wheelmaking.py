"""Wheels and source distributions written by hand."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_DATE = (2025, 1, 1, 0, 0, 0)

# A build backend (PEP 517) that needs nothing but Python: it packs what is in src/.
BACKEND = """
import base64, hashlib, os, pathlib, zipfile

NAME, VERSION = {name!r}, {version!r}


def get_requires_for_build_wheel(config_settings=None):
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    print("the backend packs", NAME)
    stem = NAME.replace("-", "_") + "-" + VERSION
    files = {{
        str(path.relative_to("src")): path.read_bytes()
        for path in sorted(pathlib.Path("src").rglob("*.py"))
    }}
    info = stem + ".dist-info/"
    files[info + "METADATA"] = pathlib.Path("PKG-INFO").read_bytes()
    files[info + "WHEEL"] = b"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += name + ",sha256=" + digest + "," + str(len(data)) + "\\n"
    files[info + "RECORD"] = (record + info + "RECORD,,\\n").encode()
    target = stem + "-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, target), "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data)
    return target
"""
FAILING_BACKEND = """
def get_requires_for_build_wheel(config_settings=None):
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    print("looking for the library")
    raise SystemExit("error: libnowhere.h was not found; install libnowhere")
"""


def metadata(
    name: str, version: str, requires: Sequence[str] = (), requires_python: str = "", more: str = ""
) -> str:
    """Return core metadata; ``more`` are lines of its own."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    if requires_python:
        lines.append(f"Requires-Python: {requires_python}")
    lines += [f"Requires-Dist: {one}" for one in requires]
    return "\n".join(lines) + f"\n{more}"


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, bytes | str],
    *,
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    requires_python: str = "",
    more: str = "",
    entry_points: str = "",
    executable: Sequence[str] = (),
    record: Mapping[str, str] | None = None,
    build: str = "",
) -> Path:
    """Write a wheel of ``files`` by path in it; ``executable`` ones have that mode bit.

    A path that begins with ``DATA/`` goes into the wheel's ``.data`` folder, one with ``INFO/``
    into its ``.dist-info``. ``record`` replaces lines of RECORD by path. The same files give the
    same bytes.
    """
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    purelib = "true" if tag.endswith("-none-any") else "false"
    found = {
        path.replace("DATA/", f"{stem}.data/").replace("INFO/", f"{info}/"): (
            data.encode() if isinstance(data, str) else data,
            0o755 if path in executable else 0o644,
        )
        for path, data in files.items()
    }
    text = metadata(name, version, requires, requires_python, more)
    found[f"{info}/METADATA"] = (text.encode(), 0o644)
    wheel = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: {purelib}\nTag: {tag}\n"
    found[f"{info}/WHEEL"] = (wheel.encode(), 0o644)
    if entry_points:
        found[f"{info}/entry_points.txt"] = (entry_points.encode(), 0o644)
    lines = {path: f"{path},{_digest(data)},{len(data)}" for path, (data, _) in found.items()}
    lines |= {f"{info}/RECORD": f"{info}/RECORD,,", **(record or {})}
    found[f"{info}/RECORD"] = ("".join(f"{line}\n" for line in lines.values()).encode(), 0o644)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{'-'.join(part for part in (stem, build, tag) if part)}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, (data, mode) in found.items():
            item = zipfile.ZipInfo(path, _DATE)
            item.external_attr = (0o100000 | mode) << 16
            item.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(item, data)
    return target


def make_sdist(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str],
    *,
    backend: str = BACKEND,
    requires: Sequence[str] = (),
) -> Path:
    """Write a source distribution with its build backend in it; ``files`` go into ``src/``."""
    stem = f"{name.replace('-', '_')}-{version}"
    project = (
        f'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'\n[project]\nname = "{name}"\nversion = "{version}"\n'
        f"dependencies = {list(requires)!r}\n"
    )
    found = {
        "pyproject.toml": project,
        "PKG-INFO": metadata(name, version, requires),
        "backend.py": backend.format(name=name, version=version) if "{" in backend else backend,
        **{f"src/{path}": text for path, text in files.items()},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, text in found.items():
            member = tarfile.TarInfo(f"{stem}/{path}")
            member.size, member.mtime = len(text.encode()), 1_735_689_600
            archive.addfile(member, io.BytesIO(text.encode()))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}.tar.gz"
    target.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return target


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
