"""Scenario ``store``: how many bytes a tree takes, and how many more its next release.

Exact and repeatable, so everything is done once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measure import BenchmarkError, tree_size
from benchmarks.peers import Storer, missing, storers
from benchmarks.releases import NUMPY_SCIPY, TORCH, Pair, unpacked, whole_file_dedup
from benchmarks.results import Metric, Result

STORED = Metric("stored bytes of the tree", "B")
WHOLE_FILES = "whole files, zstd"


def new_bytes(pair: Pair) -> Metric:
    """Return the metric of the bytes that the newer release of ``pair`` adds."""
    return Metric(f"new stored bytes, {pair.name}", "B")


def seconds(pair: Pair) -> Metric:
    """Return the metric of the seconds that storing the newer release took, once."""
    return Metric(f"push of the {pair.name}", "s")


def measure(context: Context) -> Result:
    """Store the tree, and pairs of releases, with every tool; compare with whole-file dedup."""
    result = Result("store", "Bytes in the store")
    files, size = tree_size(context.tree)
    result.facts |= {"files": files, "logical bytes": size}
    pairs = {}
    for pair in (NUMPY_SCIPY, TORCH) if context.torch_pair else (NUMPY_SCIPY,):
        pairs[pair] = unpacked(pair, context.work, context.say)
        result.facts[f"logical bytes, {pair.name}"] = tree_size(pairs[pair][1])[1]
    for tool in filter(lambda tool: context.wants(tool.name), storers()):
        why = missing(tool)
        if why:
            result.absent[tool.name] = why
            continue
        try:
            context.say(tool.name)
            sizes, _ = _store(context, tool, [context.tree])
            result.add(STORED, tool.name, sizes[0])
            for pair, trees in pairs.items():
                context.say(f"{tool.name}, {pair.name}")
                sizes, took = _store(context, tool, trees)
                result.add(new_bytes(pair), tool.name, sizes[1] - sizes[0])
                result.add(seconds(pair), tool.name, took)
        except BenchmarkError as error:
            result.absent[tool.name] = str(error)
    for pair, (old, new) in pairs.items():
        context.say(f"{WHOLE_FILES}, {pair.name}")
        result.add(new_bytes(pair), WHOLE_FILES, whole_file_dedup(old, new))
    result.notes.append(
        f"{WHOLE_FILES}: computed, not a tool. Every file whose content the older release does "
        "not hold, compressed by itself at level 3."
    )
    return result


def _store(context: Context, tool: Storer, trees: Sequence[Path]) -> tuple[list[int], float]:
    """Store ``trees`` one after the other, each as the next version of the same thing.

    Returns the bytes stored after each, and the seconds of the last. Every tool sees the
    versions at the same path, as it would in use.
    """
    sizes = []
    with context.scratch() as scratch:
        home = scratch / "home"
        home.mkdir()
        tool.prepare(home)
        place = scratch / "tree"
        took = 0.0
        for tree in trees:
            if len(trees) == 1:
                took = tool.store(home, tree).seconds
            else:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(tree, place, symlinks=True)
                took = tool.store(home, place).seconds
            sizes.append(tool.stored(home))
    return sizes, took
