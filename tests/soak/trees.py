"""Trees that change from version to version and share much, each known by nothing but a number.

A *recipe* maps each path to the name of its content, and the name alone gives the bytes; so a
tree can be made again, and any copy of it judged, without keeping it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

VERSION = ".version"
"""The file in each tree that names it."""

_SHARED = 160
_SIZES = ((1_000, 12_000),) * 5 + ((30_000, 300_000),) * 4
_PIECES = 4


@functools.lru_cache(maxsize=512)
def content(name: str) -> bytes:
    """Return the bytes that ``name`` stands for; for ``a+b`` those of ``a``, then of ``b``."""
    if name.startswith("="):
        return name[1:].encode()
    if "+" in name:
        return b"".join(map(content, name.split("+")))
    choose = random.Random(name)
    size = choose.randint(*choose.choice(_SIZES))
    if choose.random() < 0.4:
        return choose.randbytes(size // 2).hex().encode()  # halves when it is compressed
    return choose.randbytes(size)


@functools.lru_cache(maxsize=65536)
def digest(name: str) -> str:
    """Return what ``seen`` says of a file with this content."""
    return described(content(name))


def described(data: bytes) -> str:
    """Return what tells a file's content."""
    return f"{len(data)}:{hashlib.sha256(data).hexdigest()}"


Recipe = dict[str, str]


class Gardener:
    """Grows recipes: each differs from the one before in a third of its files."""

    def __init__(self, seed: str) -> None:
        self._choose = random.Random(seed)
        self._seed = seed
        self._fresh = 0
        self.recipe: Recipe = {}

    def grow(self, version: str) -> Recipe:
        """Return the next recipe, which is called ``version``."""
        recipe = dict(self.recipe)
        if not recipe:
            for number in range(16):
                recipe[f"d{number % 4}/f{number}"] = self._some()
            recipe["big"] = "+".join(self._some() for _ in range(_PIECES))
            recipe["d1/big"] = "+".join(self._some() for _ in range(_PIECES))
        paths = sorted(path for path in recipe if path != VERSION)
        for path in self._choose.sample(paths, max(1, len(paths) // 3)):
            if "+" in recipe[path]:
                pieces = recipe[path].split("+")
                pieces[self._choose.randrange(len(pieces))] = self._some()
                recipe[path] = "+".join(pieces)
            elif len(paths) > 14 and self._choose.random() < 0.2:
                del recipe[path]
                recipe[f"d{self._choose.randrange(6)}/n{self._fresh}"] = self._some()
            else:
                recipe[path] = self._some()
        recipe[VERSION] = f"={version}"
        self.recipe = recipe
        return recipe

    def _some(self) -> str:
        """Return the name of a content: often one that other trees have, or had."""
        if self._choose.random() < 0.6:
            return f"s{self._choose.randrange(_SHARED)}"
        self._fresh += 1
        return f"{self._seed}.{self._fresh}"


def executable(path: str) -> bool:
    """Whether the file at ``path`` of any tree is a program."""
    return path.endswith("1")


def write(root: Path, recipe: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Make of the tree ``before`` the one of ``recipe``; what is equal is not touched."""
    for path in before.keys() - recipe.keys():
        (root / path).unlink()
    for path, name in recipe.items():
        if before.get(path) == name:
            continue
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_bytes(content(name))
        place.chmod(0o755 if executable(path) else 0o644)
    link = root / "link"
    if not link.is_symlink():
        link.symlink_to(VERSION)
    for directory in [entry for entry in root.iterdir() if entry.is_dir()]:
        if not any(directory.iterdir()):
            directory.rmdir()


def expected(recipe: Mapping[str, str]) -> dict[str, str]:
    """Return what ``seen`` of the tree of ``recipe`` is."""
    found = {
        path: ("x" if executable(path) else "-") + digest(name) for path, name in recipe.items()
    }
    found["link"] = f"-> {VERSION}"
    return found


def seen(root: Path) -> dict[str, str]:
    """Return what every file below ``root`` is: read to its last byte. Raises ``OSError``."""
    found = {}
    for directory, names, files in os.walk(root, onerror=_raise):
        for name in files + [
            name for name in names if os.path.islink(os.path.join(directory, name))
        ]:
            path = os.path.join(directory, name)
            what = os.lstat(path)
            if stat.S_ISLNK(what.st_mode):
                said = f"-> {os.readlink(path)}"
            else:
                with open(path, "rb") as file:
                    said = ("x" if what.st_mode & 0o100 else "-") + described(file.read())
            found[os.path.relpath(path, root)] = said
    return found


def _raise(error: OSError) -> None:
    raise error


def differences(got: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return in what two trees differ."""
    return [
        f"{path}: {got.get(path, 'missing')} instead of {wanted.get(path, 'nothing')}"
        for path in sorted(got.keys() | wanted.keys())
        if got.get(path) != wanted.get(path)
    ]


def remove(root: Path) -> None:
    """Remove a tree if it is there."""
    shutil.rmtree(root, ignore_errors=True)
