"""What lies at each path: in a prefix that an installer wrote, and in unpacked packages."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from envstore.resolver.lock import CondaPackage, PypiPackage
from envstore.resolver.packages.unpacked import Unpacked
from envstore.store.relocated import Relocated
from envstore.store.relocation import Relocation, relocated_target
from envstore.store.source import Kind
from tests.channel.packing import Package

Layout = dict[str, tuple[Kind, bool, bytes]]
"""By path: the kind, whether it is executable, and the content or target."""


def installed(prefix: Path) -> Layout:
    """Return what an installer wrote below ``prefix``, directories aside."""
    found: Layout = {}
    for folder, folders, files in os.walk(prefix):
        for name in [*files, *folders]:
            path = Path(folder, name)
            where = path.relative_to(prefix).as_posix()
            if path.is_symlink():
                found[where] = (Kind.SYMLINK, False, os.fsencode(os.readlink(path)))
            elif path.is_file():
                found[where] = (Kind.FILE, bool(path.stat().st_mode & 0o111), path.read_bytes())
    return found


def served(packages: Iterable[Unpacked], prefix: str) -> Layout:
    """Return what ``packages`` are at ``prefix``, later ones over earlier ones."""
    found: Layout = {}
    for package in packages:
        for entry in package.entries:
            path = os.fsdecode(entry.path)
            if entry.kind is Kind.SYMLINK:
                target = relocated_target(entry.target, entry.relocation, prefix.encode())
                target = target if entry.relocation else entry.target
                found[path] = (Kind.SYMLINK, False, target)
            elif entry.kind is Kind.FILE:
                data = (package.root / path).read_bytes()
                assert len(data) == entry.size
                if entry.relocation:
                    data = relocate(data, entry.relocation, prefix)
                found[path] = (Kind.FILE, entry.executable, data)
    return found


def materialise(layout: Layout, prefix: Path) -> None:
    """Write a layout to disk."""
    for name, (kind, executable, data) in layout.items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind is Kind.SYMLINK:
            path.symlink_to(os.fsdecode(data))
        else:
            path.write_bytes(data)
            path.chmod(0o755 if executable else 0o644)


def relocate(data: bytes, relocation: bytes, prefix: str) -> bytes:
    """Return a whole file as it is at ``prefix``."""
    there = Relocated(Relocation.decode(relocation), prefix.encode())
    return there.read(0, there.size, lambda offset, size: data[offset : offset + size])


def assert_same(ours: Layout, theirs: Layout) -> None:
    """Compare two layouts; a failure names paths instead of showing megabytes."""
    more, less = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    assert not more, f"only ours: {more[:20]}"
    assert not less, f"only theirs: {less[:20]}"
    other = [path for path in ours if ours[path] != theirs[path]]
    assert not other, f"different: {other[:20]}"


@contextmanager
def prefix_of(length: int) -> Iterator[Path]:
    """Make an empty directory whose path has exactly ``length`` characters, 13 at least."""
    random = len("/tmp/") + 8
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="x" * (length - random)))
    assert len(str(path)) == length
    try:
        yield path
    finally:
        shutil.rmtree(path)


def locked(package: Package) -> CondaPackage:
    """Return the lock's word of a package of the tests' channel."""
    about = package.about
    url = f"https://channel.example/{about.subdir}/{about.filename}"
    return CondaPackage(
        about.name,
        about.version,
        about.build,
        about.subdir,
        url,
        package.sha256,
        package.size,
        noarch=about.noarch,
        depends=about.depends,
    )


def locked_wheel(path: Path) -> PypiPackage:
    """Return the lock's word of a wheel."""
    from packaging.utils import parse_wheel_filename

    name, version, _, _ = parse_wheel_filename(path.name)
    return PypiPackage(name, str(version), path.name, "", "")
