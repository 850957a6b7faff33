"""Builds the large tree that the scenarios store: an environment such as people really have."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import BenchmarkError, run, tree_size
from examples.prefix import build_prefix, clean_environment

# torch first and alone, by pip: a site whose index prefers the CPU build gets that one.
_FIRST = "torch==2.13.0"
_REST = (
    "transformers==5.23.0",
    "pandas==3.1.1",
    "scipy==1.17.1",
    "scikit-learn==1.9.1",
    "pyarrow==26.0.1",
    "matplotlib==3.11.2",
    "sympy==1.14.0",
)
LEAST_FILES, LEAST_BYTES = 36_000, 1_400_000_000

_DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo-requirements.txt"


def large_tree(work: Path, say: Callable[[str], None]) -> Path:
    """Return a virtual environment with torch, transformers, pandas and scipy, kept in ``work``.

    Raises ``BenchmarkError`` when it cannot be built or is smaller than it should be.
    """
    tree = work / "tree"
    complete = work / "tree.complete"
    if complete.exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    base = os.path.realpath(sys.executable)
    environment = clean_environment()
    run([base, "-I", "-m", "venv", tree], env=environment)
    for requirements in ((_FIRST,), _REST):
        say(f"installing {', '.join(requirements)}")
        pip = [tree / "bin" / "python", "-I", "-m", "pip", "install", "--quiet"]
        run([*pip, "--only-binary=:all:", *requirements], env=environment)
    files, size = tree_size(tree)
    if files < LEAST_FILES or size < LEAST_BYTES:
        raise BenchmarkError(
            f"{tree} has {files:,} files and {size:,} bytes, which is less than the "
            f"{LEAST_FILES:,} and {LEAST_BYTES:,} that the figures are about"
        )
    complete.touch()
    return tree


def small_tree(work: Path, say: Callable[[str], None]) -> Path:
    """Return the demo's environment: for a quick look, not for figures."""
    tree, _ = build_prefix(_DEMO, work, say)
    complete = tree.with_suffix(".compiled")
    if not complete.exists():
        # As an installer leaves it; the demo leaves that to the push.
        compile_all = [tree / "bin" / "python3", "-I", "-m", "compileall", "-q", "-j0", tree]
        run(compile_all, env=clean_environment())
        complete.touch()
    return tree
