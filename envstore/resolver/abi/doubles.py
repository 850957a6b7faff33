"""Two libraries of one name, and CUDA runtimes that do not fit each other or the driver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from envstore.resolver.abi.findings import ERROR, WARNING, Finding
from envstore.resolver.abi.host import AbiTarget, numbers
from envstore.resolver.abi.names import major_of, stem_of
from envstore.resolver.abi.search import Tree

_PACKAGED = re.compile(r"nvidia-cuda-runtime(-cu\d+)?|cuda-cudart|pytorch-cuda|cudatoolkit")


def duplicates(
    tree: Tree, paths: Iterable[str], by_name: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    """Yield libraries that packages bring twice, and differently, under a name that is needed."""
    wanted = {name for path in paths for name in tree.facts(path).needed}
    for name in sorted(wanted & by_name.keys()):
        first, *others = by_name[name]
        facts = tree.facts(first)
        for other in others:
            its = tree.facts(other)
            if tree.package(other) == tree.package(first) or (
                (its.verdef, its.defined) == (facts.verdef, facts.defined)
            ):
                continue
            yield Finding(
                WARNING,
                "DUPLICATE_SONAME",
                other,
                tree.package(other),
                name,
                f"{name} is there twice, and not the same: {first} and {other}; "
                "the first that is loaded serves both",
                f"{first} of {tree.package(first)}",
                "have one package bring it for all",
            )


def cuda_runtimes(
    tree: Tree, paths: Iterable[str], target: AbiTarget, packages: Mapping[str, str]
) -> Iterator[Finding]:
    """Compare the CUDA runtimes with each other and with what the driver runs.

    A driver runs what was made for its major version, whatever the minor one, and for all
    before it.
    """
    found: dict[int, tuple[str, str]] = {}
    for path in paths:
        soname = tree.facts(path).soname
        major = major_of(soname)
        if stem_of(soname) == "libcudart" and major is not None:
            found.setdefault(major, (path, soname))
    # A package may be linked with the runtime and have no libcudart.
    for name, version in sorted(packages.items()):
        if _PACKAGED.fullmatch(name) and re.match(r"\d{1,3}(\.|$)", version):
            found.setdefault(int(version.split(".")[0]), ("", f"{name} {version}"))
    for major, (path, what) in sorted(found.items()):
        driver = target.cuda
        if not driver or major <= numbers(driver)[0]:
            continue
        message = (
            f"{what}: CUDA driver version is insufficient for CUDA runtime version "
            f"(the runtime is {major}, the target's driver runs {driver})"
        )
        hint = f"take builds for CUDA {numbers(driver)[0]}, or say --cuda {major}.0 if "
        hint += "all machines have such a driver"
        package = tree.package(path) if path else what.partition(" ")[0]
        yield Finding(ERROR, "CUDA_MISMATCH", path, package, what, message, "", hint)
    if len(found) > 1:
        low, high = min(found), max(found)
        path, what = found[high]
        package = tree.package(path) if path else what.partition(" ")[0]
        message = f"runtimes of CUDA {low} ({found[low][1]}) and {high} ({what}) are there"
        hint = "what was built for one cannot use what the other made"
        yield Finding(WARNING, "CUDA_MISMATCH", path, package, what, message, "", hint)
