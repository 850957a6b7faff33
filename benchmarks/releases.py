"""Successive releases of the same packages: what a store must hold again after an update."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import zstandard
from blake3 import blake3

from benchmarks.measure import files_below, run

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux1_x86_64")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two releases, as requirements; the wheels are those of CPython 3.11 on x86-64."""

    name: str
    old: tuple[str, ...]
    new: tuple[str, ...]


NUMPY_SCIPY = Pair(
    "numpy + scipy patch release",
    ("numpy==2.1.0", "scipy==1.14.0"),
    ("numpy==2.1.1", "scipy==1.14.1"),
)
TORCH = Pair("torch patch release", ("torch==2.5.0",), ("torch==2.5.1",))


def unpacked(pair: Pair, work: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Return the trees of both releases, downloaded once and kept in ``work``.

    Raises ``BenchmarkError`` when the wheels cannot be had.
    """
    return _unpack(pair.old, work, say), _unpack(pair.new, work, say)


def _unpack(requirements: tuple[str, ...], work: Path, say: Callable[[str], None]) -> Path:
    tree = work / "releases" / "+".join(requirements)
    complete = tree.with_name(tree.name + ".complete")
    if complete.exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    wheels = tree.with_name(tree.name + ".wheels")
    wheels.mkdir(parents=True, exist_ok=True)
    say(f"downloading {', '.join(requirements)}")
    run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--python-version=3.11"),
            *("--implementation=cp", "--abi=cp311"),
            *(f"--platform={platform}" for platform in _PLATFORMS),
            *("--dest", wheels, *requirements),
        ]
    )
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree)
    shutil.rmtree(wheels)
    complete.touch()
    return tree


def whole_file_dedup(old: Path, new: Path) -> int:
    """Return the bytes that a store of whole files would add for ``new`` after ``old``.

    Each file whose content is not in ``old`` is compressed by itself with zstd at level 3.
    """
    known = {_digest(path) for path in files_below(old)}
    fresh: dict[bytes, Path] = {}
    for path in files_below(new):
        name = _digest(path)
        if name not in known:
            fresh[name] = path
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(_compressed_size, fresh.values()))


def _digest(path: Path) -> bytes:
    return blake3().update_mmap(path).digest() if path.stat().st_size else b""


def _compressed_size(path: Path) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress(path.read_bytes()))
