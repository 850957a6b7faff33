"""Conda channels on disk: packed, indexed, and kept from one test run to the next.

    channel = build_channel(tmp_path / "channel", ["python", "hello-pkg"])

makes the packages of those names (all their versions) and what they depend on, as ``content``
describes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.channel.content import RECIPES, Recipe
from tests.channel.packing import JANUARY, Package, pack
from tests.channel.wheelhouse import CACHE, link_or_copy
from tests.s3server import S3Server

_KEPT_SECONDS = 3 * 86_400

_INDEX = """
import asyncio, sys
from rattler.index import index_fs

async def main():
    await index_fs(sys.argv[1])
    await asyncio.sleep(0.05)  # rattler's threads must be done before the interpreter is

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel in a directory; ``packages`` are by file name."""

    path: Path
    packages: dict[str, Package]

    @property
    def url(self) -> str:
        return self.path.absolute().as_uri()

    def package(self, name: str, version: str = "") -> Package:
        """Return the package called ``name``, the newest one unless a version is given."""
        found = [
            package
            for package in self.packages.values()
            if package.about.name == name and version in ("", package.about.version)
        ]
        return max(found, key=lambda package: package.about.timestamp)

    def package_url(self, name: str, version: str = "") -> str:
        about = self.package(name, version).about
        return f"{self.url}/{about.subdir}/{about.filename}"


def build_channel(directory: Path, names: Iterable[str] | None = None) -> Channel:
    """Make a channel of ``names`` and their dependencies; of everything but wheels if ``None``."""
    recipes = _wanted(names)
    for subdir in {"noarch", *(recipe.about.subdir for recipe in recipes)}:
        (directory / subdir).mkdir(parents=True, exist_ok=True)
    packages = {}
    for recipe in recipes:
        made = _cached(recipe)
        path = directory / recipe.about.subdir / recipe.about.filename
        link_or_copy(made, path)
        packages[path.name] = Package.of(recipe.about, path)
    index_channel(directory)
    return Channel(directory, packages)


def index_channel(directory: Path) -> None:
    """Write the channel's repodata from its packages."""
    # In a process of its own: rattler may crash the one that it ran in, when that exits.
    subprocess.run([sys.executable, "-c", _INDEX, directory], check=True, timeout=120)


def write_repodata(directory: Path, packages: Sequence[Package]) -> Channel:
    """Write repodata.json that says of ``packages`` what they say, whatever is in their files."""
    for subdir in {"noarch", *(package.about.subdir for package in packages)}:
        (directory / subdir).mkdir(parents=True, exist_ok=True)
        records: dict[bool, dict[str, object]] = {False: {}, True: {}}
        for package in packages:
            if package.about.subdir == subdir:
                records[package.about.legacy][package.path.name] = package.record
        document = {
            "info": {"subdir": subdir},
            "packages": records[True],
            "packages.conda": records[False],
            "removed": [],
            "repodata_version": 1,
        }
        (directory / subdir / "repodata.json").write_text(json.dumps(document))
    return Channel(directory, {package.path.name: package for package in packages})


def upload_channel(channel: Channel, server: S3Server) -> str:
    """Put a channel into a new bucket; returns its ``s3://`` URL (see rattler's S3Middleware)."""
    bucket = server.new_bucket()
    client = server.client()
    try:
        for path in channel.path.rglob("*"):
            if path.is_file():
                key = f"channel/{path.relative_to(channel.path).as_posix()}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    finally:
        client.close()
    return f"s3://{bucket}/channel"


def _wanted(names: Iterable[str] | None) -> list[Recipe]:
    todo = [r.about.name for r in RECIPES if not r.wheel] if names is None else list(names)
    recipes: dict[str, list[Recipe]] = {}
    for recipe in RECIPES:
        recipes.setdefault(recipe.about.name, []).append(recipe)
    assert recipes.keys() >= set(todo), f"there are recipes for {', '.join(recipes)} only"
    found: dict[str, list[Recipe]] = {}
    while todo:
        name = todo.pop()
        if name in found or name not in recipes:
            continue
        found[name] = recipes[name]
        todo.extend(spec.split()[0] for recipe in found[name] for spec in recipe.about.depends)
    return [recipe for name in sorted(found) for recipe in found[name]]


def _cached(recipe: Recipe) -> Path:
    """Return the recipe's archive, packed now or by an earlier run of the same sources."""
    folder = CACHE / "packages" / _key() / recipe.about.subdir
    path = folder / recipe.about.filename
    if path.exists():
        os.utime(folder.parent)
        return path
    if not folder.exists():
        _forget_old(CACHE / "packages")
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock-{recipe.about.stem}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(prefix="envstore-channel-") as work:
            tree = Path(work, "tree")
            tree.mkdir()
            recipe.fill(tree)
            for below in tree.rglob("*"):
                os.utime(below, (JANUARY // 1000,) * 2, follow_symlinks=False)
            made = pack(folder, tree, recipe.about)
        with suppress(FileNotFoundError):
            Path(lock.name).unlink()
        return made


def _forget_old(packages: Path) -> None:
    """Remove what other sources than today's made, unless a run of them was here lately."""
    for folder in packages.glob("*"):
        if time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _key() -> str:
    """Return a digest of everything that decides what the packages hold."""
    here = Path(__file__).parent
    hasher = hashlib.sha256(f"{sys.version} {sys.base_prefix}".encode())
    for name in ("conda.py", "content.py", "interpreter.py", "packing.py", "wheels.lock"):
        hasher.update((here / name).read_bytes())
    return hasher.hexdigest()[:16]
