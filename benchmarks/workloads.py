"""The environments that are started cold, and what is started in them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import BenchmarkError, run
from benchmarks.tree import large_tree
from examples.prefix import clean_environment

SMALL, LARGE, BIG = "small", "large", "big"
BIG_FILE = "weights.bin"
BIG_BYTES = 2_000_000_000

_PIECE = 1 << 24
_SMALL = ("numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1")
_TRAIN = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimiser = torch.optim.AdamW(model.parameters())
for _ in range(5):
    loss = nn.functional.cross_entropy(model(torch.randn(128, 64)), torch.randint(10, (128,)))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """A command to time: its name, the environment that it runs in, its Python code."""

    name: str
    environment: str
    code: str


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("pandas", SMALL, "import pandas, scipy.linalg"),
        Workload("torch", LARGE, "import torch"),
        Workload("stack", LARGE, "import torch, transformers, pandas, scipy.stats"),
        Workload("train", LARGE, _TRAIN),
    )
}


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment on local disk.

    ``interpreter`` is the base one, outside the tree; ``site`` is where packages lie, below it.
    """

    name: str
    tree: Path
    interpreter: str
    site: str

    def command(self, root: Path | str, code: str) -> list[str]:
        """Return the command that runs ``code`` with the packages of a copy at ``root``.

        Every copy is used with the same interpreter from local disk, isolated from everything
        else, which leaves the copy as it is.
        """
        start = f"import sys; sys.path.insert(0, {os.path.join(root, self.site)!r})\n"
        return [self.interpreter, "-I", "-B", "-c", start + code]


def environment(name: str, tree: Path) -> Environment:
    """Return the virtual environment at ``tree``. Raises ``BenchmarkError`` if it is none."""
    sites = list(tree.glob("lib/python3.*/site-packages"))
    interpreter = tree / "bin" / "python"
    if len(sites) != 1 or not interpreter.exists():
        raise BenchmarkError(f"{tree} is not a virtual environment")
    base = os.path.realpath(interpreter)
    if Path(base).is_relative_to(tree.resolve()):
        raise BenchmarkError(f"{tree} holds an interpreter of its own: it must be a plain venv")
    return Environment(name, tree.resolve(), base, str(sites[0].relative_to(tree)))


def build(name: str, work: Path, say: Callable[[str], None]) -> Path:
    """Return the environment of that name, built by plain pip and kept in ``work``.

    ``big`` is a directory with one file of 2 GB.
    """
    if name == LARGE:
        return large_tree(work, say)
    if name == BIG:
        return _big_file(work, say)
    tree, complete = work / "small", work / "small.complete"
    if not complete.exists():
        variables = clean_environment()
        base = os.path.realpath("/proc/self/exe")
        run([base, "-I", "-m", "venv", "--clear", tree], env=variables)
        say(f"installing {', '.join(_SMALL)}")
        pip: list[str | Path] = [tree / "bin" / "python", "-I", "-m", "pip"]
        run([*pip, "install", "--quiet", "--only-binary=:all:", *_SMALL], env=variables)
        run([*pip, "uninstall", "--quiet", "--yes", "pip"], env=variables)
        complete.touch()
    return tree


def _big_file(work: Path, say: Callable[[str], None]) -> Path:
    """Return a directory with a file like a model's weights: half its bytes say little."""
    path = work / "big" / BIG_FILE
    if not path.exists():
        say(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = random.Random(0)
        exponents = bytes(60 + min(7, byte & -byte).bit_length() for byte in range(256))
        with path.with_suffix(".new").open("wb") as file:
            for start in range(0, BIG_BYTES, _PIECE):
                piece = bytearray(numbers.randbytes(min(_PIECE, BIG_BYTES - start)))
                piece[1::2] = piece[1::2].translate(exponents)
                file.write(piece)
        path.with_suffix(".new").rename(path)
    return path.parent


def pins(tree: Path) -> list[str]:
    """Return ``name==version`` of all that is installed in ``tree``, installers left out."""
    found = []
    for info in sorted(tree.glob("lib/python3.*/site-packages/*.dist-info")):
        name, version = info.name.removesuffix(".dist-info").split("-", 1)
        if name not in ("pip", "setuptools"):
            found.append(f"{name}=={version}")
    return found
